"""SigLIP So400m/14, the vision tower (Zhai et al. 2023, arXiv:2303.15343): module names are openpi's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import IMAGE_SIZE
from openpi_duquant.architecture import PATCH_SIZE
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.linear import apply_linear
from openpi_duquant.linear import merge_
from openpi_duquant.linear import shared_forward

_EPS = 1e-6


class Attention(nn.Module):
    """Full multi-head attention over patches."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.q_proj = nn.Linear(size.width, size.width)
        self.k_proj = nn.Linear(size.width, size.width)
        self.v_proj = nn.Linear(size.width, size.width)
        self.out_proj = nn.Linear(size.width, size.width)

    def optimize_(self) -> None:
        """Makes one layer of q, k and v."""
        merge_(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj")

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if hasattr(self, "qkv_proj"):
            return apply_linear(self.qkv_proj, x).chunk(3, dim=-1)
        return shared_forward((self.q_proj, self.k_proj, self.v_proj), x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, W] -> [B, P, W]."""
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self._project(x))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with the tanh-approximated GELU."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size.width, size.mlp_dim)
        self.fc2 = nn.Linear(size.mlp_dim, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, W] -> [B, P, W]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(size.width, eps=_EPS)
        self.self_attn = Attention(size)
        self.layer_norm2 = nn.LayerNorm(size.width, eps=_EPS)
        self.mlp = MLP(size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, W] -> [B, P, W]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """Images to patch features; the patch embedding is computed in its own (fp32) type."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, size.width, PATCH_SIZE, stride=PATCH_SIZE),
                "position_embedding": nn.Embedding((IMAGE_SIZE // PATCH_SIZE) ** 2, size.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(size) for _ in range(size.depth))})
        self.post_layernorm = nn.LayerNorm(size.width, eps=_EPS)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 3, 224, 224] in [-1, 1] -> [B, 256, W] dtype."""
        patches = self.embeddings["patch_embedding"](images).flatten(2).transpose(1, 2)
        x = (patches + self.embeddings["position_embedding"].weight).to(dtype).contiguous()
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x)
