"""openpi-duquant doctor."""

from collections.abc import Iterator
import importlib.metadata
import platform
import re
import sys

import torch

from openpi_duquant import kernels
from openpi_duquant.commands.console import console
from openpi_duquant.installation import Finding
from openpi_duquant.installation import find_openpi
from openpi_duquant.installation import find_transformers


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
    candidates = [name for name in kernels.AUTO[:-1] if name in runnable] or list(kernels.AUTO[-1:])
    rivals = f"the fastest of {', '.join(candidates)}, layer by layer"
    yield Finding("backend auto", f"takes {rivals if device.type == 'cuda' and candidates[1:] else candidates[0]}")


def _openpi() -> Iterator[Finding]:
    """The engine needs no openpi; the plugin does."""
    openpi = find_openpi()
    yield openpi
    if not openpi.fix:
        yield find_transformers()
