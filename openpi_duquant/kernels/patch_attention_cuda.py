"""`patch_attention` on Hopper, in CUDA.

The kernel is in patch_attention.cu; NVRTC, which comes with torch, compiles it when a policy first needs it.
"""

import ctypes
import functools
import math
import pathlib

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.kernels import driver
from openpi_duquant.kernels import wgmma
from openpi_duquant.kernels.backend import architecture

_SOURCE = pathlib.Path(__file__).with_name("patch_attention.cu")
_PATCHES, _QUERIES, _CHANNELS, _THREADS = 256, 64, 72, 128  # as in patch_attention.cu
_SHARED_MEMORY = (_QUERIES + 2 * _PATCHES) * (128 + 2 * 16) + 2 * 8  # struct Memory
_LARGEST_DIFFERENCE = 1e-2  # of the result: two roundings to bf16, of weights and of the result


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel makes this here: 256 patches, heads of 72 channels, in bf16; on Hopper. Arguments as
    `patch_attention.attend_patches`."""
    _, patches, _, channels = q.shape
    return (
        q.dtype == torch.bfloat16
        and (patches, channels) == (_PATCHES, _CHANNELS)
        and all(x.stride()[2:] == (channels, 1) for x in (q, k, v))
        and all(x.data_ptr() % 16 == x.stride(0) % 8 == x.stride(1) % 8 == 0 for x in (q, k, v))
        and architecture(q.device) == "sm_90"
        and _kernel(q.device) is not None
    )


def launch(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Fills out [B, P, H, D], of what the kernel `takes`; other arguments as `patch_attention.attend_patches`."""
    _run(_kernel(q.device), out, q, k, v)


def _run(function: driver.Function, out: Tensor, *operands: Tensor) -> None:
    images, _, heads, _ = out.shape
    rows = [x.flatten(2).view(torch.uint8) for x in operands]
    boxes = list(zip(rows, (_QUERIES, _PATCHES, _PATCHES), strict=True))
    maps = [driver.tensor_map(x, box, columns) for columns in (128, 16) for x, box in boxes]
    arguments = [(type(maps[0]) * len(maps))(*maps), ctypes.c_void_p(out.data_ptr()), ctypes.c_int(heads)]
    function((_PATCHES // _QUERIES * heads * images, 1, 1), _THREADS, arguments)


@functools.cache
def _kernel(device: torch.device) -> driver.Function | None:
    """The kernel, once it has made what torch's makes of small data; None, and a warning, where it does not."""
    constants = {"SCALE": f"{_CHANNELS**-0.5 * math.log2(math.e)}f"}

    def fault(function: driver.Function) -> str | None:
        error = _difference(function, device)
        return None if error < _LARGEST_DIFFERENCE else f"it differs from torch's by {error:.2g}"

    code = driver.Source(_SOURCE.name, source(), "attend_patches")
    return driver.load_tested(code, constants, _SHARED_MEMORY, device, fault, "patches are attended to")


def _difference(function: driver.Function, device: torch.device) -> float:
    """How far the kernel is from torch's attention in fp32, on random data."""
    random = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 2, _PATCHES, 2, _CHANNELS, generator=random, device=device).bfloat16()
    made = torch.empty_like(q)
    _run(function, made, q, k, v)
    expected = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return ((made.float() - expected).norm() / expected.norm()).item()


def source() -> str:
    """patch_attention.cu, after its instructions: queries by keys, and weights by values, whose rows are keys."""
    keys = wgmma.multiply("float", _PATCHES // 2, "m64n256k16.f32.bf16.bf16", ", 1, 1, 0, 0", in_registers=False)
    values = (wgmma.multiply("float", n // 2, f"m64n{n}k16.f32.bf16.bf16", ", 1, 1, 1") for n in (64, 8))
    return "".join((keys, *values, _SOURCE.read_text()))
