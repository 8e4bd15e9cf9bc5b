"""All decoder layers of a few tokens in one launch, for layers of which everything but the input is known."""

from typing import NamedTuple

import torch
from torch import Tensor

from openpi_duquant.kernels import persistent_cuda
from openpi_duquant.kernels.rotary import on_gpu

MOST_TOKENS = 64
"""That are in one tile of a matmul."""


class Matrix(NamedTuple):
    """One W4A8 matrix of every layer, as the `triton` backend packs it.

    Attributes:
        weight: [L, N, K / 2] uint8, see `triton_matmul.repack`.
        scale: [L, N, 1] fp32.
        permutation: [L, K], of the input; None for none.
        hadamard: Size of the blocks that the input is rotated by; 0 for none.
    """

    weight: Tensor
    scale: Tensor
    permutation: Tensor | None
    hadamard: int


class Stack(NamedTuple):
    """The weights of L decoder layers.

    Attributes:
        qkv: Merged.
        o: Its input is only rounded.
        gate_up: Merged.
        down: Without anything special.
        norms: [2 L, W] fp32, weights of RMS norms, two a layer; None for adaptive ones.
    """

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    norms: Tensor | None


def takes(x: Tensor, head_dim: int) -> bool:
    """Whether the launch takes an input [B, S, W]: on a GPU, few tokens, heads of a power of two."""
    return on_gpu(x, head_dim) and x.shape[0] * x.shape[1] <= MOST_TOKENS


def takes_width(channels: int) -> bool:
    """Whether a matrix may have so many input channels: a power of two, 64 at least."""
    return channels >= 64 and channels & (channels - 1) == 0


def run_layers(
    x: Tensor,
    stack: Stack,
    norms: Tensor,
    rotation: tuple[Tensor, Tensor],
    visible: Tensor | None,
    cached: tuple[Tensor, Tensor],
    *,
    state_first: bool,
) -> Tensor:
    """Decoder layers as `engine.gemma.DecoderLayer` defines them, on a GPU.

    Args:
        x: [B, S, W], at most `MOST_TOKENS` tokens.
        stack: The layers' matrices.
        norms: [2 L, 3 W] fp32, modulations (see `engine.gemma.AdaptiveRMSNorm`), or `stack.norms`.
        rotation: Cosines and sines [B, S, D].
        visible: [B, P] bool, of the cached keys; None for all.
        cached: Keys and values, each [L, B, P, D].
        state_first: See `attention.attend`.

    Returns:
        [B, S, W].
    """
    from openpi_duquant.kernels import persistent_triton  # noqa: PLC0415  triton is there where CUDA is

    visible = None if visible is None else visible.contiguous()
    x, norms, keys, values, cos, sin = (part.contiguous() for part in (x, norms, *cached, *rotation))
    launch = persistent_cuda.launch if persistent_cuda.takes(x, stack, keys) else persistent_triton.launch
    with torch.cuda.device_of(x):
        return launch(x, stack, norms, keys, values, visible, cos, sin, state_first=state_first)
