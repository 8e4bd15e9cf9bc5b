"""Permutations and block rotations of channels: x W^T stays what it was, outliers do not.

For y = x W^T with permutation p and block rotation R,

    x' = rotate(x[:, p], R)        W' = rotate(W[:, p], dual(R))        x' W'^T = x W^T

`dual(R)` is the inverse transpose of R. For an orthogonal R that is R itself; taking it of the values that are stored
(bf16, orthogonal only up to rounding) keeps the product exact. Methods: DuQuant (Lin et al. 2024, arXiv:2406.01721)
for the zigzag and the blocks, QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) for the Hadamard rotation.
"""

import torch
from torch import Tensor

Rotation = Tensor | int | None
"""Matrices [K/B, B, B]; or the size B of a normalised Hadamard block; or no rotation."""


def channel_energy(weight: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean square of every input channel, mixed with the mean over channels.

    The mixing keeps the order of the channels, and the zigzag reads nothing but their order: below 1 it changes no
    permutation. It is kept because the research code's LS asks for it.

    Args:
        weight: [N, K].
        smoothing: Share of the mean, 0 to 1.

    Returns:
        [K], fp64.
    """
    energy = weight.double().square().mean(0)
    return (1 - smoothing) * energy + smoothing * energy.mean()


def zigzag_permutation(energy: Tensor, block: int) -> Tensor:
    """Deals channels, strongest first, over the K/block blocks in a snake, so that every block gets its share.

    Args:
        energy: [K].
        block: Channels in a block; divides K.

    Returns:
        [K] int64: `x[..., permutation]` is the permuted activation.
    """
    rounds = energy.argsort(descending=True, stable=True).view(block, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Multiplies every block of the last dimension by its matrix: x_b -> x_b R_b.

    Args:
        x: [..., K], floating point.
        rotation: See `Rotation`. Matrices are used in the dtype of x.

    Returns:
        [..., K], the dtype of x.
    """
    if rotation is None:
        return x
    if isinstance(rotation, int):
        return _hadamard(x, rotation)
    blocks, block, _ = rotation.shape
    by_block = x.reshape(-1, blocks, block).transpose(0, 1)
    return torch.bmm(by_block, rotation.to(x.dtype)).transpose(0, 1).reshape(x.shape)


def _hadamard(x: Tensor, block: int) -> Tensor:
    """The fast Walsh-Hadamard transform of every block, normalised: log2(block) additions an element."""
    y = x.reshape(-1, block)
    half = 1
    while half < block:
        a, b = y.view(-1, block // (2 * half), 2, half).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    return y.reshape(x.shape) * block**-0.5


def rotate_rows(weight: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the output channels [N] of a weight [N, K] or a bias [N]."""
    return rotate(weight.T.contiguous(), rotation).T.contiguous() if weight.ndim == 2 else rotate(weight, rotation)


def inverse(rotation: Rotation) -> Rotation:
    """The rotation that undoes this one (of the values as stored, in fp64); a Hadamard undoes itself."""
    return torch.linalg.inv(rotation.double()) if isinstance(rotation, Tensor) else rotation


def dual(rotation: Rotation) -> Rotation:
    """The rotation for the other side of the product: the inverse transpose (fp64)."""
    return inverse(rotation).mT.contiguous() if isinstance(rotation, Tensor) else rotation


def singular_rotation(weight: Tensor, block: int) -> Tensor:
    """Right singular vectors of every block of input channels, strongest first.

    Computed in fp64 as eigenvectors of the block's Gram matrix, all blocks at once; each vector's sign makes its
    largest component positive.

    Args:
        weight: [N, K].
        block: Channels in a block; divides K.

    Returns:
        [K/block, block, block] fp64, orthogonal; vectors in columns.
    """
    blocks = weight.reshape(len(weight), -1, block).transpose(0, 1)
    gram = torch.cat([part.double().mT @ part.double() for part in blocks.split(_chunk(blocks))])
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def _chunk(blocks: Tensor) -> int:
    """Blocks whose fp64 copy takes about 64 MB, so that a wide layer is never held twice."""
    return max(1, 2**23 // blocks[0].numel())


def tiled(rotation: Rotation, repeats: int) -> Rotation:
    """The rotation of `repeats` equal spans of channels, one after the other."""
    return rotation.repeat(repeats, 1, 1) if isinstance(rotation, Tensor) else rotation
