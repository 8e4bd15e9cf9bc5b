"""openpi-duquant convert-checkpoint."""

import dataclasses
import pathlib
import time
import types
from typing import Annotated, Any, get_type_hints

import docstring_parser
import tyro

from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import progress_bar
from openpi_duquant.commands.console import resolve_device
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import preset as preset_config
from openpi_duquant.config import read_environment
from openpi_duquant.convert import Plan
from openpi_duquant.convert import convert
from openpi_duquant.convert import make_plan
from openpi_duquant.convert import open_source
from openpi_duquant.report import markdown_table


def _overrides() -> type:
    """A dataclass with the fields of DuQuantConfig, each None unless given on the command line."""
    documented = {p.arg_name: p.description for p in docstring_parser.parse(DuQuantConfig.__doc__ or "").params}
    fields = []
    for name, kind in get_type_hints(DuQuantConfig).items():
        optional = kind if isinstance(kind, types.UnionType) else kind | None
        fields.append(
            (
                name,
                Annotated[optional, tyro.conf.arg(help=documented[name], help_behavior_hint="(default: the preset's)")],
                None,
            )
        )
    return dataclasses.make_dataclass("Overrides", fields, frozen=True)


Overrides: Any = _overrides()


def convert_checkpoint(
    source: tyro.conf.Positional[pathlib.Path],
    target: tyro.conf.Positional[pathlib.Path | None] = None,
    *,
    preset: str = "default",
    device: str = "auto",
    dry_run: bool = False,
    config: tyro.conf.OmitArgPrefixes[Overrides] = Overrides(),  # noqa: B008
) -> None:
    """Convert a pi0 or pi0.5 PyTorch checkpoint of openpi into a W4A8 checkpoint.

    A field of the configuration is taken from the command line, else from its OPENPI_DUQUANT_* variable, else from the
    preset.

    Args:
        source: Folder with model.safetensors and assets/.
        target: Folder to make; <source>-<preset> beside the source, or in OPENPI_DUQUANT_PACKDIR, when not given.
        preset: default, simple, optimized, dit_qkvo, llm, full_llm_dit or quantvla.
        device: Where the arithmetic is done: cpu, cuda, cuda:1, or auto (cuda where there is one).
        dry_run: List layers and totals, write nothing.
        config: Fields of the configuration, where they shall differ from the preset's.
    """
    where = resolve_device(device)
    environment = read_environment()
    packdir = environment.pop("packdir", None)
    dry_run = environment.pop("dry_run", False) or dry_run
    given = {name: value for name, value in vars(config).items() if value is not None}
    config = dataclasses.replace(preset_config(preset), **environment | given)
    with open_source(source) as reader:
        plan = make_plan(reader.types, config)
    if dry_run:
        console.print(_layer_table(plan))
        console.print(_totals(plan))
        return
    if target is None:
        target = (pathlib.Path(packdir) if packdir else source.resolve().parent) / f"{source.resolve().name}-{preset}"
    start = time.monotonic()
    with progress_bar(f"Converting {source.name}", sum(iter_bytes(plan.source))) as progress:
        convert(source, target, config, device=where, progress=progress)
    console.print(_totals(plan))
    console.print(f"wrote {target} in {time.monotonic() - start:.0f} s")


def _layer_table(plan: Plan) -> str:
    header = ("layer", "out x in", "bits", "permute", "rotation", "output rotation", "group scales")
    rows = [
        (
            name,
            f"{spec.out_features}x{spec.in_features}",
            f"W{spec.weight_bits}A{spec.activation_bits}",
            "run time" if spec.permute else "-",
            f"{spec.rotation} {spec.rotation_block}" if spec.rotation_block else "-",
            f"{spec.output_rotation} {spec.output_rotation_block}" if spec.output_rotation_block else "-",
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
