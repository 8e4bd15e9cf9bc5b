"""Kernels on the GPU, compiled, loaded and launched through CUDA's own libraries, on torch's context and stream."""

from collections.abc import Callable, Mapping, Sequence
import ctypes
import functools
import hashlib
import logging
import pathlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openpi_duquant.config import DuQuantError
from openpi_duquant.environment import cache_folder
from openpi_duquant.kernels.files import write_whole

_FOLDER = pathlib.Path(__file__).parent
_NO_CONTEXT = 201
_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION

_logger = logging.getLogger(__name__)


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC, CUDA's compiler as a library: through the part of torch that is linked with it, wherever it lies."""
    return ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))


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


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of three numbers."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads_x", "threads_y", "threads_z", "shared_memory")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("number", ctypes.c_uint),
    ]  # fmt: skip


class TensorMap(ctypes.Structure):
    """CUtensorMap: what Hopper's copy engine must know of a matrix."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


def tensor_map(matrices: Tensor, rows: int, columns: int, *, together: int = 1) -> TensorMap:
    """Describes boxes of matrices, swizzled in pieces of 16 bytes as rows of that many are; rows of one piece are not.

    Args:
        matrices: [P, M, K] of bytes, whose strides are multiples of 16 but the last.
        rows: Of a box, up to 256; those that a matrix does not have are zeros.
        columns: Of a box: 16, 32, 64 or 128 bytes.
        together: Matrices that a box is of.

    Raises:
        DuQuantError: If the driver refuses it.
    """
    size = ctypes.sizeof(TensorMap)
    room = ctypes.create_string_buffer(size + 64)
    start = -ctypes.addressof(room) % 64
    (number, m, k), three = matrices.shape, ctypes.c_uint32 * 3
    strides = (ctypes.c_uint64 * 2)(matrices.stride(1), matrices.stride(0))
    what = ctypes.c_void_p(matrices.data_ptr()), (ctypes.c_uint64 * 3)(k, m, number), strides
    box = three(columns, rows, together), three(1, 1, 1)
    swizzle, into_l2 = columns.bit_length() - 5, 3  # 16, 32, 64, 128 bytes are 0 to 3; 256 bytes at a time into L2
    encode = _cuda().cuTensorMapEncodeTiled
    status = encode(ctypes.byref(room, start), 0, 3, *what, *box, 0, swizzle, into_l2, 0)
    _check(status, f"describing {number} matrices {m} x {k}")
    return TensorMap.from_buffer(room, start)


class Function(NamedTuple):
    """A kernel, loaded on one device.

    Attributes:
        handle: Of the driver.
        device: Index of the device.
        shared_memory: Bytes of dynamic shared memory a block.
    """

    handle: ctypes.c_void_p
    device: int
    shared_memory: int

    def most_clusters(self, blocks: int, threads: int) -> int:
        """How many clusters of so many blocks run at the same time, on a GPU that does nothing else."""
        number, attribute = ctypes.c_int(), _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint * 16)(blocks, 1, 1))
        config = _Config(blocks, 1, 1, threads, 1, 1, self.shared_memory, None, ctypes.pointer(attribute), 1)
        operands = ctypes.byref(number), self.handle, ctypes.byref(config)
        _check(_cuda().cuOccupancyMaxActiveClusters(*operands), "asking how many clusters run at a time")
        return number.value

    def __call__(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], *, cooperative: bool = False
    ) -> None:
        """Launches it on torch's current stream.

        Args:
            grid: Numbers of blocks.
            threads: Of a block.
            arguments: As ctypes hold them.
            cooperative: Either all blocks run at the same time, or none.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        launch = _cuda().cuLaunchCooperativeKernel if cooperative else _cuda().cuLaunchKernel
        operands = self.handle, *grid, threads, 1, 1, self.shared_memory, stream, pointers
        operands = operands if cooperative else (*operands, None)
        status = launch(*operands)
        if status == _NO_CONTEXT:  # the first call of a thread that has not used CUDA yet
            _enter_context(self.device)
            status = launch(*operands)
        _check(status, "launching a kernel")


def _enter_context(device: int) -> None:
    """Makes the context that torch uses on a device the thread's."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_cuda().cuInit(0), "starting the driver")
    _check(_cuda().cuDeviceGet(ctypes.byref(handle), device), f"asking for device {device}")
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"using device {device}")
    _check(_cuda().cuCtxSetCurrent(context), f"using device {device}")


def load(code: bytes, name: str, shared_memory: int, device: int) -> Function:
    """Loads machine code onto a device, to stay there.

    Args:
        code: A cubin.
        name: Of the kernel in it.
        shared_memory: See `Function`.
        device: Index of the device.

    Raises:
        DuQuantError: If the driver refuses it.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _enter_context(device)
        _check(_cuda().cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
        _check(_cuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"loading {name}")
        giving = f"giving {name} {shared_memory} bytes"
        _check(_cuda().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_MEMORY, shared_memory), giving)
    return Function(function, device, shared_memory)


class Source(NamedTuple):
    """CUDA C++ of a kernel made for Hopper.

    Attributes:
        file: Its name, for messages.
        text: All of it; it includes files of this folder alone.
        kernel: The name of the kernel in it.
    """

    file: str
    text: str
    kernel: str


def load_tested(
    source: Source,
    constants: Mapping[str, int | str],
    shared_memory: int,
    device: torch.device,
    fault: Callable[[Function], str | None],
    others: str,
) -> Function | None:
    """Compiles a kernel, loads it, and sees whether it makes what it should.

    Args:
        source: Of the kernel.
        constants: Macros.
        shared_memory: See `Function`.
        device: Where it is to run.
        fault: What is wrong with what it makes, None for nothing.
        others: Who goes on without it, for the warning: "matmuls run".

    Returns:
        The kernel; None, after a warning that says why, where it does not work.
    """
    try:
        code = compile_source(source.file, source.text, "sm_90a", constants)
        function = load(code, source.kernel, shared_memory, device.index)
        wrong = fault(function)
        if wrong:
            raise DuQuantError(f"{wrong}; please report this line")
        return function
    except DuQuantError as error:
        _logger.warning("%s without the kernel made for Hopper: %s", others, error)
        return None


def compile_source(name: str, source: str, architecture: str, constants: Mapping[str, int | str]) -> bytes:
    """Compiles CUDA C++ to machine code; once, as long as nothing of it changes: the code is kept in the cache.

    Args:
        name: Of the source, for messages.
        source: It includes files of this folder alone.
        architecture: "sm_90".
        constants: Macros.

    Returns:
        A cubin.

    Raises:
        DuQuantError: If there is no compiler, or with what it says about the source.
    """
    try:
        nvrtc = _nvrtc()
    except OSError as error:
        raise DuQuantError(f"torch's libcaffe2_nvrtc.so cannot be loaded: {error}") from None
    options = [f"-arch={architecture}", "-std=c++17", *(f"-D{macro}={value}" for macro, value in constants.items())]
    kept = _place(name, source, options, nvrtc)
    if kept.exists():
        return kept.read_bytes()
    code = _compiled(name, source, options, nvrtc)
    try:
        write_whole(kept, code)
    except OSError as error:
        _logger.warning("%s cannot be kept compiled, the next start compiles it again: %s", name, error)
    return code


def _place(name: str, source: str, options: Sequence[str], nvrtc: ctypes.CDLL) -> pathlib.Path:
    """The file of a source's machine code."""
    version = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(*map(ctypes.byref, version))
    headers = [path.read_text() for path in sorted(_FOLDER.glob("*.cuh"))]
    what = source, headers, options, [number.value for number in version]
    return cache_folder() / "cuda" / f"{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.cubin"


def _compiled(name: str, source: str, options: Sequence[str], nvrtc: ctypes.CDLL) -> bytes:
    options = [*options, f"-I{_FOLDER}"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    named = ctypes.byref(program), source.encode(), name.encode(), 0, None, None
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCreateProgram(*named) or nvrtc.nvrtcCompileProgram(program, len(options), given)
    what = "ProgramLog" if status else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, result)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise DuQuantError(f"{name} does not compile with {options[0]}: {result.value.decode().strip()}")
    return result.raw
