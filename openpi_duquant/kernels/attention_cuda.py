"""`attention` of many tokens on Hopper, in CUDA: a cluster shares out the keys, and rounds in the same launch.

The kernel is in attention.cu; NVRTC, which comes with torch, compiles it when a policy first needs it.
"""

import ctypes
import functools
import math
import pathlib

import torch
from torch import Tensor

from openpi_duquant.kernels import driver
from openpi_duquant.kernels import wgmma
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.backend import processors_of

_SOURCE = pathlib.Path(__file__).with_name("attention.cu")
_HEADS, _HEAD, _TOKENS, _KEYS, _MOST_STEPS, _THREADS = 8, 256, 16, 64, 64, 256  # as in attention.cu
_FEWEST = 64  # tokens; fewer keep too few blocks busy
_MOST_PARTS = 4  # blocks of a cluster; a lane each
_SHARED_MEMORY = 200 * 1024  # what struct Memory has, and less than a KB
_LARGEST_DIFFERENCE = 2e-2  # of the result: int8 is rounded to 0.8% of it

Outputs = tuple[Tensor, Tensor, Tensor] | Tensor
"""Codes [B S, H D] int8, act_scale and row_sum [B S, 1]; or, not rounded, [B, S, H, D] in bf16."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("visible", "out", "act_scale", "row_sum")),
        *((name, ctypes.c_int) for name in ("tokens", "keys", "heights")),
    ]


def parts_for(tokens: int, keys: int, batch: int, processors: int) -> int:
    """Among how many blocks keys are shared out: as many as run at the same time.

    Args:
        tokens: Queries of an observation.
        keys: Of an observation.
        batch: Observations.
        processors: SMs; clusters of more than two blocks do not fit everywhere.
    """
    tiles, steps = math.ceil(tokens / _TOKENS) * batch, math.ceil(keys / _KEYS)
    for parts in range(min(_MOST_PARTS, steps), 1, -1):
        if tiles * parts <= (processors if parts == 2 else processors * 10 // 11):
            return parts
    return 1


def takes(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, *, rounded: bool) -> bool:
    """Whether the kernel makes this here: many tokens and keys that are all given, in bf16, of Gemma's heads; on
    Hopper. Arguments as `attention.attend`."""
    (batch, tokens, heads, size), keys = q.shape, k.shape[1]
    return (
        own_k is None
        and (heads, size) == (_HEADS, _HEAD)
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and tokens > _FEWEST
        and 0 < keys <= _MOST_STEPS * _KEYS
        and q.stride()[2:] == (size, 1)
        and (batch == 1 or q.stride(0) == tokens * q.stride(1))
        and all(x.stride(-1) == 1 and _aligned(x) for x in (q, k, v))
        and architecture(q.device) == "sm_90"
        and _kernel(q.device, _parts(q, k), rounded) is not None
    )


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:2])


def launch(out: Outputs, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
    """Fills the outputs, of what the kernel `takes`; arguments as `attention.attend`."""
    parts = _parts(q, k)
    _run(_kernel(q.device, parts, not isinstance(out, Tensor)), parts, out, q, k, v, visible)


def _parts(q: Tensor, k: Tensor) -> int:
    return parts_for(q.shape[1], k.shape[1], len(q), processors_of(q.device))


def _run(
    function: driver.Function, parts: int, out: Outputs, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None
) -> None:
    (batch, tokens, heads, _), keys = q.shape, k.shape[1]
    rows = q.as_strided((heads, batch * tokens, _HEAD), (_HEAD, q.stride(1), 1))
    maps = [driver.tensor_map(rows.view(torch.uint8), _TOKENS, 128, together=heads)]
    maps += (driver.tensor_map(x.view(torch.uint8), _KEYS, 128) for x in (k, v))
    heights = math.ceil(tokens / _TOKENS)
    outputs = (out, None, None) if isinstance(out, Tensor) else out
    pointers = (None if x is None else x.data_ptr() for x in (visible, *outputs))
    function((heights * batch * parts, 1, 1), _THREADS, [*maps, _Arguments(*pointers, tokens, keys, heights)])


@functools.cache
def _kernel(device: torch.device, parts: int, rounded: bool) -> driver.Function | None:  # noqa: FBT001
    """The kernel, once it has made what Triton's makes of small data; None, and a warning, where it does not."""
    constants = {"PARTS": parts, "ROUNDED": int(rounded), "SCALE": f"{_HEAD**-0.5 * math.log2(math.e)}f"}

    def fault(function: driver.Function) -> str | None:
        error = _difference(function, parts, device, rounded=rounded)
        return None if error < _LARGEST_DIFFERENCE else f"with {parts} parts it differs from Triton's by {error:.2g}"

    code = driver.Source(_SOURCE.name, source(), "attend")
    return driver.load_tested(code, constants, _SHARED_MEMORY, device, fault, "attention runs")


def _difference(function: driver.Function, parts: int, device: torch.device, *, rounded: bool) -> float:
    """How far the kernel is from Triton's, which is tested before, on random data no multiple of a tile."""
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415  triton is there where CUDA is
    from openpi_duquant.kernels import transform  # noqa: PLC0415  it imports kernels made for Hopper

    random = torch.Generator(device).manual_seed(0)
    tokens, keys = _TOKENS + 5, parts * 2 * _KEYS + 5
    q = torch.randn(2, tokens, _HEADS, _HEAD, generator=random, device=device).bfloat16()
    k, v = torch.randn(2, 2, keys, _HEAD, generator=random, device=device).bfloat16()
    visible = torch.rand(2, keys, generator=random, device=device) < 0.8
    expected = torch.empty_like(q)
    attention_triton.launch_attend(expected, q, k, v, visible, None, None, state_first=False, exact=False)
    made = transform.empty(q, 2 * tokens, _HEADS * _HEAD) if rounded else torch.empty_like(q)
    _run(function, parts, made, q, k, v, visible)
    if not isinstance(made, Tensor):
        codes, act_scale, row_sum = made
        if not torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32)):
            return math.nan
        made = (codes * act_scale).view_as(q)
    return ((made.float() - expected.float()).norm() / expected.float().norm()).item()


def source() -> str:
    """attention.cu, after its instructions: queries by keys, and weights by values, whose rows are keys."""
    keys = wgmma.multiply("float", 32, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0, 0", in_registers=False)
    return keys + wgmma.multiply("float", 128, "m64n256k16.f32.bf16.bf16", ", 1, 1, 1") + _SOURCE.read_text()
