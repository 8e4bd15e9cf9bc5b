"""SigLIP So400m/14, the vision tower (Zhai et al. 2023, arXiv:2303.15343): module names are openpi's.

Between layers there are two tensors: the residual stream, and what the last sublayer made. The next norm adds them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import IMAGE_SIZE
from openpi_duquant.architecture import PATCH_SIZE
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.kernels.layer_norm import add_layer_norm
from openpi_duquant.linear import apply_linear
from openpi_duquant.linear import merge_
from openpi_duquant.linear import shared_forward
from openpi_duquant.transforms import full_precision

_EPS = 1e-6


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap: one matmul."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, P, width], row by row."""
        rows_and_columns = images.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))
        patches = rows_and_columns.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        with full_precision(images):
            return F.linear(patches, self.weight.flatten(1), self.bias)


class AddLayerNorm(nn.LayerNorm):
    """Adds to the residual stream, and normalizes it."""

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, P, W], both -> x + delta, and its norm."""
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps)


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
        self.fused = False

    def optimize_(self) -> None:
        """On a GPU makes GELU a part of the first layer's matmul, if that is one of 16 bits."""
        self.fused = type(self.fc1) is nn.Linear

    def _hidden(self, x: Tensor) -> Tensor:
        if self.fused and x.is_cuda and x.element_size() == 2:  # on a CPU this GELU would be the exact one
            bias, weight = self.fc1.bias, self.fc1.weight.t()
            y = torch._addmm_activation(bias, x.flatten(0, 1), weight, use_gelu=True)  # noqa: SLF001
            return y.view(*x.shape[:2], -1)
        return F.gelu(self.fc1(x), approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, W] -> [B, P, W]."""
        return self.fc2(self._hidden(x))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.layer_norm1 = AddLayerNorm(size.width, eps=_EPS)
        self.self_attn = Attention(size)
        self.layer_norm2 = AddLayerNorm(size.width, eps=_EPS)
        self.mlp = MLP(size)

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, P, W]: the residual stream, and what is to be added to it; the same after the layer."""
        x, y = self.layer_norm1(x, delta)
        x, y = self.layer_norm2(x, self.self_attn(y))
        return x, self.mlp(y)


class VisionModel(nn.Module):
    """Images to patch features; the patch embedding is computed in its own (fp32) type."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": PatchEmbedding(3, size.width, PATCH_SIZE, stride=PATCH_SIZE),
                "position_embedding": nn.Embedding((IMAGE_SIZE // PATCH_SIZE) ** 2, size.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(size) for _ in range(size.depth))})
        self.post_layernorm = AddLayerNorm(size.width, eps=_EPS)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 3, 224, 224] in [-1, 1] -> [B, 256, W] dtype."""
        x = (self.embeddings["patch_embedding"](images) + self.embeddings["position_embedding"].weight).to(dtype)
        delta = None
        for layer in self.encoder["layers"]:
            x, delta = layer(x, delta)
        return self.post_layernorm(x, delta)[1]
