"""Building operators: a process with BitBLAS in it generates and compiles them into the cache."""

from collections.abc import Iterable
import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels.bitblas import cache
from openpi_duquant.kernels.bitblas import patches
from openpi_duquant.kernels.bitblas.operators import Operator
from openpi_duquant.progress import progress_bar

_NVCC = "/usr/local/cuda/bin/nvcc"
_GENERATE = "openpi_duquant.kernels.bitblas.generate"


def obstacles() -> list[str]:
    """Why operators cannot be built here; empty if they can."""
    missing = [] if find_nvcc() else ["nvcc is not on the PATH (it comes with the CUDA toolkit)"]
    return patches.unsupported() + missing


def find_nvcc() -> str | None:
    """Path of CUDA's compiler."""
    return shutil.which("nvcc") or shutil.which(_NVCC)


def build(operators: Iterable[Operator], architecture: str) -> pathlib.Path:
    """Builds the operators that the cache does not have yet for this machine's CUDA; shows progress on stderr.

    Args:
        operators: Those wanted.
        architecture: "sm_90", say; needs no such GPU.

    Returns:
        The folder that holds them.

    Raises:
        DuQuantError: If they cannot be built here, with the reasons, or a compiler failed, with the end of its output.
    """
    if obstacles():
        raise DuQuantError(f"kernels cannot be built here: {'; '.join(obstacles())}")
    nvcc = find_nvcc()
    folder = cache.folder(architecture, _cuda_version(nvcc))
    missing = [
        operator for operator in dict.fromkeys(operators) if not cache.Entry(folder, operator.name).path.exists()
    ]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        values = [dataclasses.asdict(operator) for operator in missing]
        job = {"nvcc": nvcc, "architecture": architecture, "folder": str(folder), "operators": values}
        _run(job, f"Building {len(missing)} BitBLAS kernels for {architecture}")
    return folder


def _run(job: dict[str, object], title: str) -> None:
    total = len(job["operators"])
    command, pipe = [sys.executable, "-m", _GENERATE], subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:  # its exit status says why
                json.dump(job, process.stdin)
            done = 0
            with progress_bar(title, total) as advance:
                for line in process.stdout:
                    if line.startswith("bitblas_"):
                        done += 1
                        advance(1)
        except BaseException:
            process.terminate()
            raise
        if process.wait() or done < total:
            errors.seek(0)
            tail = " ".join(errors.read()[-2000:].split())
            raise DuQuantError(f"{title} failed after {done}: {tail or 'no output'}")


def _cuda_version(nvcc: str) -> tuple[int, int]:
    """Of a compiler, by what it says of itself."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", output)
    if not found:
        raise DuQuantError(f"{nvcc} --version does not say which CUDA it is of; install the CUDA toolkit again")
    return int(found[1]), int(found[2])
