"""Layers that read one input, as one layer: fewer and larger matmuls."""

from collections.abc import Sequence
import dataclasses

import torch
from torch import nn

from openpi_duquant.linear.module import QuantLinear

_STACKED = ("weight_packed", "weight_scale", "output_rotation", "bias")


def merge_(parent: nn.Module, names: Sequence[str], merged: str) -> None:
    """Replaces children of `parent` that read one input by one layer, whose output is theirs side by side.

    They stay as they are where they cannot be one layer: some quantized and some not, or otherwise quantized.

    Args:
        parent: Their module.
        names: The children, nn.Linear or QuantLinear.
        merged: Name of the one layer.
    """
    layers = [parent.get_submodule(name) for name in names]
    layer = _merged_quantized(layers) if isinstance(layers[0], QuantLinear) else _merged_float(layers)
    if layer is None:
        return
    for name in names:
        delattr(parent, name)
    setattr(parent, merged, layer.requires_grad_(requires_grad=False).eval())


def _merged_float(layers: Sequence[nn.Module]) -> nn.Linear | None:
    biased = {getattr(layer, "bias", None) is not None for layer in layers}
    if not all(type(layer) is nn.Linear for layer in layers) or len(biased) > 1:
        return None
    with torch.device("meta"):
        merged = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=biased == {True})
    for name, _ in list(merged.named_parameters()):
        stacked = torch.cat([getattr(layer, name).detach() for layer in layers])
        setattr(merged, name, nn.Parameter(stacked, requires_grad=False))
    return merged


def _merged_quantized(layers: Sequence[nn.Module]) -> QuantLinear | None:
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return None
    total = sum(layer.out_features for layer in layers)
    specs = {dataclasses.replace(layer.spec, out_features=total) for layer in layers}
    first = layers[0]
    block = first.spec.output_rotation_block
    if len(specs) > 1 or (block and any(layer.out_features % block for layer in layers)):
        return None
    given = {"backend": first.backend, "dtype": first.dtype, "tokens": first.tokens}
    merged = QuantLinear(specs.pop(), **given, device="meta")
    states = [layer.state_dict() for layer in layers]
    stacked = {name: torch.cat([state[name] for state in states]) for name in _STACKED if name in states[0]}
    merged.load_state_dict(states[0] | stacked, assign=True)
    return merged
