"""What a conversion will do, before any weight is read."""

from collections.abc import Mapping
import dataclasses
import functools

import torch

from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import linear_shapes
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.checkpoint.manifest import kept_dtypes
from openpi_duquant.checkpoint.manifest import output_types
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.folds import Fold
from openpi_duquant.folds import plan_folds
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import plan_layers

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion before any weight is read.

    Attributes:
        config: What was asked for.
        architecture: Sizes of the policy.
        source: Dtype and shape of every tensor of the source, in the order of `parameter_shapes`.
        layers: The quantized layers.
        folds: The folds, in order.
        float_dtypes: Dtype names of the tensors that stay in floating point.
    """

    config: DuQuantConfig
    architecture: Architecture
    source: dict[str, TensorType]
    layers: dict[str, LayerSpec]
    folds: list[Fold]
    float_dtypes: dict[str, str]

    @functools.cached_property
    def types(self) -> dict[str, TensorType]:
        """Dtype and shape of every tensor of the result."""
        return output_types(self.architecture, self.layers, self.float_dtypes)

    def counts(self) -> dict[str, int]:
        """Layers, parameters and bytes, as `Manifest.counts`."""
        parameters = sum(spec.in_features * spec.out_features for spec in self.layers.values())
        types = self.types
        quantized = {name: kind for name, kind in types.items() if layer_of(name) in self.layers}
        return {
            "layers": len(self.layers),
            "quantized_parameters": parameters,
            "bytes": sum(iter_bytes(types)),
            "quantized_bytes": sum(iter_bytes(quantized)),
            "quantized_bytes_bf16": 2 * parameters,
        }


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to."""
    return name.rpartition(".")[0]


def make_plan(source: Mapping[str, TensorType], config: DuQuantConfig, *, calibrated: bool = False) -> Plan:
    """Plans the conversion of a checkpoint with these tensors.

    Raises:
        DuQuantError: If it is not a pi0 or pi0.5 checkpoint, or `config` selects nothing or does not fit it, or
            `config` needs calibration data and there is none, or the other way round.
    """
    asked = {
        "weight_rounding: 'gptq'": config.weight_rounding == "gptq",
        "keep_error_below": config.keep_error_below is not None,
        "attention_temperature": config.attention_temperature,
        "output_energy": config.output_energy,
    }
    if not calibrated and any(asked.values()):
        fields = ", ".join(field for field in asked if asked[field])
        raise DuQuantError(f"{fields} needs calibration data; record some and give it, or do not ask")
    if calibrated and config.weight_rounding == "nearest":
        raise DuQuantError("weight_rounding: 'nearest' does not look at calibration data; give none, or take 'auto'")
    architecture = Architecture.infer({name: shape for name, (_, shape) in source.items()})
    for name, (dtype, _) in source.items():
        if dtype not in SOURCE_DTYPES:
            raise DuQuantError(f"{name}: is {dtype}; a checkpoint of openpi is float32, bfloat16 or float16")
    shapes = parameter_shapes(architecture)
    biased = [name.removesuffix(".bias") for name in shapes if name.endswith(".bias")]
    specs = plan_layers(linear_shapes(shapes), biased, config)
    folds, specs = plan_folds(shapes, specs, config)
    ordered = {name: source[name] for name in (*shapes, *source)}
    return Plan(config, architecture, ordered, specs, folds, kept_dtypes(ordered, specs))
