"""Whether openpi can be imported here. It is not on PyPI: the package of that name there is an empty placeholder."""

import importlib.metadata
import importlib.util
import pathlib
from typing import NamedTuple

from openpi_duquant.config import DuQuantError

OPENPI_FIX = "git clone https://github.com/Physical-Intelligence/openpi && cd openpi && uv sync; install this there"
TRANSFORMERS = "4.53.2"


class Finding(NamedTuple):
    """What was looked at, how it stands, and the command or step that would mend it."""

    what: str
    state: str
    fix: str = ""


class MissingOpenpiError(DuQuantError, ImportError):
    """openpi is not installed."""


def find_openpi() -> Finding:
    """openpi: installed, missing or the placeholder; it is looked for, not imported."""
    spec = importlib.util.find_spec("openpi")
    if spec is None or spec.origin is None:  # without origin: some folder of that name, no package
        return Finding("openpi", "not installed; conversion and the engine run without it", OPENPI_FIX)
    if spec.submodule_search_locations is None or importlib.util.find_spec("openpi.models_pytorch") is None:
        state = "PyPI's placeholder: an empty package, not Physical Intelligence's openpi"
        return Finding("openpi", state, f"pip uninstall openpi; {OPENPI_FIX}")
    return Finding("openpi", "installed")


def require_openpi() -> None:
    """Raises MissingOpenpiError, with the step that mends it, where the plugin's host is missing."""
    what, state, fix = find_openpi()
    if fix:
        raise MissingOpenpiError(f"the plugin needs {what}: {state}; {fix}")


def find_transformers() -> Finding:
    """The version of transformers that openpi's PyTorch models need, with openpi's overlay."""
    found = importlib.util.find_spec("transformers")
    version = importlib.metadata.version("transformers") if found else "none"
    if found is None or version != TRANSFORMERS:
        state = f"{version}; openpi's PyTorch models need {TRANSFORMERS}"
        return Finding("transformers", state, f"pip install transformers=={TRANSFORMERS}")
    if not (pathlib.Path(found.origin).parent / "models" / "siglip" / "check.py").exists():
        fix = "cp -r src/openpi/models_pytorch/transformers_replace/* <folder of transformers>, in openpi's checkout"
        return Finding("transformers", f"{version}, without openpi's transformers_replace", fix)
    return Finding("transformers", f"{version}, with openpi's transformers_replace")
