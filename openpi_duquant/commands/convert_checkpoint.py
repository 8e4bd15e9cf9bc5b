"""openpi-duquant convert-checkpoint."""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import time
from typing import Any

import tyro

from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import resolve_device
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import preset as preset_config
from openpi_duquant.config import read_environment
from openpi_duquant.conversion import Plan
from openpi_duquant.conversion import convert
from openpi_duquant.conversion import make_plan
from openpi_duquant.conversion import open_source
from openpi_duquant.progress import progress_bar
from openpi_duquant.report import markdown_table


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
    return {"config": config, "packdir": environment.packdir, "dry_run": environment.dry_run}


def convert_checkpoint(
    source: tyro.conf.Positional[pathlib.Path],
    target: tyro.conf.Positional[pathlib.Path | None] = None,
    *,
    preset: str = "default",
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
        device: Where the arithmetic is done: cpu, cuda, cuda:1, or auto (cuda where there is one).
        dry_run: List layers and totals, write nothing.
        packdir: Where converted checkpoints live; beside the source when not given.
        config: What is quantized, and how.
    """
    where = resolve_device(device)
    with open_source(source) as reader:
        plan = make_plan(reader.types, config)
    if dry_run:
        console.print(_layer_table(plan))
        console.print(_totals(plan))
        return
    if target is None:
        target = (packdir or source.resolve().parent) / f"{source.resolve().name}-{preset}"
    start = time.monotonic()
    with progress_bar(f"Converting {source.name}", sum(iter_bytes(plan.source))) as progress:
        convert(source, target, config, device=where, progress=progress)
    console.print(_totals(plan))
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


def _totals(plan: Plan) -> str:
    counts, before = plan.counts(), sum(iter_bytes(plan.source))
    return (
        f"{counts['layers']} layers quantized ({counts['quantized_parameters'] / 1e6:,.1f} M parameters), "
        f"{len(plan.folds)} folds; their weights with scales and transforms take "
        f"{counts['quantized_bytes'] / counts['quantized_bytes_bf16']:.3f} of bf16\n"
        f"{before:,} bytes before, {counts['bytes']:,} after ({counts['bytes'] / before:.3f})"
    )
