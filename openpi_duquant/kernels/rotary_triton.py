"""The kernel of `rotary`."""

from torch import Tensor
import triton
import triton.language as tl


def launch(turned: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Fills turned [..., (H + 2) D] from qkv; cos and sin [..., D], all contiguous."""
    size = cos.shape[-1]
    heads = qkv.shape[-1] // size
    _rotary[(qkv.numel() // qkv.shape[-1],)](
        turned, qkv, cos, sin, HEADS=heads, PADDED=triton.next_power_of_2(heads), HALF=size // 2,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def turn(first, second, cos, sin):
    """Both halves of a head, turned."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rotary(
    turned_ptr, qkv_ptr, cos_ptr, sin_ptr, HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,

):  # fmt: skip
    """All heads of one token; the last is turned by nothing."""
    token = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, PADDED)[:, None], tl.arange(0, HALF)[None, :]
    known, turns = head < HEADS, head < HEADS - 1
    at = token * HEADS * 2 * HALF + head * (2 * HALF) + lane
    first = tl.load(qkv_ptr + at, mask=known, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + HALF, mask=known, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * 2 * HALF + lane).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * HALF + lane).to(tl.float32)
    first, second = turn(first, second, tl.where(turns, cos, 1.0), tl.where(turns, sin, 0.0))
    dtype = turned_ptr.dtype.element_ty
    tl.store(turned_ptr + at, first.to(dtype), mask=known)
    tl.store(turned_ptr + at + HALF, second.to(dtype), mask=known)
