"""Rotary embedding of queries and keys; on a GPU one launch."""

import torch
from torch import Tensor


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries and keys (Su et al. 2021, arXiv:2104.09864): x * cos + (-second half, first half) * sin.

    Args:
        qkv: [..., (H + 2) D]: H query heads, one key head, one value head.
        cos: [..., D], of every token, the same in both halves.
        sin: [..., D], of every token, the same in both halves.

    Returns:
        [..., (H + 2) D], the value head as it was.

    Raises:
        RuntimeError: If there are not as many cosines and sines as tokens.
    """
    size = cos.shape[-1]
    cos, sin = (part.reshape(*qkv.shape[:-1], size) for part in (cos, sin))
    if on_gpu(qkv, size):
        return torch.ops.openpi_duquant.rotary(qkv, cos, sin)
    turning, value = qkv[..., :-size].unflatten(-1, (-1, size)), qkv[..., -size:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)
    return torch.cat((turned.flatten(-2), value), dim=-1)


def on_gpu(x: Tensor, head_dim: int) -> bool:
    """Whether the kernels take it: on a GPU, with heads of a power of two."""
    return x.is_cuda and is_power(head_dim)


def is_power(head_dim: int) -> bool:
    """Whether heads are of a power of two, 16 at least."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


torch.library.define("openpi_duquant::rotary", "(Tensor qkv, Tensor cos, Tensor sin) -> Tensor")


@torch.library.register_fake("openpi_duquant::rotary")
def _fake(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    del cos, sin
    return qkv.new_empty(qkv.shape)


@torch.library.impl("openpi_duquant::rotary", "CUDA")
def _on_gpu(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from openpi_duquant.kernels import rotary_triton  # noqa: PLC0415  triton is there where CUDA is

    turned = qkv.new_empty(qkv.shape)
    with torch.cuda.device_of(qkv):
        rotary_triton.launch(turned, qkv.contiguous(), cos.contiguous(), sin.contiguous())
    return turned
