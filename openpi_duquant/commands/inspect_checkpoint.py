"""openpi-duquant inspect-checkpoint."""

from collections.abc import Iterable, Mapping
import pathlib
from statistics import mean
from typing import Any

import tyro

from openpi_duquant.accuracy import weight_error
from openpi_duquant.architecture import EMBEDDING
from openpi_duquant.architecture import EXPERT_LM_HEAD
from openpi_duquant.architecture import PALIGEMMA
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.checkpoint.load import tensors_of
from openpi_duquant.checkpoint.load import verify
from openpi_duquant.commands.console import console
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import folded_tensors
from openpi_duquant.conversion import make_plan
from openpi_duquant.progress import progress_bar
from openpi_duquant.report import markdown_table
from openpi_duquant.report import write_json

COMPONENTS = {
    "vision tower": PALIGEMMA + "model.vision_tower.",
    "projector": PALIGEMMA + "model.multi_modal_projector.",
    "language model": LANGUAGE_MODEL,
    "embedding": EMBEDDING,
    "action expert": ACTION_EXPERT,
    "action and time heads": "",
}

ERRORS = ("weight_error", "output_error")
"""Of a weight, against the source; and of a layer's outputs, as calibration found it."""


def inspect_checkpoint(
    checkpoint: tyro.conf.Positional[pathlib.Path],
    *,
    source: pathlib.Path | None = None,
    output: pathlib.Path | None = None,
) -> None:
    """Show what a converted checkpoint holds: components, layers, bits, folds, bytes; errors, given the source.

    Args:
        checkpoint: A checkpoint that convert-checkpoint made.
        source: The checkpoint it was made of: adds the relative error of every layer's weight.
        output: Folder for inspection.md and inspection.json.
    """
    manifest = Manifest.load(checkpoint)
    with SafetensorsReader(checkpoint) as reader:
        verify(reader, manifest, checkpoint)
        errors = _weight_errors(reader, manifest, source) if source else {}
        results = _results(reader.types, manifest, errors)
    text = _markdown(checkpoint.name, manifest, results)
    console.print(text)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "inspection.md").write_text(text + "\n")
        write_json(output / "inspection.json", results)


def _weight_errors(converted: SafetensorsReader, manifest: Manifest, source: pathlib.Path) -> dict[str, float]:
    """Relative error of every layer's weight against the folded source, computed layer by layer."""
    with SafetensorsReader(source) as reader:
        if reader.digest() != manifest.source["sha256"]:
            raise DuQuantError(f"{source}: is not the checkpoint that this one was made of (sha256 differs)")
        plan = make_plan(reader.types, manifest.config, calibrated=manifest.calibration is not None)
        errors = {}
        read = {name: kind for name, kind in plan.source.items() if name != EXPERT_LM_HEAD}
        with progress_bar("Comparing weights", sum(iter_bytes(read))) as progress:
            for name, weight in folded_tensors(reader.read, plan):
                layer = name.removesuffix(".weight")
                if layer in manifest.layers:
                    tensors = tensors_of(layer, manifest.layers, converted)
                    errors[layer] = weight_error(weight, manifest.layers[layer], tensors)
                progress(sum(iter_bytes({name: plan.source[name]})))
    return errors


def _results(types: Mapping[str, TensorType], manifest: Manifest, errors: Mapping[str, float]) -> dict[str, Any]:
    components: dict[str, dict[str, int]] = {}
    sizes = dict(zip(types, iter_bytes(types)))
    for name, size in sizes.items():
        component = components.setdefault(_component(name), {"bytes": 0, "quantized_layers": 0, "quantized_bytes": 0})
        component["bytes"] += size
        component["quantized_bytes"] += size if name.rpartition(".")[0] in manifest.layers else 0
    for layer in manifest.layers:
        components[_component(layer)]["quantized_layers"] += 1
    layers = {
        layer: {
            "shape": [spec.out_features, spec.in_features],
            "weight_bits": spec.weight_bits,
            "activation_bits": spec.activation_bits,
            "run_time": _run_time(layer, manifest),
            "folded": [fold["kind"] for fold in manifest.folds if f"{layer}.weight" in fold["tensors"]],
            "bytes": sum(size for name, size in sizes.items() if name.rpartition(".")[0] == layer),
            "weight_error": errors.get(layer),
            "output_error": manifest.calibration["errors"].get(layer) if manifest.calibration else None,
        }
        for layer, spec in manifest.layers.items()
    }
    return {"components": components, "layers": layers, "folds": manifest.folds, "counts": manifest.counts}


def _component(name: str) -> str:
    return next(component for component, prefix in COMPONENTS.items() if name.startswith(prefix))


def _run_time(layer: str, manifest: Manifest) -> list[str]:
    """What is done to the layer's input and output at run time."""
    spec = manifest.layers[layer]
    steps = {
        f"rotate {spec.rotation_block}": spec.pre_rotation,
        "permute": spec.permute,
        f"{spec.rotation} {spec.rotation_block}": spec.rotation_block > 0,
        f"restore {spec.output_rotation} {spec.output_rotation_block}": spec.output_rotation in ("hadamard", "matrix"),
    }
    return [step for step, done in steps.items() if done]


def _markdown(title: str, manifest: Manifest, results: Mapping[str, Any]) -> str:
    components = [
        (name, values["quantized_layers"], f"{values['bytes']:,}", f"{values['quantized_bytes']:,}")
        for name, values in results["components"].items()
    ]
    known = [error for error in ERRORS if any(values[error] is not None for values in results["layers"].values())]
    layers = [
        (
            name,
            "x".join(map(str, values["shape"])),
            f"W{values['weight_bits']}A{values['activation_bits']}",
            _joined(values["run_time"]),
            _joined(values["folded"]),
            f"{values['bytes']:,}",
            *("-" if values[error] is None else f"{values[error]:.4f}" for error in known),
        )
        for name, values in results["layers"].items()
    ]
    errors = [error.replace("_", " ") for error in known]
    header = "layer", "out x in", "bits", "at run time", "folded", "bytes", *errors
    counts = manifest.counts
    origin = f"{manifest.source['bytes']:,} bytes of {'/'.join(manifest.source['dtypes'])}"
    sections = [
        f"# {title}",
        f"{counts['layers']} quantized layers, {len(manifest.folds)} folds, {counts['bytes']:,} bytes.",
        _rounding(manifest),
        f"Made by openpi-duquant {manifest.tool_version} from {origin} (sha256 {manifest.source['sha256'][:16]}...).",
        markdown_table(("component", "quantized layers", "bytes", "of these in quantized layers"), components),
        markdown_table(header, layers),
    ]
    return "\n\n".join(sections)


def _rounding(manifest: Manifest) -> str:
    """How the weights were rounded, and what that means for the errors in the table."""
    if manifest.calibration is None:
        return "Weights are rounded to nearest."
    errors = manifest.calibration["errors"]
    return (
        f"Weights are rounded by GPTQ, calibrated on {manifest.calibration.get('count', 'some')} observations "
        f"({manifest.calibration.get('source', 'source not recorded')}): output error {mean(errors.values()):.4f} on "
        "average. It trades the error of weights, which grows, for that of outputs. Layers without one never run."
    )


def _joined(steps: Iterable[str]) -> str:
    return ", ".join(steps) or "-"
