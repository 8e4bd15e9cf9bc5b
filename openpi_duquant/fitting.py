"""The choice of a layer's permutation and rotations from its weight.

Methods: DuQuant (Lin et al. 2024, arXiv:2406.01721, and the code released with it) for the zigzag and the greedy
rotation; QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) for the Hadamard; right singular vectors from the research
code that this project grew from.
"""

import torch
from torch import Tensor

from openpi_duquant.transforms import Rotation
from openpi_duquant.transforms import Transform
from openpi_duquant.transforms import hadamard_matrix
from openpi_duquant.transforms import rotate

GREEDY_STEPS = 256
GREEDY_SAMPLES = 256
"""Rows of a block, those with the largest values, that the greedy rotation looks at."""


def fit_transform(samples: Tensor, rotation: str, block: int, *, permute: bool, smoothing: float) -> Transform:
    """A transform that suits these values; matrices are rounded to bf16, as they are stored.

    Args:
        samples: [S, K]: rows of a weight, or calibration activations.
        rotation: "hadamard", "svd", "duquant" or "none".
        block: Channels that are rotated, and dealt, together; divides K. 1 rotates nothing.
        permute: Deal the channels over the blocks by the zigzag.
        smoothing: See `channel_energy`.
    """
    samples = samples.float()
    pre_rotation: Rotation = None
    if permute and rotation == "duquant" and block > 1:
        pre_rotation = greedy_rotation(samples, block).bfloat16()
        samples = rotate(samples, pre_rotation)
    permutation = None
    if permute:
        permutation = zigzag_permutation(channel_energy(samples, smoothing), block)
        samples = samples[:, permutation]
    return Transform(pre_rotation, permutation, fit_rotation(samples, rotation, block))


def fit_rotation(samples: Tensor, rotation: str, block: int) -> Rotation:
    """The rotation of that kind for samples [S, K]; matrices [K/block, block, block] in bf16."""
    if rotation == "none" or block == 1:
        return None
    if rotation == "hadamard":
        return block
    rotations = (singular_rotation if rotation == "svd" else greedy_rotation)(samples, block)
    return rotations.bfloat16().contiguous()


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
    energy = sum(rows.double().square().sum(0) for rows in weight.split(512)) / len(weight)
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


def greedy_rotation(samples: Tensor, block: int, *, steps: int = GREEDY_STEPS, seed: int = 0) -> Tensor:
    """DuQuant's rotation: again and again, the channel with the block's largest value is spread over all others.

    Every step multiplies by an orthogonal matrix whose first row is uniform, with that channel put first; the product
    of those steps is taken after which the block's largest magnitude was least. All blocks advance together, each with
    its own matrix, as published (the released code shares one matrix among all blocks).

    Args:
        samples: [S, K]; of more than `GREEDY_SAMPLES` rows, the ones with the largest values of a block are looked at.
        block: Channels in a block, a power of two; divides K.
        steps: Steps to try.
        seed: Of the random part of the matrix.

    Returns:
        [K/block, block, block] fp64, orthogonal.
    """
    blocks = samples.float().reshape(len(samples), -1, block).transpose(0, 1)
    rows = blocks.abs().amax(2).topk(min(len(samples), GREEDY_SAMPLES), dim=1).indices
    values = blocks.gather(1, rows.unsqueeze(-1).expand(-1, -1, block))
    spread = _spreading_matrix(block, seed).to(samples.device)
    rotation = torch.eye(block, dtype=torch.float64, device=samples.device).repeat(len(blocks), 1, 1)
    best, least = rotation, values.abs().amax((1, 2))
    for _ in range(steps):
        step = _with_first_channel(spread, values.abs().amax(1).argmax(1))
        rotation, values = rotation @ step, values @ step.float()
        peak = values.abs().amax((1, 2))
        best = torch.where((peak < least)[:, None, None], rotation, best)
        least = torch.minimum(peak, least)
    return best


def _spreading_matrix(block: int, seed: int) -> Tensor:
    """[block, block] fp64, orthogonal: a uniform first row, the others random."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(block, dtype=torch.float64)
    if block > 1:
        noise = torch.randn(block - 1, block - 1, dtype=torch.float64, generator=generator)
        mixed[1:, 1:] = torch.linalg.qr(noise).Q
    return mixed @ hadamard_matrix(block, mixed)


def _with_first_channel(spread: Tensor, channel: Tensor) -> Tensor:
    """The matrix with its first and its `channel`-th row and column exchanged, for every channel [C]: [C, B, B]."""
    order = torch.arange(len(spread), device=channel.device).repeat(len(channel), 1)
    each = torch.arange(len(channel), device=channel.device)
    order[each, channel], order[:, 0] = 0, channel
    return spread[order.unsqueeze(2), order.unsqueeze(1)]
