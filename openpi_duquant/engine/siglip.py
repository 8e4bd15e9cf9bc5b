"""SigLIP So400m/14, the vision tower (Zhai et al. 2023, arXiv:2303.15343): module names are openpi's.

Between layers there are the residual stream and what the last sublayer made. The next norm adds them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import PATCH_SIZE
from openpi_duquant.architecture import PATCHES
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine.observation import as_floats
from openpi_duquant.kernels import patches
from openpi_duquant.kernels.layer_norm import add_layer_norm
from openpi_duquant.kernels.patch_attention import attend_patches
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


class Delta(NamedTuple):
    """What a sublayer adds to the residual stream.

    Attributes:
        y: [B, P, W]; None for nothing.
        bias: [W], to be added too; None for nothing.
    """

    y: Tensor | None = None
    bias: Tensor | None = None


def last_linear(layer: nn.Module, x: Tensor, *, apart: bool) -> Delta:
    """What the last layer of a sublayer makes; its bias apart or not. The norm adds that at no price, whereas cuBLAS
    has slower kernels for a matmul with a bias."""
    return Delta(F.linear(x, layer.weight), layer.bias) if apart else Delta(layer(x))


class AddLayerNorm(nn.LayerNorm):
    """Adds to the residual stream, and normalizes it."""

    def forward(self, x: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
        """x [B, P, W] -> x + delta, and its norm."""
        return add_layer_norm(x, *delta, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Full multi-head attention over patches."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.q_proj = nn.Linear(size.width, size.width)
        self.k_proj = nn.Linear(size.width, size.width)
        self.v_proj = nn.Linear(size.width, size.width)
        self.out_proj = nn.Linear(size.width, size.width)
        self.apart = False

    def optimize_(self) -> None:
        """Makes one layer of q, k and v, and leaves the last bias to the norm."""
        merge_(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        self.apart = type(self.out_proj) is nn.Linear

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if hasattr(self, "qkv_proj"):
            return apply_linear(self.qkv_proj, x).chunk(3, dim=-1)
        return shared_forward((self.q_proj, self.k_proj, self.v_proj), x)

    def forward(self, x: Tensor) -> Delta:
        """Of x [B, P, W]."""
        y = attend_patches(*(part.unflatten(-1, (self.num_heads, -1)) for part in self._project(x)))
        return last_linear(self.out_proj, y, apart=self.apart)


class MLP(nn.Module):
    """Two layers with the tanh-approximated GELU."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size.width, size.mlp_dim)
        self.fc2 = nn.Linear(size.mlp_dim, size.width)
        self.fused = self.apart = False

    def optimize_(self) -> None:
        """On a GPU makes GELU a part of the first matmul, in 16 bits; leaves the last bias to the norm."""
        self.fused, self.apart = type(self.fc1) is nn.Linear, type(self.fc2) is nn.Linear

    def _hidden(self, x: Tensor) -> Tensor:
        if self.fused and x.is_cuda and x.element_size() == 2:  # on a CPU this GELU would be the exact one
            bias, weight = self.fc1.bias, self.fc1.weight.t()
            y = torch._addmm_activation(bias, x.flatten(0, 1), weight, use_gelu=True)  # noqa: SLF001
            return y.view(*x.shape[:2], -1)
        return F.gelu(self.fc1(x), approximate="tanh")

    def forward(self, x: Tensor) -> Delta:
        """Of x [B, P, W]."""
        return last_linear(self.fc2, self._hidden(x), apart=self.apart)


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.layer_norm1 = AddLayerNorm(size.width, eps=_EPS)
        self.self_attn = Attention(size)
        self.layer_norm2 = AddLayerNorm(size.width, eps=_EPS)
        self.mlp = MLP(size)

    def forward(self, x: Tensor, delta: Delta) -> tuple[Tensor, Delta]:
        """The residual stream [B, P, W], and what is to be added to it; the same after the layer."""
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
                "position_embedding": nn.Embedding(PATCHES, size.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(size) for _ in range(size.depth))})
        self.post_layernorm = AddLayerNorm(size.width, eps=_EPS)
        self.register_buffer("_parts", None, persistent=False)
        self.register_buffer("_offset", None, persistent=False)

    @torch.no_grad()
    def optimize_(self) -> None:
        """Prepares the embedding of bytes."""
        convolution, positions = self.embeddings["patch_embedding"], self.embeddings["position_embedding"].weight
        self._parts, self._offset = patches.prepare(convolution.weight, convolution.bias, positions)

    def embed(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings [B, 256, W] of patches and their positions; images as of `forward`."""
        if images.dtype == torch.uint8:
            if self._parts is not None:
                return patches.embed_patches(images, self._parts, self._offset, PATCH_SIZE, dtype)
            images = as_floats(images).movedim(3, 1)
        return (self.embeddings["patch_embedding"](images) + self.embeddings["position_embedding"].weight).to(dtype)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 224, 224, 3] uint8, or [B, 3, 224, 224] in [-1, 1] -> [B, 256, W] dtype."""
        x, delta = self.embed(images, dtype), Delta()
        for layer in self.encoder["layers"]:
            x, delta = layer(x, delta)
        return self.post_layernorm(x, delta)[1]
