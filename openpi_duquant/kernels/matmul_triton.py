"""The kernel of `triton_matmul`: int8 x int4 or int8 -> int32 -> scales, output restore, bias, epilogue; one launch.

A byte of the repacked int4 weight holds channels k and k + K/2, so that its nibbles multiply contiguous activations.
They are moved to the high half of a byte, which keeps their sign, and the sums are shifted back by 4.
"""

import torch
from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels.blocks_triton import block_diagonal
from openpi_duquant.kernels.rotary_triton import turn
from openpi_duquant.kernels.rows_triton import geglu_of
from openpi_duquant.kernels.tiles import Tile


def launch(
    out: Tensor,
    a: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    matrices: Tensor | None,
    hadamard: int,
    cos: Tensor | None,
    sin: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    tile: Tile,
    *,
    geglu: bool = False,
    interpreted: bool = False,
) -> None:
    """Fills out [M, N], or [M, N / 2] with GeGLU, which nothing follows and no rotation precedes; arguments as
    `triton_matmul.matmul`, contiguous, the rotation as matrices or by its size."""
    (m, k), n = a.shape, len(weight)
    block = hadamard if matrices is None else matrices.shape[-1]
    if matrices is not None:
        matrices = matrices.contiguous()
    if block:  # the rotation of a tile's columns takes shared memory too
        tile = tile._replace(rows=min(tile.rows, 64), columns=64)
    head = n if geglu else 0  # gate | up are the halves of one
    if cos is not None:
        head = cos.shape[-1]
        tile = tile._replace(columns=min(tile.columns, head))
    _matmul[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        a, act_scale, weight, weight_scale, bias, matrices, cos, sin, residual, gate, out, m, n, k,
        BM=tile.rows, BN=tile.columns, BK=tile.channels, GROUP=tile.group, K=weight.shape[1],
        INT4=weight.shape[1] < k, BIAS=bias is not None, HADAMARD=hadamard > 0, BLOCK=block,
        GAIN=hadamard**-0.5 if hadamard else 1.0, HEAD=head, GEGLU=geglu, RESIDUAL=residual is not None,
        GATE=gate is not None, EXACT=interpreted or out.dtype == torch.float32, INTERPRETED=interpreted,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _signed(packed, HIGH: tl.constexpr, INTERPRETED: tl.constexpr):
    """16 times the low or high nibbles of bytes, int8; four bytes at a time."""
    if INTERPRETED:
        nibbles = ((packed if HIGH else packed << 4) & 0xF0).to(tl.int8, bitcast=True)
    elif HIGH:
        nibbles = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        nibbles = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return nibbles


@triton.jit
def _pairs(start, BN: tl.constexpr, HEAD: tl.constexpr):
    """Columns of the tile that begins at `start` where heads are turned, or gated: j and j + 1 hold channels i and
    i + HEAD / 2, which belong together, so that a tile has as many of a head's first half as of its second."""
    j = tl.arange(0, BN)
    return start // HEAD * HEAD + start % HEAD // 2 + j // 2 + j % 2 * (HEAD // 2)


@triton.jit
def columns_of(start, BN: tl.constexpr, HEAD: tl.constexpr):
    """Columns of the tile that begins at `start`."""
    return _pairs(start, BN, HEAD) if HEAD > 0 else start + tl.arange(0, BN)


@triton.jit
def first_of_pairs(start, BN: tl.constexpr, HEAD: tl.constexpr):
    """Of the columns `_pairs` those in first halves, [BN / 2]; next to each other, which the compiler must be told."""
    in_head = tl.multiple_of(start % HEAD // 2, BN // 2)
    return tl.multiple_of(start // HEAD * HEAD, HEAD) + in_head + tl.arange(0, BN // 2)


@triton.jit
def read_angles(cos_ptr, sin_ptr, m, M, start, N, BN: tl.constexpr, HEAD: tl.constexpr):
    """Cosines and sines [BM, BN / 2] of the columns `_pairs`; of the last head those of no angle."""
    column = tl.multiple_of(start % HEAD // 2, BN // 2) + tl.arange(0, BN // 2)
    at = m.to(tl.int64)[:, None] * HEAD + column[None, :]
    turns = (m < M)[:, None] & (first_of_pairs(start, BN, HEAD) < N - HEAD)[None, :]
    cos = tl.load(cos_ptr + at, mask=turns, other=1.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=turns, other=0.0).to(tl.float32)


@triton.jit
def turned(y, cos, sin, BM: tl.constexpr, BN: tl.constexpr):
    """y [BM, BN] of the columns `_pairs`, turned: those of first halves and of second, [BM, BN / 2] each."""
    first, second = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
    return turn(first, second, cos, sin)


@triton.jit
def _matmul(
    a_ptr, act_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, matrices_ptr, cos_ptr, sin_ptr, residual_ptr,
    gate_ptr, out_ptr, M, N, a_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, INT4: tl.constexpr,
    BIAS: tl.constexpr, HADAMARD: tl.constexpr, BLOCK: tl.constexpr, GAIN: tl.constexpr, HEAD: tl.constexpr,
    GEGLU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] a program; K counts the stored columns of the weight. Sums are [BN, BM]: weights come from
    registers, which the tensor cores take on the left."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m = (first + pid % (GROUP * tiles_n) % height) * BM + tl.arange(0, BM)
    start_n = pid % (GROUP * tiles_n) // height * BN
    n = columns_of(start_n, BN, HEAD)
    k = tl.arange(0, BK)
    known_m, known_n = m < M, n < N
    a_tile = a_ptr + m.to(tl.int64)[None, :] * a_stride + k[:, None]
    w_rows = weight_ptr + tl.where(known_n, n, 0).to(tl.int64) * K
    w_tile = w_rows[:, None] + k[None, :]
    sums = tl.zeros((BN, BM), tl.int32)
    for start in range(0, K, BK):
        if K % BK == 0:  # noqa: SIM108
            w = tl.load(w_tile)
        else:
            w = tl.load(w_tile, mask=(start + k < K)[None, :], other=0)
        inside_a = known_m[None, :] & (start + k < K)[:, None]  # rows that are not would be one line, for all programs
        a = tl.load(a_tile, mask=inside_a, other=0)
        if INT4:
            sums = tl.dot(_signed(w, HIGH=False, INTERPRETED=INTERPRETED), a, sums, out_dtype=tl.int32)
            a = tl.load(a_tile + K, mask=inside_a, other=0)
            sums = tl.dot(_signed(w, HIGH=True, INTERPRETED=INTERPRETED), a, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(w, a, sums, out_dtype=tl.int32)
        w_tile += BK
        a_tile += BK
    sums = (sums >> 4 if INT4 else sums).T
    y = sums.to(tl.float32) * tl.load(weight_scale_ptr + n, mask=known_n, other=0.0)[None, :]
    y *= tl.load(act_scale_ptr + m, mask=known_m, other=0.0)[:, None]
    if BLOCK > 0:
        rotation = block_diagonal(matrices_ptr, n, N, BN, BLOCK, HADAMARD)
        y = tl.dot(y, rotation, input_precision="ieee" if EXACT else "tf32x3") * GAIN
    if BIAS:
        y += tl.load(bias_ptr + n, mask=known_n, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        gate, up = tl.split(tl.reshape(y.to(out_ptr.dtype.element_ty), (BM, BN // 2, 2)))
        y = geglu_of(gate, up)
        n, N = start_n // 2 + tl.arange(0, BN // 2), N // 2
    elif HEAD > 0:
        cos, sin = read_angles(cos_ptr, sin_ptr, m, M, start_n, N, BN, HEAD)
        y, second = turned(y, cos, sin, BM, BN)
        if RESIDUAL:
            y = tl.reshape(tl.join(y, second), (BM, BN))
        else:
            n = first_of_pairs(start_n, BN, HEAD)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = known_m[:, None] & (n < N)[None, :]
    if HEAD > 0 and not (GEGLU or RESIDUAL):
        tl.store(out_ptr + at + HEAD // 2, second.to(out_ptr.dtype.element_ty), mask=inside)
    if RESIDUAL:
        if GATE:
            y *= tl.load(gate_ptr + n, mask=known_n, other=0.0).to(tl.float32)[None, :]
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def read_weights(weight_ptr, n, N, part, K: tl.constexpr, PART: tl.constexpr):
    """Of rows n [BN] of the weight, K bytes each, part `part` of PART bytes: [BN, PART]; zeros from row N on."""
    at = weight_ptr + n.to(tl.int64)[:, None] * K + part * PART + tl.arange(0, PART)[None, :]
    return tl.load(at, mask=(n < N)[:, None], other=0)


@triton.jit
def sums_of(w, a_ptr, m, M, part, K: tl.constexpr, PART: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sums [BM, BN] int32, over the channels of that part, of int4 weights, see `read_weights`, and rows m of
    a [M, 2 K]."""
    k = part * PART + tl.arange(0, PART)
    at, known = a_ptr + m[None, :] * (2 * K) + k[:, None], (m < M)[None, :]
    low, high = tl.load(at, mask=known, other=0), tl.load(at + K, mask=known, other=0)
    sums = tl.dot(_signed(w, HIGH=False, INTERPRETED=INTERPRETED), low, out_dtype=tl.int32)
    sums = tl.dot(_signed(w, HIGH=True, INTERPRETED=INTERPRETED), high, sums, out_dtype=tl.int32)
    return (sums >> 4).T
