"""Corrections of what quantization does to the scale of attention, factors that weight scales absorb at no cost.

Attention temperature matching and output head balancing of QuantVLA (Zhang et al. 2026, arXiv:2602.20309).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from openpi_duquant.calibration.states import Call
from openpi_duquant.engine.gemma import DecoderLayer


@torch.no_grad()
def logit_spread(layer: DecoderLayer, calls: Iterable[Call]) -> Tensor:
    """Standard deviation of each head's attention logits about their mean over the keys, which is what softmax sees.

    Args:
        layer: Of either model.
        calls: What it is called with.

    Returns:
        [H] fp64, over all calls and queries, before the division by sqrt(head_dim).
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for call in calls:
        norm, _ = layer.input_layernorm.prologue(call.modulations[0])
        queries, (keys, _) = layer.self_attn.project(call.x, norm, *call.rotation)
        if call.cached is not None:
            keys = torch.cat((call.cached[0], keys), dim=1)
        logits = torch.einsum("bshd,bpd->hbsp", queries.float(), keys.float())
        total = total + logits.var(dim=-1, correction=0).double().sum(dim=(1, 2)).cpu()
        count += logits.shape[1] * logits.shape[2]
    return (total / count).sqrt()


@torch.no_grad()
def attention_energy(layer: DecoderLayer, calls: Iterable[Call]) -> Tensor:
    """Root of the mean square of what attention adds to the residual stream, before its gate: [1] fp64."""
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for call in calls:
        norm, _ = layer.input_layernorm.prologue(call.modulations[0])
        x, _ = layer.self_attn(call.x, norm, None, call.rotation, None, call.cached, state_first=call.state_first)
        total += (x.double() - call.x.double()).square().sum().cpu()
        count += x.numel()
    return (total / count).sqrt()


PROTECTED = {"q_proj": ("attention_temperature", logit_spread), "o_proj": ("output_energy", attention_energy)}
"""Layers whose scales are corrected: the field of `DuQuantConfig` that asks for it, and what is brought back."""
