"""Attention of all patches of an image to each other, for the vision tower."""

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.kernels import patch_attention_cuda


def attend_patches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, head by head; on Hopper and in bf16 by a kernel of its own, else by torch's.

    Args:
        q: [B, P, H, D].
        k: [B, P, H, D].
        v: [B, P, H, D].

    Returns:
        [B, P, H * D].
    """
    attended = torch.ops.openpi_duquant.attend_patches(q, k, v) if q.is_cuda else _by_torch(q, k, v)
    return attended.flatten(2)


def _by_torch(*operands: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in operands)).transpose(1, 2)


torch.library.define("openpi_duquant::attend_patches", "(Tensor q, Tensor k, Tensor v) -> Tensor")


@torch.library.register_fake("openpi_duquant::attend_patches")
def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k, v
    return q.new_empty(q.shape)


@torch.library.impl("openpi_duquant::attend_patches", "CUDA")
def _on_gpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.cuda.device_of(q):
        if not patch_attention_cuda.takes(q, k, v):
            return _by_torch(q, k, v).contiguous()
        out = q.new_empty(q.shape)
        patch_attention_cuda.launch(out, q, k, v)
        return out
