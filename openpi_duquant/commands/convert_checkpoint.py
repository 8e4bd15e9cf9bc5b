"""openpi-duquant convert-checkpoint."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any

import tyro

from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import resolve_device
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import preset as preset_config
from openpi_duquant.conversion import Plan
from openpi_duquant.conversion import convert
from openpi_duquant.conversion import make_plan
from openpi_duquant.conversion import open_source
from openpi_duquant.environment import read_environment
from openpi_duquant.progress import progress_bars
from openpi_duquant.recording import load_recording
from openpi_duquant.report import markdown_table

WORST = 5
"""Layers that are listed after a calibration."""


def defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """Defaults of `convert_checkpoint` that depend on the preset among the arguments, and on the environment.

    Raises:
        DuQuantError: On an unknown preset or variable, or a malformed value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="default")
    preset = parser.parse_known_args(arguments)[0].preset
    environment = read_environment()
    config = dataclasses.replace(preset_config(preset), **environment.fields)
    switches = {name: getattr(environment, name) for name in ("calibration", "dry_run", "packdir")}
    return {"config": config} | switches


def convert_checkpoint(
    source: tyro.conf.Positional[pathlib.Path],
    target: tyro.conf.Positional[pathlib.Path | None] = None,
    *,
    preset: str = "default",
    calibration: pathlib.Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
    packdir: pathlib.Path | None = None,
    config: tyro.conf.OmitArgPrefixes[DuQuantConfig] = DuQuantConfig(),  # noqa: B008
) -> None:
    """Convert a pi0 or pi0.5 PyTorch checkpoint of openpi into a W4A8 checkpoint.

    A field of the configuration is taken from the command line, else from its OPENPI_DUQUANT_* variable, else from the
    preset; the defaults shown are those.

    Args:
        source: Folder with model.safetensors and assets/.
        target: Folder to make; <packdir>/<source>-<preset> when not given.
        preset: default, simple, optimized, dit_qkvo, llm, full_llm_dit or quantvla.
        calibration: Recorded observations to round the weights for, see record-observations; to nearest when not given.
        device: Where the arithmetic is done: cpu, cuda, cuda:1, or auto (cuda where there is one).
        dry_run: List layers and totals, write nothing.
        packdir: Where converted checkpoints live; beside the source when not given.
        config: What is quantized, and how.
    """
    where = resolve_device(device)
    recording = calibration and load_recording(calibration)
    with open_source(source) as reader:
        plan = make_plan(reader.types, config, calibrated=recording is not None)
    before = sum(iter_bytes(plan.source))
    if dry_run:
        console.print(_layer_table(plan))
        console.print(_totals(plan.counts(), len(plan.folds), before))
        return
    if target is None:
        target = (packdir or source.resolve().parent) / f"{source.resolve().name}-{preset}"
    start = time.monotonic()
    with progress_bars() as bars:

        def bar(title: str, total: int) -> Callable[[int], None]:
            return functools.partial(bars.advance, bars.add_task(title, total=total))

        advance = {"observed": bar("Running the original", len(recording.examples))} if recording else {}
        advance["progress"] = bar(f"Converting {source.name}", before)
        manifest = convert(source, target, config, calibration=recording, device=where, **advance)
    console.print(_totals(manifest.counts, len(manifest.folds), before))
    console.print(_rounding(manifest))
    console.print(f"wrote {target} in {time.monotonic() - start:.0f} s")


def _layer_table(plan: Plan) -> str:
    header = ("layer", "out x in", "bits", "permute", "rotation", "output rotation", "folded", "group scales")
    rows = [
        (
            name,
            f"{spec.out_features}x{spec.in_features}",
            f"W{spec.weight_bits}A{spec.activation_bits}",
            "run time" if spec.permute else "-",
            f"{spec.rotation} {spec.rotation_block}" if spec.rotation_block else "-",
            f"{spec.output_rotation} {spec.output_rotation_block}" if spec.output_rotation_block else "-",
            ", ".join(fold.kind for fold in plan.folds if f"{name}.weight" in fold.tensors) or "-",
            spec.group_size or "per row",
        )
        for name, spec in plan.layers.items()
    ]
    return markdown_table(header, rows)


def _totals(counts: Mapping[str, int], folds: int, before: int) -> str:
    return (
        f"{counts['layers']} layers quantized ({counts['quantized_parameters'] / 1e6:,.1f} M parameters), "
        f"{folds} folds; their weights with scales and transforms take "
        f"{counts['quantized_bytes'] / counts['quantized_bytes_bf16']:.3f} of bf16\n"
        f"{before:,} bytes before, {counts['bytes']:,} after ({counts['bytes'] / before:.3f})"
    )


def _rounding(manifest: Manifest) -> str:
    """How the weights were rounded, and which layers have the most error."""
    if manifest.calibration is None:
        return (
            "weights rounded to nearest; for less error, record what the policy sees (record-observations) "
            "and give it as --calibration"
        )
    errors: dict[str, float] = manifest.calibration["errors"]
    if not errors:
        return "weights rounded to nearest: the observations say nothing of the inputs of these layers"
    raised = [spec for name, spec in manifest.layers.items() if spec.weight_bits > manifest.config.bits_of(name)]
    added = sum(spec.in_features * spec.out_features // 2 for spec in raised)
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]
    rows = [(name, manifest.layers[name].weight_bits, f"{errors[name]:.4f}") for name in worst]
    return (
        "calibrated: relative error of a layer's outputs, on these observations, "
        f"{statistics.mean(errors.values()):.4f} on average, {len(raised)} layers raised to 8 bits, "
        f"{added:,} bytes more; the largest:\n"
        f"{markdown_table(('layer', 'bits', 'error'), rows)}"
    )
