"""The kernels of `transform.fused_transform`: prologue, permutation, rotation and rounding to int8 in one launch.

Many rows that are rotated by matrices take three: every block of them is a program's, whatever row it is of.
"""

import torch
from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels.reference import NORM_EPS
from openpi_duquant.kernels.rows_triton import gated
from openpi_duquant.kernels.rows_triton import largest_of
from openpi_duquant.kernels.rows_triton import modulate
from openpi_duquant.kernels.rows_triton import read_modulation
from openpi_duquant.kernels.rows_triton import rotate
from openpi_duquant.kernels.rows_triton import rounded
from openpi_duquant.kernels.rows_triton import scale_of
from openpi_duquant.kernels.rows_triton import transform_rows

_ROWS = 64  # of a program that multiplies by a matrix on the tensor cores
_FEW_ROWS = 64  # up to which a program has one row, and many blocks of it at a time
_ENTRIES = 2**14  # of matrices that it multiplies by at a time
_MANY_ROWS = 264  # two for every SM of a large GPU: from here on throughput counts, below it latency
_FLAT = 64  # channels that a row without a rotation is cut into


def launch(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    hadamard: int,
    outputs: tuple[Tensor, Tensor, Tensor],
    *,
    geglu: bool,
    norm: bool,
    float32: bool,
) -> None:
    """Fills codes [M, K] int8, act_scale [M, 1] fp32 and row_sum [M, 1] int32; arguments as `fused_transform`.

    `float32` multiplies rotations in fp32 throughout, which operands of 16 bits do not need.
    """
    codes, act_scale, row_sum = outputs
    m, k = codes.shape
    if matrices is not None and m > _FEW_ROWS:
        if geglu or norm:
            given, x = x.contiguous(), x.new_empty(m, k)
            launch_prologue(x, given, scale, shift, geglu=geglu, norm=norm)
        x = _rotated(x, permutation, matrices.contiguous(), float32=float32)
        scale = shift = permutation = matrices = None
        geglu = norm = False
    common = {
        "GEGLU": geglu, "NORM": norm, "SCALE": scale is not None, "SHIFT": shift is not None,
        "PERMUTE": permutation is not None, "EPS": NORM_EPS, "K": k,
    }  # fmt: skip
    if matrices is not None:
        block = matrices.shape[-1]
        blocks = min(_ENTRIES // block**2, _power_from(k // block))
        _by_block[(m,)](
            x, scale, shift, permutation, matrices.contiguous(), codes, act_scale, row_sum, x.stride(0), BLOCKS=blocks,
            B=block, **common, num_warps=8,
        )  # fmt: skip
        return
    many = m >= _MANY_ROWS
    rows = 2 if many and k <= 4096 else 1
    block = hadamard or _FLAT
    _by_row[(-(-m // rows),)](
        x, scale, shift, permutation, codes, act_scale, row_sum, m, x.stride(0),
        ROWS=rows, BLOCKS=_power_from(-(-k // block)), B=block, HADAMARD=hadamard > 0,
        BUTTERFLY=not many and not float32, FLOAT32=float32, **common, num_warps=4 if many and k <= 4096 else 8,
    )  # fmt: skip


def launch_prologue(
    out: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, *, geglu: bool, norm: bool
) -> None:
    """Fills out [..., K] from x [..., K], or [..., 2 K] for GeGLU; scale and shift [K]; all contiguous."""
    k = out.shape[-1]
    padded = _power_from(k)
    _prologue[(out.numel() // k,)](
        out, x, scale, shift, GEGLU=geglu, NORM=norm, SCALE=scale is not None, SHIFT=shift is not None, EPS=NORM_EPS,
        K=k, PADDED=padded, num_warps=min(max(padded // 512, 1), 16),
    )  # fmt: skip


def _power_from(number: int) -> int:
    """The smallest power of two that is not less; triton.next_power_of_2 and triton.cdiv cost the host 1.5 us each."""
    return 1 << (number - 1).bit_length()


def _rotated(x: Tensor, permutation: Tensor | None, matrices: Tensor, *, float32: bool) -> Tensor:
    """x [M, K], permuted and rotated, fp32."""
    (m, k), block = x.shape, matrices.shape[-1]
    out = x.new_empty(m, k, dtype=torch.float32)
    _rotate_blocks[(-(-m // _ROWS), k // block)](
        out, x, permutation, matrices, m, x.stride(0), ROWS=_ROWS, B=block, PERMUTE=permutation is not None,
        FLOAT32=float32, K=k, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _by_row(
    x_ptr, scale_ptr, shift_ptr, permutation_ptr, codes_ptr, act_scale_ptr, row_sum_ptr, M, x_stride,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr, HADAMARD: tl.constexpr, BUTTERFLY: tl.constexpr,
    GEGLU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, PERMUTE: tl.constexpr,
    FLOAT32: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """No rotation, or a Hadamard. A program has one row or two in registers: x is read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCKS * B)[None, :]
    channel = tl.load(permutation_ptr + k, mask=k < K, other=0) if PERMUTE else k
    scale, shift = read_modulation(scale_ptr, shift_ptr, channel, k < K, SCALE, SHIFT)
    x = gated(x_ptr + row[:, None] * x_stride, channel, (row < M)[:, None] & (k < K), K, GEGLU)
    transform_rows(
        row, x, scale, shift, codes_ptr, act_scale_ptr, row_sum_ptr, M, ROWS, BLOCKS, B, HADAMARD, BUTTERFLY, NORM,
        SHIFT, FLOAT32, EPS, K, ROW_SUM=True,
    )  # fmt: skip


@triton.jit
def _rotate_row(x, rotation_ptr, block, N, BLOCKS: tl.constexpr, B: tl.constexpr):
    """A row x [1, BLOCKS * B] times the matrices of its blocks, the first of them `block` of N; without tensor cores,
    in fp32."""
    block, i, j = block + tl.arange(0, BLOCKS), tl.arange(0, B), tl.arange(0, B)
    at = block[:, None, None] * (B * B) + i[None, :, None] * B + j[None, None, :]
    matrices = tl.load(rotation_ptr + at, mask=(block < N)[:, None, None], other=0.0).to(tl.float32)
    x = tl.reshape(x.to(tl.float32), (BLOCKS, B))
    return tl.reshape(tl.sum(x[:, :, None] * matrices, 1), (1, BLOCKS * B))


@triton.jit
def _by_block(
    x_ptr, scale_ptr, shift_ptr, permutation_ptr, rotation_ptr, codes_ptr, act_scale_ptr, row_sum_ptr, x_stride,
    BLOCKS: tl.constexpr, B: tl.constexpr, GEGLU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, PERMUTE: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A matrix for every block. A program has a row and goes through its blocks, some at a time: once to find the
    largest value, once to round; with a norm, once before to find the mean square."""
    WIDTH: tl.constexpr = BLOCKS * B
    PADDED: tl.constexpr = (K + WIDTH - 1) // WIDTH * WIDTH
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lane = tl.arange(0, WIDTH)[None, :]
    x_row = x_ptr + row[:, None] * x_stride
    inverse_rms = tl.full((1, 1), 1.0, tl.float32)
    if NORM:
        square = tl.zeros((1,), tl.float32)
        for start in range(0, K, WIDTH):
            k = start + lane
            x = gated(x_row, k, k < K, K, GEGLU).to(tl.float32)
            square += tl.sum(x * x, 1)
        inverse_rms = tl.rsqrt(square / K + EPS)[:, None]
    largest = tl.zeros((1,), tl.int32)
    act_scale = tl.full((1,), 1.0, tl.float32)
    row_sum = tl.zeros((1,), tl.int32)
    for step in range(0, 2 * PADDED, WIDTH):
        start = step % PADDED
        k = start + lane
        channel = tl.load(permutation_ptr + k, mask=k < K, other=0) if PERMUTE else k
        scale, shift = read_modulation(scale_ptr, shift_ptr, channel, k < K, SCALE, SHIFT)
        x = gated(x_row, channel, k < K, K, GEGLU)
        if NORM:
            x = modulate(x, inverse_rms, scale, shift)
        y = _rotate_row(x, rotation_ptr, start // B, K // B, BLOCKS, B)
        if step < PADDED:
            largest = tl.maximum(largest, largest_of(y))
            act_scale = scale_of(largest, 1.0)
        else:
            codes = rounded(y, (1.0 / act_scale)[:, None])
            tl.store(codes_ptr + row[:, None] * K + k, codes, mask=k < K)
            row_sum += tl.sum(codes.to(tl.int32), 1)
    tl.store(act_scale_ptr + row, act_scale)
    tl.store(row_sum_ptr + row, row_sum)


@triton.jit
def _prologue(
    out_ptr, x_ptr, scale_ptr, shift_ptr, GEGLU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A row, in registers."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    scale, shift = read_modulation(scale_ptr, shift_ptr, k, k < K, SCALE, SHIFT)
    x = gated(x_ptr + row * (2 * K if GEGLU else K), k, k < K, K, GEGLU)
    if NORM:
        y = x.to(tl.float32)
        x = modulate(x, tl.rsqrt(tl.sum(y * y) / K + EPS), scale, shift)
    tl.store(out_ptr + row * K + k, x, mask=k < K)


@triton.jit
def _rotate_blocks(
    out_ptr, x_ptr, permutation_ptr, rotation_ptr, M, x_stride, ROWS: tl.constexpr, B: tl.constexpr,
    PERMUTE: tl.constexpr, FLOAT32: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One block of some rows times its matrix, in fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block, lane = tl.program_id(1), tl.arange(0, B)
    k, known = block * B + lane, (row < M)[:, None]
    channel = tl.load(permutation_ptr + k) if PERMUTE else k
    x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=known, other=0.0)
    matrix = tl.load(rotation_ptr + block * (B * B) + lane[:, None] * B + lane[None, :])
    tl.store(out_ptr + row[:, None] * K + k[None, :], rotate(x, matrix, FLOAT32), mask=known)
