"""The Triton backend's large matmuls on Hopper, in CUDA: blocks stay, and copy ahead what they multiply next.

The kernel is in matmul.cu; NVRTC, which comes with torch, compiles it for the shapes that a policy has.
"""

import ctypes
import functools
import math
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from openpi_duquant.kernels import driver
from openpi_duquant.kernels import tiles
from openpi_duquant.kernels import wgmma
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.backend import processors_of

_SOURCE = pathlib.Path(__file__).with_name("matmul.cu")
_SMALLEST = 2**32  # multiplications; below, a block has too little to do to be worth its beginning
_SHARED_MEMORY = 227 * 1024 - 256  # but for what counts the stages
_MOST_PARTS = 8  # blocks of a cluster
_LARGEST_DIFFERENCE = 2e-3  # of the result: bf16 is rounded to 2e-3 of a number, but few of them the other way
_CHANNELS, _WARPS = 128, 8  # as in matmul.cu


class Shape(NamedTuple):
    """How a matmul [M, K] x [N, K] is cut up.

    Attributes:
        tokens: Of a tile, of M.
        rows: Of a tile, of N: 128 or 256.
        parts: Of K; a block each, in one cluster.
    """

    tokens: int
    rows: int
    parts: int


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("act_scale", "weight_scale", "residual", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "bytes")),
    ]


class _Macros(NamedTuple):
    """Of matmul.cu."""

    bits: int
    geglu: bool
    residual: bool


def shape_for(m: int, n: int, stored: int, bits: int, processors: int, *, geglu: bool) -> Shape:
    """The shape that takes the fewest cycles. A wgmma takes one for two tokens. As measured on an H200, operands that
    come too late cost as much as 24 more tokens; what follows takes 26 for a token and 128 rows; a block 4,000 to
    begin, another tile 1,000, and a cluster 4,500 to meet. L2 gives 4,100 bytes a cycle.

    Args:
        m: Tokens.
        n: Rows of the weight.
        stored: Bytes of such a row.
        bits: 4 or 8, of a weight.
        processors: SMs.
        geglu: Whether that follows; a tile then has 256 rows.
    """
    steps = math.ceil(stored / _CHANNELS)

    def cycles(shape: Shape) -> float:
        tiles = math.ceil(m / shape.tokens) * math.ceil(n / shape.rows)
        wgmmas = math.ceil(steps / shape.parts) * 4 * (8 // bits) * shape.rows // 64
        one = wgmmas * (shape.tokens + 24) / 2 + 26 * shape.tokens * shape.rows / 128 / shape.parts
        at_a_time = processors if shape.parts <= 2 else processors * 10 // 11  # clusters of more do not fit everywhere
        rounds = math.ceil(tiles * shape.parts / at_a_time)
        read = tiles * steps * _CHANNELS * (shape.rows + 8 // bits * shape.tokens)
        made = rounds * (one + 1000) + 3000 if shape.parts == 1 else rounds * (one + 8500)
        return max(made, read / 4100 + 4000)

    shapes = [Shape(tokens, 256, 1) for tokens in range(64, 145, 16)]
    if not geglu:
        shapes += [Shape(tokens, 128, 1) for tokens in range(64, 177, 16)]
        parts = range(2, min(_MOST_PARTS, steps) + 1)
        shapes += [Shape(tokens, 128, number) for tokens in range(64, 145, 16) for number in parts]
    return min(shapes, key=cycles)


def takes(
    out: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    matrices: Tensor | None,
    hadamard: int,
    cos: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    geglu: bool,
) -> bool:
    """Whether the kernel makes this here: a large matmul in bf16 with GeGLU, a residual or nothing after; on Hopper."""
    (m, k), (n, stored) = a.shape, weight.shape
    return (
        m * n * k >= _SMALLEST
        and bias is matrices is cos is gate is None
        and not hadamard
        and out.dtype == torch.bfloat16
        and (residual is None or residual.dtype == torch.bfloat16)
        and n % 8 == stored % 16 == weight.data_ptr() % 16 == a.data_ptr() % 16 == 0
        and architecture(a.device) == "sm_90"
        and _kernel(a.device, _shape(a, weight, geglu=geglu), _macros(a, weight, residual, geglu=geglu)) is not None
    )


def launch(
    out: Tensor,
    a: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    residual: Tensor | None,
    *,
    geglu: bool,
    shape: Shape | None = None,
) -> None:
    """Fills out [M, N], or [M, N / 2] with GeGLU, of what the kernel `takes`; other arguments as
    `triton_matmul.matmul`, contiguous."""
    shape = shape or _shape(a, weight, geglu=geglu)
    function = _kernel(a.device, shape, _macros(a, weight, residual, geglu=geglu))
    _run(function, shape, out, a, act_scale, weight, weight_scale, residual, geglu=geglu)


def _run(
    function: driver.Function,
    shape: Shape,
    out: Tensor,
    a: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    residual: Tensor | None,
    *,
    geglu: bool,
) -> None:
    (m, _), (n, stored) = a.shape, weight.shape
    halves = weight.view(2, n // 2, stored) if geglu else weight[None]  # gate and up
    pieces = a.unflatten(1, (-1, stored)).transpose(0, 1)
    weights = driver.tensor_map(halves, shape.rows // len(halves), _CHANNELS, together=len(halves))
    codes = driver.tensor_map(pieces, shape.tokens, _CHANNELS, together=len(pieces))
    tensors = (None if x is None else x.data_ptr() for x in (act_scale, weight_scale, residual, out))
    tiles = math.ceil(m / shape.tokens) * math.ceil(n / shape.rows)
    blocks = min(tiles, processors_of(a.device)) if shape.parts == 1 else tiles * shape.parts
    function((blocks, 1, 1), 32 * _WARPS, [weights, codes, _Arguments(*tensors, m, n, stored)])


def _macros(a: Tensor, weight: Tensor, residual: Tensor | None, *, geglu: bool) -> _Macros:
    return _Macros(4 if weight.shape[1] < a.shape[1] else 8, geglu, residual is not None)


def _shape(a: Tensor, weight: Tensor, *, geglu: bool) -> Shape:
    bits = 4 if weight.shape[1] < a.shape[1] else 8
    return _cached_shape(a.shape[0], *weight.shape, bits, processors_of(a.device), geglu=geglu)


_cached_shape = functools.cache(shape_for)


def memory_for(shape: Shape, bits: int) -> tuple[int, int]:
    """How many stages a block has, and bytes of shared memory for them."""
    stage = _CHANNELS * (shape.rows + 8 // bits * shape.tokens)
    stages = min(8, _SHARED_MEMORY // stage)
    return stages, stages * (stage + 16)


@functools.cache
def _kernel(device: torch.device, shape: Shape, macros: _Macros) -> driver.Function | None:
    """The kernel, once it has made what Triton's makes of small data; None, and a warning, where it does not."""
    stages, memory = memory_for(shape, macros.bits)
    given = {**macros._asdict(), **shape._asdict(), "stages": stages}
    constants = {name.upper(): int(value) for name, value in given.items()}

    def fault(function: driver.Function) -> str | None:
        error = _difference(function, shape, macros, device)
        return None if error < _LARGEST_DIFFERENCE else f"{shape} differs from Triton's by {error:.2g}"

    code = driver.Source(_SOURCE.name, source(shape.tokens), "matmul")
    return driver.load_tested(code, constants, memory, device, fault, "matmuls run")


def _difference(function: driver.Function, shape: Shape, macros: _Macros, device: torch.device) -> float:
    """How far the kernel is from Triton's, which is tested before, on random data no multiple of a tile."""
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415  triton is there where CUDA is

    random = torch.Generator(device).manual_seed(0)
    m, n, stored = shape.tokens + 3, shape.rows + 136, _CHANNELS * shape.parts + 32
    a = torch.randint(-127, 128, (m, stored * 8 // macros.bits), generator=random, device=device, dtype=torch.int8)
    weight = torch.randint(0, 256, (n, stored), generator=random, device=device, dtype=torch.uint8)
    weight = weight.view(torch.int8) if macros.bits == 8 else weight
    scales = (torch.rand(size, 1, generator=random, device=device) / 100 for size in (m, n))
    residual = torch.rand(m, n, generator=random, device=device).bfloat16() if macros.residual else None
    given = a, next(scales), weight, next(scales)
    made, expected = (a.new_empty(m, n // (1 + macros.geglu), dtype=torch.bfloat16) for _ in range(2))
    _run(function, shape, made, *given, residual, geglu=macros.geglu)
    tile = tiles.by_rule(m, n, stored)
    matmul_triton.launch(expected, *given, None, None, 0, None, None, residual, None, tile, geglu=macros.geglu)
    return ((made.float() - expected.float()).norm() / expected.float().norm()).item()


def source(tokens: int) -> str:
    """matmul.cu, after the instruction whose operands are as many as a thread has sums: tokens / 2."""
    return wgmma.multiply("int", tokens // 2, f"m64n{tokens}k32.s32.s8.s8") + _SOURCE.read_text()
