"""Gemma, as the language model and as the action expert with adaRMS; module names are openpi's.

Norms are computed in fp32. All query heads read one key/value head.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import TransformerSize
from openpi_duquant.linear import shared_forward

_EPS = 1e-6
KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, 1, P, D]."""


def _normalise(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, modulation: None = None) -> tuple[Tensor, None]:
        """x [..., W] -> normalised x, the same dtype, and no gate."""
        return (_normalise(x) * (1.0 + self.weight.float())).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale) + shift, and a gate for the residual; all three depend on the time step alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., W] and modulation [3 W] fp32 (see `dense`) -> normalised x and gate [W], the dtype of x."""
        scale, shift, gate = modulation.chunk(3)
        return (_normalise(x) * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + (y if gate is None else y * gate)


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, D] of rotary embeddings (base 10000) at positions [B, S].

    The frequencies are rounded to `dtype`: openpi's bf16 policy holds them in bf16, and at position 500 that turns some
    channels by most of a radian.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = (1.0 / 10_000.0**exponents).to(dtype).float()
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped attention with one key/value head.

    Args:
        size: The transformer.
        keys_only: Leave out q and o: the layer's output is not used.
    """

    def __init__(self, size: TransformerSize, *, keys_only: bool = False) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.k_proj = nn.Linear(size.width, size.head_dim, bias=False)
        self.v_proj = nn.Linear(size.width, size.head_dim, bias=False)
        if not keys_only:
            self.q_proj = nn.Linear(size.width, size.num_heads * size.head_dim, bias=False)
            self.o_proj = nn.Linear(size.num_heads * size.head_dim, size.width, bias=False)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> KeyValue:
        """Rotated keys and values of x [B, S, W]."""
        k, v = shared_forward((self.k_proj, self.v_proj), x)
        return _apply_rotary(k.unsqueeze(1), cos, sin), v.unsqueeze(1)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cached: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attends from x [B, S, W] to what is cached and to itself.

        Args:
            x: [B, S, W].
            cos: [B, 1, S, D].
            sin: [B, 1, S, D].
            mask: Bool, broadcastable to [B, heads, S, P + S], True where a query may look; None: everywhere.
            cached: Keys and values to put before those of x.

        Returns:
            [B, S, W], and the keys and values of x.
        """
        q, k, v = shared_forward((self.q_proj, self.k_proj, self.v_proj), x)
        q = _apply_rotary(q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2), cos, sin)
        own = k, v = _apply_rotary(k.unsqueeze(1), cos, sin), v.unsqueeze(1)
        if cached is not None:
            k, v = torch.cat((cached[0], k), dim=2), torch.cat((cached[1], v), dim=2)
        heads = (-1, self.num_heads, -1, -1)
        y = F.scaled_dot_product_attention(q, k.expand(heads), v.expand(heads), attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2)), own


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.mlp_dim, bias=False)
        self.up_proj = nn.Linear(size.width, size.mlp_dim, bias=False)
        self.down_proj = nn.Linear(size.mlp_dim, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        gate, up = shared_forward((self.gate_proj, self.up_proj), x)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP.

    Args:
        size: The transformer.
        adaptive: Modulate norms and residuals by the time step.
    """

    def __init__(self, size: TransformerSize, *, adaptive: bool = False) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.input_layernorm = norm(size.width)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = norm(size.width)
        self.mlp = MLP(size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cached: KeyValue | None = None,
        modulations: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor, KeyValue]:
        """x [B, S, W] -> x [B, S, W] and its keys and values; other arguments as `Attention.forward`.

        `modulations` are those of the two norms, each [3 W] fp32, for an adaptive layer.
        """
        normed, gate = self.input_layernorm(x, modulations[0])
        y, own = self.self_attn(normed, cos, sin, mask, cached)
        x = _residual(x, y, gate)
        normed, gate = self.post_attention_layernorm(x, modulations[1])
        return _residual(x, self.mlp(normed), gate), own


class LastLanguageLayer(nn.Module):
    """Of the last layer only the keys and values are read."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size.width)
        self.self_attn = Attention(size, keys_only=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> KeyValue:
        """x [B, P, W] -> the layer's keys and values."""
        return self.self_attn.keys(self.input_layernorm(x)[0], cos, sin)


class LanguageModel(nn.Module):
    """Fills the cache that the action expert attends to; has no output of its own."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = [DecoderLayer(size) for _ in range(size.depth - 1)]
        self.layers = nn.ModuleList([*layers, LastLanguageLayer(size)])

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> list[KeyValue]:
        """Embeddings [B, P, W] at positions [B, P] under mask [B, 1, P, P] -> keys and values of every layer."""
        cos, sin = rotary(positions, self.size.head_dim, x.dtype)
        caches = []
        for layer in self.layers[:-1]:
            x, cache = layer(x, cos, sin, mask)
            caches.append(cache)
        return [*caches, self.layers[-1](x, cos, sin)]


class ActionExpert(nn.Module):
    """Denoises actions while looking at the language model's cache.

    Args:
        size: The transformer.
        adaptive: Modulate by the time step (adaRMS, pi0.5).
    """

    def __init__(self, size: TransformerSize, *, adaptive: bool) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(DecoderLayer(size, adaptive=adaptive) for _ in range(size.depth))
        self.norm = AdaptiveRMSNorm(size.width) if adaptive else RMSNorm(size.width)

    def norms(self) -> Iterator[nn.Module]:
        """Every norm, in the order in which `forward` takes modulations."""
        for layer in self.layers:
            yield layer.input_layernorm
            yield layer.post_attention_layernorm
        yield self.norm

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        caches: Sequence[KeyValue],
        modulations: Sequence[Tensor | None],
    ) -> Tensor:
        """One denoising step.

        Args:
            x: Embedded suffix [B, S, W].
            positions: [B, S].
            mask: Bool, broadcastable to [B, heads, S, P + S], or None.
            caches: Keys and values of the language model's layers.
            modulations: Of every norm, [3 W] fp32, or None for norms that take none.

        Returns:
            [B, S, W].
        """
        cos, sin = rotary(positions, self.size.head_dim, x.dtype)
        for index, (layer, cached) in enumerate(zip(self.layers, caches, strict=True)):
            x, _ = layer(x, cos, sin, mask, cached, modulations[2 * index : 2 * index + 2])
        return self.norm(x, modulations[-1])[0]
