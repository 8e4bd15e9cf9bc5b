# make demo   convert a pi0.5 checkpoint and run it (CKPT=folder takes a real one; OUT=folder takes the results)
# make test   the tests
# Both make a virtual environment and install what they need. TORCH names the torch to install first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out/demo
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/openpi-duquant demo --output $(OUT) $(if $(CKPT),--checkpoint $(CKPT))

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out
