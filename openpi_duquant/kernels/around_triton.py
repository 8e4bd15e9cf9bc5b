"""The kernel of `around.apply_epilogue`; that of a prologue is in `transform_triton`."""

from torch import Tensor
import triton
import triton.language as tl


def launch_add(out: Tensor, y: Tensor, residual: Tensor, gate: Tensor | None) -> None:
    """Fills out [..., N] from y and residual [..., N] and gate [N], all contiguous."""
    n = out.shape[-1]
    padded = triton.next_power_of_2(n)
    _add_gated[(out.numel() // n,)](
        out, y, residual, gate, GATE=gate is not None, N=n, PADDED=padded, num_warps=min(max(padded // 512, 1), 16),
    )  # fmt: skip


@triton.jit
def _add_gated(out_ptr, y_ptr, residual_ptr, gate_ptr, GATE: tl.constexpr, N: tl.constexpr, PADDED: tl.constexpr):
    """residual + gate * y, rounded once."""
    n = tl.arange(0, PADDED)
    at = tl.program_id(0).to(tl.int64) * N + n
    y = tl.load(y_ptr + at, mask=n < N, other=0.0).to(tl.float32)
    if GATE:
        y *= tl.load(gate_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y += tl.load(residual_ptr + at, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=n < N)
