"""BitBLAS 0.1.0.post1 made to run without a GPU, and to generate right code.

Each function mends one fault and says which. They were written for one version of BitBLAS and are refused to any other.
Only `generate` applies them, in its own process.
"""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import types

VERSION = "0.1.0.post1"
PATCHES = 1
"""Counts changes of this file or of `generate` that change generated code: a part of the cache's key."""

_LIBRARIES = {"libcudart.so.12": "nvidia.cuda_runtime", "libnvrtc.so.12": "nvidia.cuda_nvrtc"}
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuLaunchKernel", "cuMemsetD32_v2",
    "cuModuleGetFunction", "cuModuleGetGlobal_v2", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled",
)  # fmt: skip


def unsupported() -> list[str]:
    """Why BitBLAS cannot be used here to generate code; empty if it can."""
    if importlib.util.find_spec("bitblas") is None:
        return [f"BitBLAS is not installed (pip install bitblas=={VERSION})"]
    found = importlib.metadata.version("bitblas")
    if found != VERSION:
        return [f"BitBLAS is {found}, its faults are known for {VERSION} only (pip install bitblas=={VERSION})"]
    return []


def import_bitblas() -> types.ModuleType:
    """Imports BitBLAS and mends it.

    Raises:
        RuntimeError: If BitBLAS or a library that it links is missing, or it is of another version.
    """
    for reason in unsupported():
        raise RuntimeError(reason)
    _preload_libraries()
    folder = pathlib.Path(importlib.util.find_spec("bitblas").origin).parent
    _stand_in_for_gpu(folder)
    bitblas = importlib.import_module("bitblas")
    _mend_swizzle()
    return bitblas


def _preload_libraries() -> None:
    """libtvm.so links the CUDA 12 runtime without saying where it is, and the driver, which not every machine has."""
    for library, package in _LIBRARIES.items():
        spec = importlib.util.find_spec(package) if importlib.util.find_spec("nvidia") else None
        folders = [f"{folder}/lib/" for folder in spec.submodule_search_locations or ()] if spec else []
        if not any(_load(folder + library) for folder in ["", *folders]):
            wheel = package.replace(".", "-").replace("_", "-") + "-cu12"
            raise RuntimeError(f"{library}, which BitBLAS links, is missing (pip install {wheel})")
    if not _load("libcuda.so.1"):
        _load_driver_stand_in()


def _load(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_driver_stand_in() -> None:
    """Functions of the driver that fail: code is generated without calling any."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = pathlib.Path(folder, "driver.c"), pathlib.Path(folder, "libcuda.so.1")
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in _DRIVER_FUNCTIONS))
        soname = "-Wl,-soname,libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", soname, str(source), "-o", str(library)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _stand_in_for_gpu(folder: pathlib.Path) -> None:
    """Importing BitBLAS raises where there is no GPU; what it asks of one reaches no code that we generate."""
    sys.path.insert(0, str(folder / "3rdparty" / "tvm" / "python"))
    tvm = importlib.import_module("tvm")
    gpu = types.SimpleNamespace(
        exist=True,
        max_shared_memory_per_block=48 * 1024,
        multi_processor_count=108,
        warp_size=32,
        compute_version="8.0",
    )
    tvm.runtime.cuda = lambda _index=0: gpu


def _mend_swizzle() -> None:
    """Rows of 1024 bits in shared memory are permuted by row % 16 for int8, past their end; right is row % 8."""
    layout = importlib.import_module("tilelang.intrinsics.mma_layout")
    original = layout.get_swizzle_layout

    def swizzle(row: object, column: object, row_size: int, dtype: object) -> tuple[object, object]:
        bits = layout.DataType(dtype).bits if isinstance(dtype, str) else dtype.bits
        _, mended = original(row % 8 if bits * int(row_size) % 1024 == 0 else row, column, row_size, dtype)
        return row, mended

    layout.get_swizzle_layout = swizzle


def mend_barriers(source: str) -> str:
    """Pipelined kernels copy into memory that other warps still read: puts the missing barrier before every copy.

    A copy is a group of `cp_async_gs`; one that follows a barrier, with nothing but copies between, needs none. Not
    only the loop over k has them: a loop of one iteration is unrolled away.
    """
    lines = source.split("\n")
    mended: list[str] = []
    safe = False
    for index, line in enumerate(lines):
        text = line.strip()
        if text.startswith("for (int ko"):
            safe = False
        elif _begins_copy(lines[index : index + 6]):
            if not safe:
                mended.append("__syncthreads();")
            safe = True
        elif text.startswith("__syncthreads"):
            safe = True
        elif text not in ("", "{", "}") and "cp_async" not in text:
            safe = False
        mended.append(line)
    return "\n".join(mended)


def _begins_copy(lines: list[str]) -> bool:
    """Whether a copy begins here: itself, or the loop or condition around it, which the barrier must precede."""
    for line in lines:
        text = line.strip()
        if "tl::cp_async_gs" in text:
            return True
        if not text.startswith(("#pragma unroll", "for (", "if (")):
            return False
    return False
