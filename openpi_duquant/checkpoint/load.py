"""What loading a converted checkpoint needs, whichever model it is loaded into."""

from collections.abc import Mapping
import pathlib

import torch
from torch import nn

from openpi_duquant.checkpoint.files import SafetensorsReader
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.checkpoint.manifest import Manifest
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear.spec import SHARED_TENSORS


def verify(reader: SafetensorsReader, manifest: Manifest, folder: pathlib.Path) -> None:
    """Raises DuQuantError unless names, dtypes, shapes and bytes are those that the manifest records."""
    expected: dict[str, TensorType] = manifest.types()
    for name in sorted(set(expected) | set(reader.types)):
        if expected.get(name) != reader.types.get(name):
            raise DuQuantError(
                f"{folder}: tensor {name} is {reader.types.get(name, 'missing')}, its manifest says "
                f"{expected.get(name, 'there is none')}; convert the source again"
            )
    packed = sum(name.endswith(".weight_packed") for name in reader.types)
    if not packed == len(manifest.layers) == manifest.counts["layers"]:
        raise DuQuantError(f"{folder}: holds {packed} quantized layers, its manifest says {manifest.counts['layers']}")
    if reader.digest() != manifest.sha256:
        raise DuQuantError(f"{folder}: the weights are not the manifest's (sha256 differs); convert the source again")


def place_quant_linears(
    model: nn.Module, layers: Mapping[str, LayerSpec], *, backend: str, dtype: torch.dtype
) -> list[str]:
    """Puts empty quantized layers (on the meta device) where `model` has layers of these names; returns those names.

    The engine leaves out layers that nothing reads; of those that a checkpoint has, the rest is placed.

    Raises:
        DuQuantError: If a layer of the model has another shape, or on an unknown backend.
    """
    modules = dict(model.named_modules())
    placed = [name for name in layers if name in modules]
    for name in placed:
        has, wanted = tuple(modules[name].weight.shape), (layers[name].out_features, layers[name].in_features)
        if has != wanted:
            raise DuQuantError(f"{name}: is {wanted} in the checkpoint and {has} in the model; take the model it is of")
        parent, _, child = name.rpartition(".")
        layer = QuantLinear(layers[name], backend=backend, dtype=dtype, device="meta")
        setattr(modules[parent], child, layer)
    return placed


def stored_name(name: str, layers: Mapping[str, LayerSpec]) -> str:
    """The name under which a tensor of a model is stored: of shared ones, that of the group's first layer."""
    layer, _, tensor = name.rpartition(".")
    return f"{layers[layer].group}.{tensor}" if layer in layers and tensor in SHARED_TENSORS else name
