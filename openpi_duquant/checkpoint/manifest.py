"""duquant.json: what a converted checkpoint holds, layer by layer and fold by fold, and what it came from."""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import torch

from openpi_duquant.architecture import EXPERT_LM_HEAD
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import kept_in_float32
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear.spec import SHARED_TENSORS

MANIFEST_NAME = "duquant.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record of a converted checkpoint.

    Attributes:
        tool_version: Version of openpi-duquant that wrote it.
        config: What was asked for.
        architecture: Sizes of the policy.
        source: Of the source: "sha256", "dtypes" and "bytes" of its tensors.
        layers: Every quantized layer.
        folds: Every exact change to floating-point weights, as `folds.Fold.to_json`.
        float_dtypes: Dtype name of every tensor that is not quantized.
        counts: "layers", "quantized_parameters", "bytes" of the result, "quantized_bytes" and what these layers take in
            bf16, "quantized_bytes_bf16".
        sha256: Of the result's `model.safetensors`, as `SafetensorsReader.digest`.
        calibration: What it was calibrated on, and what was found, `Calibrator.errors` and `.corrections`; None:
            weights are rounded to nearest.
    """

    tool_version: str
    config: DuQuantConfig
    architecture: Architecture
    source: dict[str, Any]
    layers: dict[str, LayerSpec]
    folds: list[dict[str, Any]]
    float_dtypes: dict[str, str]
    counts: dict[str, int]
    sha256: str
    calibration: dict[str, Any] | None = None

    def types(self) -> dict[str, TensorType]:
        """Dtype and shape of every tensor of `model.safetensors`."""
        return output_types(self.architecture, self.layers, self.float_dtypes)

    def save(self, folder: pathlib.Path) -> None:
        """Writes `folder/duquant.json`, with a hash of its own content."""
        values = dataclasses.asdict(self) | {"config": self.config.to_json()}
        values = {"format_version": FORMAT_VERSION} | values | {"manifest_sha256": _digest(values)}
        (folder / MANIFEST_NAME).write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Manifest":
        """Reads `folder/duquant.json`.

        Raises:
            DuQuantError: If it is missing, of another format version, or not as it was written.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise DuQuantError(f"{path}: is not there; openpi-duquant convert-checkpoint makes it")
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise DuQuantError(f"{path}: not a readable manifest ({type(error).__name__})") from None
        version = values.pop("format_version", None) if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise DuQuantError(
                f"{path}: format version {version!r}, this openpi-duquant reads {FORMAT_VERSION}; "
                "install a matching version or convert the source again"
            )
        if values.pop("manifest_sha256", None) != _digest(values):
            raise DuQuantError(f"{path}: is not as it was written (its sha256 differs); convert the source again")
        layers = {name: LayerSpec(**spec) for name, spec in values["layers"].items()}
        config, architecture = DuQuantConfig.from_json(values["config"]), Architecture.from_json(values["architecture"])
        return cls(**values | {"config": config, "architecture": architecture, "layers": layers})


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def output_types(
    architecture: Architecture, layers: Mapping[str, LayerSpec], float_dtypes: Mapping[str, str]
) -> dict[str, TensorType]:
    """Dtype and shape of every tensor of a converted checkpoint.

    Args:
        architecture: Sizes of the policy.
        layers: Its quantized layers.
        float_dtypes: Dtype name of every floating-point tensor that is kept.
    """
    types: dict[str, TensorType] = {}
    for name, shape in parameter_shapes(architecture).items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            types[name] = getattr(torch, float_dtypes[name]), shape
            continue
        for tensor, kind in layer.tensors().items():
            if tensor not in SHARED_TENSORS or layer.group == name.removesuffix(".weight"):
                types[name.removesuffix("weight") + tensor] = kind
    return types


def kept_dtypes(types: Mapping[str, TensorType], layers: Iterable[str]) -> dict[str, str]:
    """Dtype names of a source's tensors that stay in floating point.

    The source's precision where openpi computes in fp32, else bf16; the expert's unused lm_head is left out.
    """
    quantized = {name + ".weight" for name in layers}
    return {
        name: str(dtype if kept_in_float32(name) else torch.bfloat16).removeprefix("torch.")
        for name, (dtype, _) in types.items()
        if name not in quantized and name != EXPERT_LM_HEAD
    }
