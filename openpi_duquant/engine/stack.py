"""The matrices of an expert's layers side by side, so that one launch runs them all: see `kernels.persistent`."""

from collections.abc import Sequence

import torch
from torch import nn

from openpi_duquant import transforms
from openpi_duquant.kernels import persistent
from openpi_duquant.kernels.persistent import Matrix
from openpi_duquant.kernels.persistent import Stack
from openpi_duquant.kernels.transform import why_not_fused
from openpi_duquant.linear import QuantLinear

_MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def stack_(layers: Sequence[nn.Module]) -> Stack | None:
    """The matrices of optimized decoder layers, whose tensors become views of them; None if one launch cannot run them.

    They must be int4 on the `triton` backend, of widths that are powers of two, rotated by Hadamards before and by
    nothing after, with o's input only rounded; all layers alike.
    """
    matrices = []
    for name in _MATRICES:
        found = [layer.get_submodule(name) for layer in layers if _has(layer, name)]
        if len(found) < len(layers) or not _alike(found):
            return None
        matrices.append(found)
    if not all(layer.only_rounds for layer in matrices[1]):
        return None
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    weights = torch.stack([norm.weight.float() for norm in norms]) if hasattr(norms[0], "weight") else None
    return Stack(*(_stacked_(matrix) for matrix in matrices), weights)


def _has(layer: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return hasattr(layer.get_submodule(parent), child)


def _alike(layers: Sequence[nn.Module]) -> bool:
    if not all(isinstance(layer, QuantLinear) and layer.prepared() == "triton" for layer in layers):
        return False
    first = layers[0]
    tensors = {tuple((n, b.shape, b.dtype) for n, b in layer.named_buffers()) for layer in layers}
    rotations = {(layer.spec.rotation, layer.spec.rotation_block) for layer in layers}
    return (
        len(tensors) == len(rotations) == 1
        and first.spec.weight_bits == 4
        and persistent.takes_width(first.in_features)
        and first.bias is None
        and first.restore is None
        and transforms.as_operands(first.transform.rotation)[0] is None
        and why_not_fused(first.transform, first.in_features) is None
    )


def _stacked_(layers: Sequence[QuantLinear]) -> Matrix:
    tensors = []
    for name in ("weight_packed", "weight_scale", "permutation"):
        if getattr(layers[0], name) is None:
            tensors.append(None)
            continue
        parts = [getattr(layer, name) for layer in layers]
        tensors.append(torch.stack(parts))
        for layer, part, tensor in zip(layers, parts, tensors[-1], strict=True):
            if part.is_cuda:  # it is read on this stream, and freed here
                part.record_stream(torch.cuda.current_stream())
            setattr(layer, name, tensor)
    return Matrix(*tensors, transforms.as_operands(layers[0].transform.rotation)[1])
