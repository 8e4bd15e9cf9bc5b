"""The kernels of `around`: a row a program, in registers."""

from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels.reference import NORM_EPS
from openpi_duquant.kernels.transform_triton import gated
from openpi_duquant.kernels.transform_triton import modulate
from openpi_duquant.kernels.transform_triton import read_modulation


def launch_prologue(
    out: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, *, geglu: bool, norm: bool
) -> None:
    """Fills out [..., K] from x [..., K], or [..., 2 K] for GeGLU; scale and shift [K]; all contiguous."""
    k = out.shape[-1]
    _prologue[(out.numel() // k,)](
        out, x, scale, shift, GEGLU=geglu, NORM=norm, SCALE=scale is not None, SHIFT=shift is not None, EPS=NORM_EPS,
        K=k, **_sizes(k),
    )  # fmt: skip


def launch_add(out: Tensor, y: Tensor, residual: Tensor, gate: Tensor | None) -> None:
    """Fills out [..., N] from y and residual [..., N] and gate [N], all contiguous."""
    n = out.shape[-1]
    _add_gated[(out.numel() // n,)](out, y, residual, gate, GATE=gate is not None, N=n, **_sizes(n))


def _sizes(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "num_warps": min(max(padded // 512, 1), 16)}


@triton.jit
def _prologue(
    out_ptr, x_ptr, scale_ptr, shift_ptr, GEGLU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, EPS: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    scale, shift = read_modulation(scale_ptr, shift_ptr, k, k < K, SCALE, SHIFT)
    x = gated(x_ptr + row * (2 * K if GEGLU else K), k, k < K, K, GEGLU)
    if NORM:
        y = x.to(tl.float32)
        x = modulate(x, tl.rsqrt(tl.sum(y * y) / K + EPS), scale, shift)
    tl.store(out_ptr + row * K + k, x, mask=k < K)


@triton.jit
def _add_gated(out_ptr, y_ptr, residual_ptr, gate_ptr, GATE: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr):
    """residual + gate * y, the gate and the product rounded to the type of y."""
    n = tl.arange(0, PADDED)
    at = tl.program_id(0).to(tl.int64) * N + n
    y = tl.load(y_ptr + at, mask=n < N, other=0.0)
    if GATE:
        gate = tl.load(gate_ptr + n, mask=n < N, other=0.0).to(y.dtype)
        y = (y.to(tl.float32) * gate.to(tl.float32)).to(y.dtype)
    residual = tl.load(residual_ptr + at, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (residual + y.to(tl.float32)).to(y.dtype), mask=n < N)
