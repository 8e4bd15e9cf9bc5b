"""Gemma's layers, with adaRMS for the action expert, and the language model; module names are openpi's.

Norms are computed in fp32. All query heads read one key/value head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine.placement import HostLinear
from openpi_duquant.kernels import attention
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.linear import QuantizedInput
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import apply_linear
from openpi_duquant.linear import merge_
from openpi_duquant.linear import shared_forward

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, P, D], or of all, each [L, B, P, D]."""


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def prologue(self, modulation: None = None) -> tuple[Prologue, None]:
        """The norm, for the layers that read it, and no gate."""
        del modulation
        return Prologue(norm=True, scale=self.weight), None


class AdaptiveRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale) + shift, and a gate for the residual; all three depend on the time step alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = HostLinear(width, 3 * width)

    def prologue(self, modulation: Tensor) -> tuple[Prologue, Tensor]:
        """The norm, and the gate [W], from a modulation [3 W] fp32 (see `dense`)."""
        scale, shift, gate = modulation.chunk(3)
        return Prologue(norm=True, scale=scale, shift=shift), gate


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, D] of rotary embeddings (base 10000) at positions [B, S].

    The frequencies are rounded to `dtype`: openpi's bf16 policy holds them in bf16, and at position 500 that turns some
    channels by most of a radian.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = (1.0 / 10_000.0**exponents).to(dtype).float()
    angles = positions[:, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Grouped attention with one key/value head.

    Args:
        size: The transformer.
        keys_only: Leave out q and o: the layer's output is not used.
    """

    def __init__(self, size: TransformerSize, *, keys_only: bool = False) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.k_proj = nn.Linear(size.width, size.head_dim, bias=False)
        self.v_proj = nn.Linear(size.width, size.head_dim, bias=False)
        if not keys_only:
            self.q_proj = nn.Linear(size.width, size.num_heads * size.head_dim, bias=False)
            self.o_proj = nn.Linear(size.num_heads * size.head_dim, size.width, bias=False)
        self.inputs = ("k_proj", "v_proj") if keys_only else ("q_proj", "k_proj", "v_proj")

    def optimize_(self) -> None:
        """Makes one layer of q, k and v."""
        merge_(self, self.inputs, "qkv_proj")

    def project(self, x: Tensor, norm: Prologue, cos: Tensor, sin: Tensor) -> tuple[Tensor, KeyValue]:
        """Rotated queries [B, S, H, D], rotated keys and values [B, S, D] of x [B, S, W]; views of one tensor."""
        rotated = Epilogue(rotary=(cos, sin))
        if hasattr(self, "qkv_proj"):
            qkv = apply_linear(self.qkv_proj, x, norm, rotated)
        else:
            projections = [getattr(self, name) for name in self.inputs]
            qkv = rotated.apply(torch.cat(shared_forward(projections, x, norm), dim=-1))
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        return heads[:, :, :-2], (heads[:, :, -2], heads[:, :, -1])

    def forward(
        self,
        x: Tensor,
        norm: Prologue,
        gate: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cached: KeyValue | None = None,
        *,
        state_first: bool = False,
    ) -> tuple[Tensor, KeyValue]:
        """Attends from x to what is cached and to itself, and adds the result to x.

        Args:
            x: [B, S, W].
            norm: What is done to x first.
            gate: [W], of the result; None for ones.
            rotation: Cosines and sines [B, S, D].
            visible: [B, P] bool, of the keys that are cached, or of x's own where none are; None for all.
            cached: Keys and values to put before those of x.
            state_first: See `attention.attend`.

        Returns:
            [B, S, W], and the keys and values of x.
        """
        q, own = self.project(x, norm, *rotation)
        seen = (*own, visible) if cached is None else (*cached, visible, own)
        added = Epilogue(residual=x, gate=gate)
        if isinstance(self.o_proj, QuantLinear) and self.o_proj.only_rounds:
            y = attention.attend_quantized(q, *seen, state_first=state_first)
            return self.o_proj.matmul(QuantizedInput(*y), x, added), own
        return apply_linear(self.o_proj, attention.attend(q, *seen, state_first=state_first), epilogue=added), own


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.mlp_dim, bias=False)
        self.up_proj = nn.Linear(size.width, size.mlp_dim, bias=False)
        self.down_proj = nn.Linear(size.mlp_dim, size.width, bias=False)

    def optimize_(self) -> None:
        """Makes one layer of gate and up."""
        merge_(self, ("gate_proj", "up_proj"), "gate_up_proj")

    def forward(self, x: Tensor, norm: Prologue, gate: Tensor | None) -> Tensor:
        """x + gate * mlp(norm(x)), [..., W]; no gate stands for ones."""
        gated = False
        if hasattr(self, "gate_up_proj"):
            gated = isinstance(self.gate_up_proj, QuantLinear) and self.gate_up_proj.fuses_geglu
            y = apply_linear(self.gate_up_proj, x, norm, Epilogue(geglu=gated))
        else:
            y = torch.cat(shared_forward((self.gate_proj, self.up_proj), x, norm), dim=-1)
        return apply_linear(self.down_proj, y, Prologue(geglu=not gated), Epilogue(residual=x, gate=gate))


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
        rotation: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cached: KeyValue | None = None,
        modulations: Sequence[Tensor | None] = (None, None),
        *,
        state_first: bool = False,
    ) -> tuple[Tensor, KeyValue]:
        """x [B, S, W] -> x [B, S, W] and its keys and values; other arguments as `Attention.forward`.

        `modulations` are those of the two norms, each [3 W] fp32, for an adaptive layer.
        """
        norm, gate = self.input_layernorm.prologue(modulations[0])
        x, own = self.self_attn(x, norm, gate, rotation, visible, cached, state_first=state_first)
        return self.mlp(x, *self.post_attention_layernorm.prologue(modulations[1])), own


class LastLanguageLayer(nn.Module):
    """Of the last layer only the keys and values are read."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size.width)
        self.self_attn = Attention(size, keys_only=True)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> KeyValue:
        """x [B, P, W] -> the layer's keys and values."""
        return self.self_attn.project(x, self.input_layernorm.prologue()[0], *rotation)[1]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Parts of rows [B, P, D] in a tensor of their own [L, B, P, D]; copied eight bytes at a time, since torch copies
    what is not contiguous number by number."""
    return torch.stack([part.view(torch.int64) for part in parts]).view(parts[0].dtype)


class LanguageModel(nn.Module):
    """Fills the cache that the action expert attends to; has no output of its own."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = [DecoderLayer(size) for _ in range(size.depth - 1)]
        self.layers = nn.ModuleList([*layers, LastLanguageLayer(size)])

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None) -> KeyValue:
        """Embeddings [B, P, W], cosines and sines [B, P, D] of their positions, visible or not [B, P] -> keys and
        values of every layer."""
        caches = []
        for layer in self.layers[:-1]:
            x, cache = layer(x, rotation, visible)
            caches.append(cache)
        keys, values = zip(*caches, self.layers[-1](x, rotation), strict=True)
        return _stacked(keys), _stacked(values)
