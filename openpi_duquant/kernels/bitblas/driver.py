"""Kernels on the GPU: machine code is loaded and launched through CUDA's driver, on torch's context and stream."""

import ctypes
import functools
from typing import NamedTuple

import torch

from openpi_duquant.config import DuQuantError

_NO_CONTEXT = 201
_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def version() -> tuple[int, int]:
    """The version of CUDA that the driver here is for."""
    number = ctypes.c_int()
    _check(_cuda().cuDriverGetVersion(ctypes.byref(number)), "asking the driver for its version")
    return number.value // 1000, number.value % 1000 // 10


def _check(status: int, doing: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise DuQuantError(f"CUDA error {status} ({reason}) {doing}")


class Kernel(NamedTuple):
    """A matmul kernel, loaded on one device.

    Attributes:
        function: Its handle.
        device: Index of the device.
        rows: Tokens a block.
        columns: Out channels a block.
        threads: Threads a block.
        shared_memory: Bytes of dynamic shared memory a block.
    """

    function: ctypes.c_void_p
    device: int
    rows: int
    columns: int
    threads: int
    shared_memory: int

    def __call__(self, a: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Launches out [M, N] = a [M, K] . weight [N, ...]^T on the current stream; all contiguous, on the device."""
        m, n = out.shape
        tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, weight, out)]
        arguments = (*tensors, ctypes.c_int(m))
        pointers = (ctypes.c_void_p * 4)(*map(ctypes.addressof, arguments))
        grid = n // self.columns, -(-m // self.rows), 1
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        launch = self.function, *grid, self.threads, 1, 1, self.shared_memory, stream, pointers, None
        status = _cuda().cuLaunchKernel(*launch)
        if status == _NO_CONTEXT:  # the first call of a thread that has not used CUDA yet
            _enter_context(self.device)
            status = _cuda().cuLaunchKernel(*launch)
        _check(status, "launching a kernel of BitBLAS")


def _enter_context(device: int) -> None:
    """Makes the context that torch uses on a device the thread's."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_cuda().cuInit(0), "starting the driver")
    _check(_cuda().cuDeviceGet(ctypes.byref(handle), device), f"asking for device {device}")
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"using device {device}")
    _check(_cuda().cuCtxSetCurrent(context), f"using device {device}")


def load(code: bytes, name: str, launch: dict[str, int], device: int) -> Kernel:
    """Loads machine code onto a device, to stay there.

    Args:
        code: A cubin.
        name: Of the kernel in it.
        launch: Fields of `Kernel`, from `rows` on.
        device: Index of the device.

    Raises:
        DuQuantError: If the driver refuses it.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _enter_context(device)
        _check(_cuda().cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
        _check(_cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"loading {name}")
        size = launch["shared_memory"]
        _check(_cuda().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_MEMORY, size), f"giving {name} {size} bytes")
    return Kernel(function, device, launch["rows"], launch["columns"], launch["threads"], size)
