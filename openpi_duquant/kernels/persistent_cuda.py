"""`persistent` for the action expert of pi0 and pi0.5 on Hopper, whose blocks reach each other's shared memory.

The kernel is in persistent.cu; NVRTC, which comes with torch, compiles it when a policy first needs it.
"""

import ctypes
import functools
import logging
import math
import pathlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import driver
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.reference import NORM_EPS

if TYPE_CHECKING:
    from openpi_duquant.kernels.persistent import Stack

_SOURCE = pathlib.Path(__file__).with_name("persistent.cu")
_KERNEL = "run_layers"
_CLUSTER, _WARPS, _KEYS = 8, 16, 128
_ROWS = 16  # tokens that the tensor cores take at a time
_SEGMENT = 64  # bytes of a weight's row that are laid down together
_MOST_CLUSTERS, _FEWEST_CLUSTERS = 16, 10  # fewer have no room for their share of the weights
_FEW_CLUSTERS = 12  # have none for the sums of eight parts of the channels
_SHARED_MEMORY = 227 * 1024
_WIDTH, _MLP, _HEADS, _HEAD = 1024, 4096, 8, 256  # of Gemma 300M
_LARGEST_BLOCK = 128  # of a Hadamard: what one warp has
_ARRAYS = 16  # of a layer: buffers, three of each matrix, norms, keys, values

_logger = logging.getLogger(__name__)


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "permutation")]


class _Array(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("bytes", ctypes.c_uint)]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "buffers")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norms", "visible", "cos", "sin")),
        ("arrays", _Array * _ARRAYS),
        *((name, ctypes.c_int) for name in ("layers", "prefix", "state_first")),
    ]


def takes(x: Tensor, stack: "Stack", keys: Tensor) -> bool:
    """Whether the kernel runs these layers here: in bf16, of Gemma 300M, with at most 1,024 keys; on Hopper."""
    sizes = *stack.o.weight.shape[1:], stack.gate_up.weight.shape[1], keys.shape[-1]
    blocks = [matrix.hadamard for matrix in stack[:4]]
    return (
        x.dtype == torch.bfloat16
        and sizes == (_WIDTH, _HEADS * _HEAD // 2, 2 * _MLP, _HEAD)
        and max(blocks) <= _LARGEST_BLOCK
        and keys.shape[2] + x.shape[1] <= _CLUSTER * _KEYS
        and _kernel_for(x, stack) is not None
    )


def launch(
    x: Tensor,
    stack: "Stack",
    norms: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    state_first: bool,
) -> Tensor:
    """What the layers make of x [B, S, W]; arguments as `persistent.run_layers`, contiguous."""
    function, clusters = _kernel_for(x, stack)
    (batch, length, _), (layers, _, prefix, _) = x.shape, keys.shape
    numbers = (2 * _HEADS + 2) * _HEAD + _MLP + 2 * _WIDTH
    buffers = x.new_empty(layers, batch * length * numbers)
    buffers.view(torch.int16).fill_(-1)  # no number that the kernel computes
    most_keys = math.ceil((prefix + length) / _CLUSTER / _ROWS) * _ROWS  # of a block, as the kernel counts
    boxes = [(part.flatten(0, 1).view(torch.uint8), most_keys, 128) for part in (keys, values)]
    columns = math.ceil(_WIDTH / 8 / clusters) * 8  # of a cluster
    boxes += [(matrix.weight, columns, _SEGMENT) for matrix in (stack.o, stack.down)]
    maps = [driver.tensor_map(*box) for box in boxes]
    maps = (type(maps[0]) * len(maps))(*maps)
    matrices = (_Matrix(*map(_address, matrix[:3])) for matrix in stack[:4])
    tensors = map(_address, (norms, visible, cos, sin))
    sizes = layers, prefix, state_first
    of_layers = buffers, *(part for matrix in stack[:4] for part in matrix[:3]), norms, keys, values
    arrays = (_Array * _ARRAYS)(*((part.data_ptr(), part.nbytes // layers) for part in of_layers if part is not None))
    arguments = _Arguments(*map(_address, (x, buffers)), *matrices, *tensors, arrays, *sizes)
    function((clusters * _CLUSTER, 1, 1), 32 * _WARPS, [arguments, maps], cooperative=True)
    return buffers[-1, -x.numel() :].view_as(x)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernel_for(x: Tensor, stack: "Stack") -> tuple[driver.Function, int] | None:
    rotated = stack.qkv, stack.gate_up, stack.down
    blocks = tuple(matrix.hadamard for matrix in rotated)
    permuted = tuple(matrix.permutation is not None for matrix in rotated)
    return _kernel(x.device, blocks, permuted, tuple(x.shape[:2]), adaptive=stack.norms is None)


@functools.cache
def _kernel(
    device: torch.device, blocks: tuple[int, ...], permuted: tuple[bool, ...], shape: tuple[int, ...], *, adaptive: bool
) -> tuple[driver.Function, int] | None:
    """The kernel, and how many clusters it runs in; None, and why, where it does not run."""
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < _SHARED_MEMORY:
        return None
    constants = {
        "BATCH": shape[0], "LENGTH": shape[1], "CLUSTER": _CLUSTER, "WARPS": _WARPS, "KEYS": _KEYS, "WIDTH": _WIDTH,
        "MLP": _MLP, "HEADS": _HEADS, "HEAD": _HEAD, "ARRAYS": _ARRAYS, "ADAPTIVE": int(adaptive),
        "EPS": f"{NORM_EPS}f", "SCALE": f"{_HEAD**-0.5 * math.log2(math.e)}f", "SHARED_MEMORY": _SHARED_MEMORY,
    }  # fmt: skip
    for name, block, by_index in zip(("QKV", "UP", "DOWN"), blocks, permuted, strict=True):
        constants |= {f"{name}_BLOCK": block, f"{name}_PERMUTED": int(by_index)}
    clusters = _MOST_CLUSTERS
    try:
        while True:  # GPUs differ in how many clusters they have room for
            macros = constants | {"CLUSTERS": clusters, "WIDE_PARTS": 4 if clusters <= _FEW_CLUSTERS else 8}
            code = driver.compile_source(_SOURCE.name, _SOURCE.read_text(), architecture(device), macros)
            function = driver.load(code, _KERNEL, _SHARED_MEMORY, device.index)
            fitting = function.most_clusters(_CLUSTER, 32 * _WARPS)
            if fitting >= clusters:
                return function, clusters
            if fitting < _FEWEST_CLUSTERS:
                blocks = f"clusters of {_CLUSTER} blocks"
                raise DuQuantError(f"this GPU has room for {fitting} {blocks}, it takes {_FEWEST_CLUSTERS}")
            clusters = fitting
    except DuQuantError as error:
        _logger.warning("the expert runs without the kernel made for Hopper: %s", error)
        return None
