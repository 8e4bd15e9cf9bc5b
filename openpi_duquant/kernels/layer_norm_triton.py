"""The kernel of `add_layer_norm`."""

from torch import Tensor
import triton
import triton.language as tl


def launch(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    delta: Tensor,
    delta_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> None:
    """Fills sum and norm, both [..., W]; arguments as `add_layer_norm`, contiguous."""
    width = x.shape[-1]
    padded = triton.next_power_of_2(width)
    _add_layer_norm[(x.numel() // width,)](
        *outputs, x, delta, delta_bias, weight, bias, DELTA_BIAS=delta_bias is not None, EPS=eps, WIDTH=width,
        PADDED=padded,        num_warps=min(max(padded // 512, 1), 16),
    )  # fmt: skip


@triton.jit
def _add_layer_norm(
    sum_ptr, norm_ptr, x_ptr, delta_ptr, delta_bias_ptr, weight_ptr, bias_ptr, DELTA_BIAS: tl.constexpr,
    EPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One row, in registers."""
    channel = tl.arange(0, PADDED)
    known = channel < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + channel
    x = tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + at, mask=known, other=0.0).to(tl.float32)
    if DELTA_BIAS:
        delta += tl.load(delta_bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    rounded = (x + delta).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, rounded, mask=known)
    y = rounded.to(tl.float32)
    centered = tl.where(known, y - tl.sum(y) / WIDTH, 0.0)
    y = centered * tl.rsqrt(tl.sum(centered * centered) / WIDTH + EPS) * weight + bias
    tl.store(norm_ptr + at, y.to(norm_ptr.dtype.element_ty), mask=known)
