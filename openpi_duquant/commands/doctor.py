"""openpi-duquant doctor."""

from collections.abc import Iterator
import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import sys
from typing import NamedTuple

import torch

from openpi_duquant import kernels
from openpi_duquant.commands.console import console

OPENPI_FIX = "git clone https://github.com/Physical-Intelligence/openpi && cd openpi && uv sync; install this there"
TRANSFORMERS = "4.53.2"


class Finding(NamedTuple):
    """One line of the report: what, how it stands, and the command or step that would mend it."""

    what: str
    state: str
    fix: str = ""


def doctor() -> None:
    """Show versions, devices and backends: what runs here, what does not and why, and the command that would fix it.

    The exit status is 1 if something that every use needs is broken.
    """
    findings = [*_versions(), *_devices(), *_backends(), *_openpi()]
    for what, state, fix in findings:
        console.print(f"{what:<18} {state}" + (f"\n{'':<18} -> {fix}" if fix else ""))
    if any(finding.state.startswith("broken") for finding in findings):
        sys.exit(1)


def _versions() -> Iterator[Finding]:
    for package in ("openpi-duquant", "numpy", "safetensors"):
        yield Finding(package, importlib.metadata.version(package))
    yield Finding("python", platform.python_version())
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:3])
    fits = (2, 7, 1) <= version < (2, 14)
    yield Finding(
        "torch",
        torch.__version__ if fits else f"broken: {torch.__version__} is not from 2.7.1 to 2.13",
        "" if fits else 'pip install "torch>=2.7.1,<2.14"',
    )


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "no CUDA device is visible" if built else "this torch is built without CUDA"
        yield Finding("GPU", f"none: {reason}", "nvidia-smi" if built else "install a CUDA build of torch")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        state = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding(f"GPU {index}", state)


def _backends() -> Iterator[Finding]:
    """Of a W4A8 layer of pi0.5, on the device that this machine has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = kernels.Problem(2048, 1024, 4, 8, 1, "none", 0, torch.bfloat16)
    runnable = []
    for name, backend in kernels.BACKENDS.items():
        runs, reasons = backend.can_run(problem, device)
        runnable += [name] if runs else []
        yield Finding(f"backend {name}", f"runs on {device}" if runs else f"cannot run: {'; '.join(reasons)}")
    yield Finding("backend auto", f"takes {next(name for name in kernels.AUTO if name in runnable)}")


def _openpi() -> Iterator[Finding]:
    """The engine needs no openpi; the plugin does, and the package of that name on PyPI is an empty placeholder."""
    spec = importlib.util.find_spec("openpi")
    if spec is None or spec.origin is None:  # without origin: some folder of that name, no package
        yield Finding("openpi", "not installed; conversion and the engine run without it", OPENPI_FIX)
        return
    if importlib.util.find_spec("openpi.models_pytorch") is None:
        fix = f"pip uninstall openpi; {OPENPI_FIX}"
        yield Finding("openpi", "PyPI's placeholder: an empty package, not Physical Intelligence's openpi", fix)
        return
    yield Finding("openpi", "installed")
    found = importlib.util.find_spec("transformers")
    version = importlib.metadata.version("transformers") if found else "none"
    if found is None or version != TRANSFORMERS:
        fix = f"pip install transformers=={TRANSFORMERS}"
        yield Finding("transformers", f"{version}; openpi's PyTorch models need {TRANSFORMERS}", fix)
    elif not (pathlib.Path(found.origin).parent / "models" / "siglip" / "check.py").exists():
        fix = "cp -r src/openpi/models_pytorch/transformers_replace/* <folder of transformers>, in openpi's checkout"
        yield Finding("transformers", f"{version}, without openpi's transformers_replace", fix)
    else:
        yield Finding("transformers", f"{version}, with openpi's transformers_replace")
