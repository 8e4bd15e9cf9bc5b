"""The kernel of `embed_patches`."""

from torch import Tensor
import triton
import triton.language as tl


def launch(out: Tensor, images: Tensor, parts: Tensor, offset: Tensor, size: int) -> None:
    """Fills out [B, P, W]; arguments as `patches.embed_patches`, contiguous."""
    (count, patches, width), side = out.shape, images.shape[1]
    _embed_patches[(triton.cdiv(count * patches, 64), triton.cdiv(width, 64))](
        out, images, parts, offset, count * patches, width, SIDE=side, SIZE=size, K=parts.shape[1], BM=64, BN=64, BK=64,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _embed_patches(
    out_ptr, images_ptr, parts_ptr, offset_ptr, M, N, SIDE: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Some patches times some columns of all three parts."""
    ACROSS: tl.constexpr = SIDE // SIZE
    LINE: tl.constexpr = 3 * SIZE
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    image, patch = m // (ACROSS * ACROSS), m % (ACROSS * ACROSS)
    corner = ((image * SIDE + patch // ACROSS * SIZE) * SIDE + patch % ACROSS * SIZE) * 3
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        place = corner[:, None] + (k // LINE * (3 * SIDE) + k % LINE)[None, :]
        there = (m < M)[:, None] & (k < SIZE * LINE)[None, :]
        bytes_ = tl.load(images_ptr + place, mask=there, other=128).to(tl.int32) - 128
        for part in tl.static_range(3):
            at = (part * K + k[:, None]) * N + n[None, :]
            weights = tl.load(parts_ptr + at, mask=(n < N)[None, :], other=0.0)
            sums = tl.dot(bytes_.to(tl.float32).to(weights.dtype), weights, sums, input_precision="ieee")
    known = (m < M)[:, None] & (n < N)[None, :]
    y = sums + tl.load(offset_ptr + patch[:, None] * N + n[None, :], mask=known, other=0.0)
    tl.store(out_ptr + m[:, None] * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=known)
