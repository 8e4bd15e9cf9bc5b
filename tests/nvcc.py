"""CUDA's compiler, where it is installed."""

from collections.abc import Mapping
import pathlib
import shutil
import subprocess

import pytest

from openpi_duquant.kernels import driver

_NVCC = shutil.which("nvcc")
_VERSION = subprocess.run([_NVCC, "--version"], capture_output=True, text=True, check=True).stdout if _NVCC else ""

needed = pytest.mark.skipif("release 13." not in _VERSION, reason="needs the nvcc of CUDA 13")


def report(source: str, architecture: str, constants: Mapping[str, object], folder: pathlib.Path) -> str:
    """What the assembler says of registers when it makes machine code of a kernel in this package's own folder."""
    (folder / "kernel.cu").write_text(source)
    options = ["-std=c++17", f"-arch={architecture}", "-cubin", f"-I{pathlib.Path(driver.__file__).parent}"]
    macros = [f"-D{name}={value}" for name, value in constants.items()]
    command = [_NVCC, *options, "-Xptxas", "-v", *macros, "-o", folder / "code", folder / "kernel.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr
