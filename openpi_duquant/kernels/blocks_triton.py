"""Rotations inside kernels: the signs of a Hadamard, and the blocks of a rotation as one matrix."""

import triton
import triton.language as tl


@triton.jit
def signs(i, j):
    """Entries (i, j) of Sylvester's matrix, +-1, up to a size of 256: negative where i and j share an odd number of
    bits."""
    shared = i & j
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return 1 - 2 * (shared & 1)


@triton.jit
def block_diagonal(matrices_ptr, n, N, SIZE: tl.constexpr, BLOCK: tl.constexpr, HADAMARD: tl.constexpr):
    """The rotation of channels n [SIZE] out of N, whole blocks of them, [SIZE, SIZE] fp32; of a Hadamard the signs."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    same = (i // BLOCK) == (j // BLOCK)
    if HADAMARD:
        rotation = tl.where(same, signs(i % BLOCK, j % BLOCK).to(tl.float32), 0.0)
    else:
        entry = (n[:, None] // BLOCK * BLOCK + i % BLOCK) * BLOCK + j % BLOCK
        known = same & (n < N)[:, None] & (n < N)[None, :]
        rotation = tl.load(matrices_ptr + entry, mask=known, other=0.0).to(tl.float32)
    return rotation
