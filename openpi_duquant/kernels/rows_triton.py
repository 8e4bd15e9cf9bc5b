"""Pieces of kernels whose programs have rows in registers: norm, GeGLU, Hadamard, rounding to int8."""

import triton
import triton.language as tl

from openpi_duquant.kernels.blocks_triton import signs


@triton.jit
def geglu_of(gate, up):
    """gelu(gate) * up, both factors rounded to their type, as torch does."""
    x = gate.to(tl.float32)
    # 0.5 (1 + tanh u) = 1 / (1 + 2^(-2 u / ln 2)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    x = x / (1.0 + tl.exp2(-2.302208198 * (x + 0.044715 * x * x * x)))
    return (x.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def gated(x_ptr, channel, inside, K: tl.constexpr, GEGLU: tl.constexpr):
    """Channels of x; of gelu(gate) * up where x = gate | up."""
    x = tl.load(x_ptr + channel, mask=inside, other=0.0)
    if GEGLU:
        x = geglu_of(x, tl.load(x_ptr + K + channel, mask=inside, other=0.0))
    return x


@triton.jit
def read_modulation(scale_ptr, shift_ptr, channel, inside, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Scale and shift of channels, fp32; zeros where there are none."""
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0).to(tl.float32) if SCALE else 0.0
    shift = tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32) if SHIFT else 0.0
    return scale, shift


@triton.jit
def modulate(x, inverse_rms, scale, shift):
    """x * inverse_rms * (1 + scale) + shift, rounded to the type of x."""
    return (x.to(tl.float32) * inverse_rms * (1.0 + scale) + shift).to(x.dtype)


@triton.jit
def rotate(x, rotation, FLOAT32: tl.constexpr):
    """x [R, B] times [B, B], summed in fp32."""
    if FLOAT32:
        y = tl.dot(x.to(tl.float32), rotation.to(tl.float32), input_precision="ieee")
    else:
        y = tl.dot(x, rotation.to(x.dtype))
    return y


@triton.jit
def _butterflies(x, SIZE: tl.constexpr, B: tl.constexpr):
    """The unnormalised Hadamard transform of every B of x [SIZE], fp32, by sums and differences."""
    STEPS: tl.constexpr = 4 if B == 16 else 5 if B == 32 else 6 if B == 64 else 7
    for step in tl.static_range(STEPS):
        pairs = tl.permute(tl.reshape(x, (SIZE >> (step + 1), 2, 1 << step)), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))
    return x


@triton.jit
def largest_of(y):
    """Bits of the largest magnitude of every row of y, fp32: in order as the numbers are, NaN above infinity.

    A maximum of the numbers does not see NaN.
    """
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def scale_of(largest, gain):
    """Scale of a row by the bits of its largest magnitude, times gain; 1 for a row of zeros."""
    largest = largest.to(tl.float32, bitcast=True) * gain
    return tl.where(largest == 0, 1.0, tl.div_rn(largest, 127.0))


@triton.jit
def rounded(y, per_scale):
    """y * per_scale, at most 127 in magnitude, to the nearest integer, ties to even; int8.

    Added to 1.5 * 2^23, a number's nearest integer stands in the low bits of the sum.
    """
    return (y * per_scale + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_rows(y, gain):
    """Codes int8 and scales fp32 of rows of y * gain, y [R, W] fp32; NaN in a row is one in its scale."""
    act_scale = scale_of(largest_of(y), gain)
    return rounded(y, (gain / act_scale)[:, None]), act_scale


@triton.jit
def transform_rows(
    row, x, scale, shift, codes_ptr, act_scale_ptr, row_sum_ptr, M,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr, HADAMARD: tl.constexpr, BUTTERFLY: tl.constexpr,
    NORM: tl.constexpr, SHIFT: tl.constexpr, FLOAT32: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr,
    ROW_SUM: tl.constexpr,
):  # fmt: skip
    """Norm, rotation and rounding of rows [ROWS], x [ROWS, BLOCKS * B]; scale and shift as of `read_modulation`."""
    WIDTH: tl.constexpr = BLOCKS * B
    k = tl.arange(0, WIDTH)[None, :]
    known = (row < M)[:, None]
    inside = known & (k < K) if WIDTH > K else known
    if NORM:
        square = x.to(tl.float32) * x.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(square, 1) / K + EPS)[:, None]
        x = modulate(x, inverse_rms, scale, shift)
        if SHIFT and WIDTH > K:
            x = tl.where(inside, x, 0.0).to(x.dtype)
    gain: tl.constexpr = B**-0.5 if HADAMARD else 1.0
    if not HADAMARD:
        y = x.to(tl.float32)
    elif BUTTERFLY:
        y = tl.reshape(_butterflies(tl.reshape(x.to(tl.float32), (ROWS * WIDTH,)), ROWS * WIDTH, B), (ROWS, WIDTH))
    else:
        hadamard = signs(tl.arange(0, B)[:, None], tl.arange(0, B)[None, :])
        y = tl.reshape(rotate(tl.reshape(x, (ROWS * BLOCKS, B)), hadamard, FLOAT32), (ROWS, WIDTH))
    codes, act_scale = quantize_rows(y, gain)
    tl.store(codes_ptr + row[:, None] * K + k, codes, mask=inside)
    tl.store(act_scale_ptr + row, act_scale, mask=row < M)
    if ROW_SUM:
        tl.store(row_sum_ptr + row, tl.sum(codes.to(tl.int32), 1), mask=row < M)
