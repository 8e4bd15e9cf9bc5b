"""Streaming conversion: one decoder layer at a time is read, folded, quantized and written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import importlib.metadata
import itertools
import pathlib
import shutil

import torch
from torch import Tensor

from openpi_duquant.architecture import EXPERT_LM_HEAD
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import linear_shapes
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.checkpoint.files import WEIGHTS_NAME
from openpi_duquant.checkpoint.files import SafetensorsReader
from openpi_duquant.checkpoint.files import SafetensorsWriter
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.checkpoint.files import renamed_when_whole
from openpi_duquant.checkpoint.manifest import MANIFEST_NAME
from openpi_duquant.checkpoint.manifest import Manifest
from openpi_duquant.checkpoint.manifest import kept_dtypes
from openpi_duquant.checkpoint.manifest import output_types
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.folds import Fold
from openpi_duquant.folds import apply_folds
from openpi_duquant.folds import decoder_layer
from openpi_duquant.folds import plan_folds
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import plan_layers
from openpi_duquant.linear import quantize_group
from openpi_duquant.linear.quantize import members_by_group
from openpi_duquant.linear.quantize import require_finite

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[int], None]
"""Called with the number of source bytes done since the last call."""


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

    @property
    def types(self) -> dict[str, TensorType]:
        """Dtype and shape of every tensor of the result."""
        return output_types(self.architecture, self.layers, self.float_dtypes)

    def counts(self) -> dict[str, int]:
        """Layers, parameters and bytes, as `Manifest.counts`."""
        parameters = sum(spec.in_features * spec.out_features for spec in self.layers.values())
        types = self.types
        quantized = {name: kind for name, kind in types.items() if _layer_of(name) in self.layers}
        return {
            "layers": len(self.layers),
            "quantized_parameters": parameters,
            "bytes": sum(iter_bytes(types)),
            "quantized_bytes": sum(iter_bytes(quantized)),
            "quantized_bytes_bf16": 2 * parameters,
        }


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def make_plan(source: Mapping[str, TensorType], config: DuQuantConfig) -> Plan:
    """Plans the conversion of a checkpoint with these tensors.

    Raises:
        DuQuantError: If it is not a pi0 or pi0.5 checkpoint, or `config` selects nothing or does not fit it, or
            `config` asks for GPTQ, which needs calibration data.
    """
    if config.weight_rounding == "gptq":
        raise DuQuantError("weight_rounding: 'gptq' needs calibration data, which no conversion takes yet; use 'auto'")
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


def convert(
    source: pathlib.Path | str,
    target: pathlib.Path | str,
    config: DuQuantConfig,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda _: None,
) -> Manifest:
    """Converts a checkpoint of openpi into a W4A8 checkpoint.

    The result is written beside the target and renamed when it is whole.

    Args:
        source: Folder with `model.safetensors` (or its shards) and `assets/`.
        target: Folder to make.
        config: The configuration.
        device: Where the arithmetic is done, one decoder layer at a time.
        progress: Called with source bytes as they are done.

    Returns:
        The manifest of the result.

    Raises:
        DuQuantError: On a source that is missing, damaged, already converted, not finite or changed meanwhile; on a
            target that exists; or as `make_plan`.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    version = importlib.metadata.version("openpi-duquant")
    with open_source(source) as reader:
        plan = make_plan(reader.types, config)
        _check_target(source, target, plan.counts()["bytes"])
        before = _identities(reader.files)
        with renamed_when_whole(target) as partial:
            with SafetensorsWriter(partial / WEIGHTS_NAME, plan.types) as writer:
                for name, tensor in convert_tensors(lambda name: reader.read(name).to(device), plan, progress):
                    writer.write(name, tensor)
            _copy_assets(source, partial)
            manifest = _manifest(reader, plan, partial, version)
            manifest.save(partial)
            if _identities(reader.files) != before:
                raise DuQuantError(f"{source}: changed while it was read; convert it again when it is complete")
    return manifest


def _identities(paths: Sequence[pathlib.Path]) -> list[tuple[int, ...]]:
    """What changes when a file is written to or replaced."""
    states = [path.stat() for path in paths]
    return [(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]


def _check_target(source: pathlib.Path, target: pathlib.Path, needed: int) -> None:
    if target.exists():
        raise DuQuantError(f"{target}: exists already; name another folder or remove it")
    if source.resolve() in target.resolve().parents:
        raise DuQuantError(f"{target}: lies within the source; name a folder beside it")
    existing = next(folder for folder in target.resolve().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DuQuantError(f"{target}: takes {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB left")


def open_source(source: pathlib.Path) -> SafetensorsReader:
    """The reader of a checkpoint to convert.

    Raises:
        DuQuantError: If it is missing, damaged or already converted.
    """
    if (source / MANIFEST_NAME).exists():
        raise DuQuantError(f"{source}: is converted already; convert the original checkpoint instead")
    return SafetensorsReader(source)


def convert_tensors(
    read: Callable[[str], Tensor], plan: Plan, progress: Progress = lambda _: None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the result, one decoder layer of both Gemmas after the other.

    Args:
        read: Returns a tensor of the source by name, on the device where the arithmetic is done.
        plan: The plan.
        progress: Called with source bytes as they are done.

    Raises:
        DuQuantError: On a weight that is not finite.
    """
    types = plan.types
    for weights in _folded_units(read, plan):
        yield from ((name, tensor) for name, tensor in _quantized(weights, plan) if name in types)
        for name, weight in weights.items():
            if name in types:
                yield name, weight.to(types[name][0])
        progress(sum(iter_bytes({name: plan.source[name] for name in weights})))
        del weights, weight
    progress(sum(iter_bytes({name: kind for name, kind in plan.source.items() if name == EXPERT_LM_HEAD})))


def folded_tensors(read: Callable[[str], Tensor], plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the source with the folds of the plan, not quantized; those that changed in fp32."""
    for weights in _folded_units(read, plan):
        yield from weights.items()


def _folded_units(read: Callable[[str], Tensor], plan: Plan) -> Iterator[dict[str, Tensor]]:
    """Tensors that must be at hand together, folded; originals are let go as they are replaced."""
    for names in _units(plan):
        folds = [fold for fold in plan.folds if fold.tensors[0] in names]
        weights = apply_folds(_read_finite(read, names), folds, plan.layers, plan.config)
        for name in itertools.chain.from_iterable(fold.tensors for fold in folds):
            require_finite(name, weights[name])
        yield weights
        del weights


def _read_finite(read: Callable[[str], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    weights = {name: read(name) for name in names}
    for name, weight in weights.items():
        require_finite(name, weight)
    return weights


def _units(plan: Plan) -> list[list[str]]:
    """Names of source tensors that must be at hand together."""
    units: dict[object, list[str]] = {}
    for name in plan.source:
        if name == EXPERT_LM_HEAD:
            continue
        layer = plan.layers.get(_layer_of(name))
        index = decoder_layer(name)
        key = index if index is not None else layer.group if layer else name
        units.setdefault(key, []).append(name)
    return list(units.values())


def _quantized(weights: Mapping[str, Tensor], plan: Plan) -> Iterator[tuple[str, Tensor]]:
    present = {layer: spec for layer, spec in plan.layers.items() if layer + ".weight" in weights}
    for layers in members_by_group(present).values():
        tensors = quantize_group({layer: weights[layer + ".weight"] for layer in layers}, plan.layers, plan.config)
        for layer, by_name in tensors.items():
            yield from ((f"{layer}.{name}", tensor) for name, tensor in by_name.items())


def _copy_assets(source: pathlib.Path, target: pathlib.Path) -> None:
    if (source / "assets").is_dir():
        shutil.copytree(source / "assets", target / "assets")
    if (source / "config.json").is_file():
        shutil.copy(source / "config.json", target)


def _manifest(reader: SafetensorsReader, plan: Plan, target: pathlib.Path, version: str) -> Manifest:
    with SafetensorsReader(target) as written:
        digest = written.digest()
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in plan.source.values()})
    return Manifest(
        tool_version=version,
        config=plan.config,
        architecture=plan.architecture,
        source={
            "sha256": reader.digest(),
            "dtypes": dtypes,
            "bytes": sum(iter_bytes(reader.types)),
        },
        layers=plan.layers,
        folds=[fold.to_json() for fold in plan.folds],
        float_dtypes=plan.float_dtypes,
        counts=plan.counts(),
        sha256=digest,
    )
