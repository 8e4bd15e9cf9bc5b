# make demo   convert a pi0.5 checkpoint and run it (CKPT=folder takes a real one; OUT=folder takes the results)
# make test   the tests
# make test-libero   the tests in LIBERO, on assets of our own (needs libosmesa6)
# Each makes a virtual environment and installs what it needs. TORCH names the torch to install first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out/demo
BIN := $(VENV)/bin

.PHONY: demo test test-libero lint clean

demo: $(VENV)/installed
	$(BIN)/openpi-duquant demo --output $(OUT) $(if $(CKPT),--checkpoint $(CKPT))

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

test-libero: $(VENV)-libero/installed
	$(VENV)-libero/bin/python -m pytest -q tests/libero

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)-libero/installed: pyproject.toml constraints.txt examples/libero/requirements.txt
	$(PYTHON) -m venv $(VENV)-libero
	$(VENV)-libero/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)-libero/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[dev,libero,ray]"
	$(VENV)-libero/bin/pip install --quiet --disable-pip-version-check --no-deps -r examples/libero/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-libero out
