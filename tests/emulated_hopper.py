"""The kernels made for Hopper, compiled as C++ and run on a CPU, thread by thread: see emulated_hopper.cuh."""

from collections.abc import Mapping, Sequence
import ctypes
import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import driver

COMPILER = shutil.which("g++")
only_here = pytest.mark.skipif(torch.cuda.is_available() or not COMPILER, reason="needs g++, and no GPU")
CLUSTERS = 2
MOST_SHARED_MEMORY = 2**20  # more than a GPU has: where blocks are few, each has more to do

_RUN = """
extern "C" const char* run(int blocks, int cluster, int threads, int shared_bytes, void** arguments) {{
    Grid given = {{blocks, cluster, threads, shared_bytes}};
    return run_grid(given, {kernel}, arguments);
}}
"""


@dataclasses.dataclass(frozen=True)
class _Code:
    source: str
    constants: Mapping[str, int | str]

    def library(self, kernel: str, folder: pathlib.Path) -> ctypes.CDLL:
        """Compiled into a folder, if it is not there already."""
        text = self.source + _RUN.format(kernel=kernel)
        macros = [f"-D{name}={value}" for name, value in self.constants.items()]
        here = folder / hashlib.sha256(repr((text, macros)).encode()).hexdigest()[:16]
        if not here.exists():
            here.mkdir()
            for header in pathlib.Path(driver.__file__).parent.glob("*.cuh"):
                shutil.copy(header, here)
            shutil.copy(pathlib.Path(__file__).with_suffix(".cuh"), here / "hopper.cuh")
            (here / "kernel.cpp").write_text(text)
            options = ["-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-w", "-Wno-psabi", "-shared", "-fPIC", *macros]
            subprocess.run([COMPILER, *options, "-o", here / "library", here / "kernel.cpp"], check=True)
        return ctypes.CDLL(str(here / "library"))


@dataclasses.dataclass(frozen=True)
class _Function:
    library: ctypes.CDLL
    cluster: int
    shared_memory: int

    def most_clusters(self, *_: int) -> int:
        return CLUSTERS

    def __call__(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], *, cooperative: bool = False
    ) -> None:
        del cooperative
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.library.run.restype = ctypes.c_char_p
        fault = self.library.run(grid[0], self.cluster, threads, self.shared_memory, pointers)
        if fault:
            raise RuntimeError(fault.decode())


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("first", ctypes.c_void_p), ("sizes", ctypes.c_int64 * 3), ("strides", ctypes.c_int64 * 2),
        ("box", ctypes.c_int64 * 3), ("padding", ctypes.c_int64 * 7),
    ]  # fmt: skip


def _tensor_map(matrices: Tensor, rows: int, columns: int, *, together: int = 1) -> ctypes.Structure:
    (number, m, k), three = matrices.shape, ctypes.c_int64 * 3
    strides = (ctypes.c_int64 * 2)(matrices.stride(1), matrices.stride(0))
    return _TensorMap(matrices.data_ptr(), three(k, m, number), strides, three(columns, rows, together))


def install(patch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
    """Lets `driver` compile and launch on the CPU, and gives it a GPU of sm_90 with room for two clusters.

    A kernel raises RuntimeError with what the machine would not do, or with who waits for ever.

    Args:
        patch: Undoes it.
        folder: Where compiled kernels are kept.
    """

    def load(code: _Code, kernel: str, shared_memory: int, device: object) -> _Function:
        del device
        cluster = int(code.constants.get("CLUSTER", code.constants.get("PARTS", 1)))
        return _Function(code.library(kernel, folder), cluster, shared_memory)

    room = types.SimpleNamespace(shared_memory_per_block_optin=MOST_SHARED_MEMORY, multi_processor_count=2)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: room)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    patch.setattr(driver, "compile_source", lambda _, source, architecture, constants: _Code(source, constants))
    patch.setattr(driver, "load", load)
    patch.setattr(driver, "tensor_map", _tensor_map)
