"""The kernels made for Hopper, compiled as C++ and run on a CPU, thread by thread: see emulated_hopper.cuh."""

from collections.abc import Mapping, Sequence
import ctypes
import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
from typing import Any

from torch import Tensor

from openpi_duquant.kernels import driver

COMPILER = shutil.which("g++")

_RUN = """
extern "C" const char* run(int blocks, int cluster, int threads, int shared_bytes, void** arguments) {{
    Grid given = {{blocks, cluster, threads, shared_bytes}};
    return run_grid(given, {kernel}, arguments);
}}
"""


@dataclasses.dataclass(frozen=True)
class Function:
    """`driver.Function`, of blocks in clusters."""

    library: ctypes.CDLL
    cluster: int
    shared_memory: int

    def __call__(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], *, cooperative: bool = False
    ) -> None:
        """Runs it; raises RuntimeError with what the machine would not do, or with who waits for ever."""
        del cooperative
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.library.run.restype = ctypes.c_char_p
        fault = self.library.run(grid[0], self.cluster, threads, self.shared_memory, pointers)
        if fault:
            raise RuntimeError(fault.decode())


def compile_source(source: str, kernel: str, constants: Mapping[str, int | str], folder: pathlib.Path) -> ctypes.CDLL:
    """The library of a kernel with these macros, compiled into a folder if it is not there already."""
    text = source + _RUN.format(kernel=kernel)
    macros = [f"-D{name}={value}" for name, value in constants.items()]
    here = folder / hashlib.sha256(repr((text, macros)).encode()).hexdigest()[:16]
    if not (here / "library").exists():
        here.mkdir()
        for name, path in {
            "hopper.cuh": pathlib.Path(__file__).with_suffix(".cuh"),
            "numbers.cuh": pathlib.Path(driver.__file__).with_name("numbers.cuh"),
        }.items():
            shutil.copy(path, here / name)
        (here / "kernel.cpp").write_text(text)
        options = ["-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC", *macros]
        subprocess.run([COMPILER, *options, "-o", here / "library", here / "kernel.cpp"], check=True)
    return ctypes.CDLL(str(here / "library"))


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("first", ctypes.c_void_p), ("sizes", ctypes.c_int64 * 3), ("strides", ctypes.c_int64 * 2),
        ("box", ctypes.c_int64 * 3), ("padding", ctypes.c_int64 * 7),
    ]  # fmt: skip


def tensor_map(matrices: Tensor, rows: int, columns: int) -> ctypes.Structure:
    """`driver.tensor_map`."""
    (number, m, k), three = matrices.shape, ctypes.c_int64 * 3
    strides = (ctypes.c_int64 * 2)(matrices.stride(1), matrices.stride(0))
    return _TensorMap(matrices.data_ptr(), three(k, m, number), strides, three(columns, rows, number))
