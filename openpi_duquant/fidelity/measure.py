"""The whole comparison, with one full-size model in memory at a time and sums instead of activations."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import statistics
from typing import Any

import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant.accuracy import quantized_layers
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import MANIFEST_NAME
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import open_source
from openpi_duquant.engine import load_policy
from openpi_duquant.fidelity.actions import Trajectory
from openpi_duquant.fidelity.actions import Units
from openpi_duquant.fidelity.actions import compare_actions
from openpi_duquant.fidelity.actions import compare_steps
from openpi_duquant.fidelity.actions import denoise
from openpi_duquant.fidelity.actions import load_units
from openpi_duquant.fidelity.layers import activation_ratios
from openpi_duquant.fidelity.layers import by_component
from openpi_duquant.fidelity.layers import expert_by_step
from openpi_duquant.fidelity.layers import folded_original
from openpi_duquant.fidelity.layers import measure_layers
from openpi_duquant.fidelity.layers import worst_layers
from openpi_duquant.fidelity.methods import METHODS
from openpi_duquant.fidelity.methods import Group
from openpi_duquant.fidelity.methods import choose_groups
from openpi_duquant.fidelity.methods import collecting
from openpi_duquant.fidelity.methods import errors_by_method
from openpi_duquant.fidelity.methods import method_table
from openpi_duquant.fidelity.settings import Settings
from openpi_duquant.fidelity.settings import split
from openpi_duquant.linear import QuantLinear
from openpi_duquant.recording import Example
from openpi_duquant.recording import Recording

Progress = Callable[[str, int], Callable[[], object]]
"""Called with the title and length of every part of the work; returns what is called at every advance in it."""


def measure(
    original: pathlib.Path,
    converted: Sequence[pathlib.Path],
    recording: Recording,
    settings: Settings,
    progress: Progress = lambda *_: lambda: None,
) -> dict[str, Any]:
    """Compares converted checkpoints with the original that they were made of.

    Args:
        original: A checkpoint of openpi.
        converted: What was made of it; another checkpoint of openpi of the same sizes has actions alone compared.
        recording: The observations.
        settings: How.
        progress: See `Progress`.

    Returns:
        JSON values, see docs/accuracy.md.

    Raises:
        DuQuantError: If a checkpoint is missing, damaged, or not made of the original; if the recording is too small or
            of another policy; if the original's actions are not finite.
    """
    if settings.steps is None:
        settings = dataclasses.replace(settings, steps=recording.num_steps)
    kernels.check_name(settings.backend)
    names = labels(converted)
    manifests, architecture = _open(original, converted)
    recording.require_fit(architecture)
    units = load_units(original, pi05=architecture.pi05, action_dim=architecture.action_dim, asset=settings.asset)
    calibration, held_out = split(recording.examples, settings)
    advance = progress("Running the original", len(calibration) + len(held_out))
    expected, groups = _run_original(original, calibration, held_out, settings, advance)
    errors = _compare_methods(groups, settings, progress)
    method_layers = [name for group in groups for name in group.weights]
    method_rows = sorted({sum(map(len, group.calibration)) for group in groups})
    del groups  # weights and inputs
    comparison = _Comparison(original, held_out, expected, units, settings, progress)
    rows = [
        {"checkpoint": name} | comparison.of(folder, manifest)
        for name, folder, manifest in zip(names, converted, manifests)
    ]
    for row, manifest in zip(rows, manifests):
        used = manifest and manifest.calibration
        row["judged_by_its_calibration_data"] = bool(used and used.get("sha256") == recording.info.get("sha256"))
    layer_errors = {
        f"{row['checkpoint']}, {row['bits']}": {name: values["error"] for name, values in row["layers"].items()}
        for row in rows
    }
    return {
        "original": original.name,
        "observations": recording.info,
        "calibrated_on": len(calibration),
        "judged_by": len(held_out),
        "num_steps": settings.steps,
        "dtype": settings.dtype,
        "units": units.name,
        "trace": comparison.actions(expected[:1])[0].tolist(),
        "checkpoints": rows,
        "method_layers": method_layers,
        "method_rows": method_rows,
        "methods": method_table(errors, layer_errors) if errors else [],
    }


def _open(original: pathlib.Path, converted: Sequence[pathlib.Path]) -> tuple[list[Manifest | None], Architecture]:
    """The manifests of converted checkpoints, made of the original; None of those that are not quantized."""
    with open_source(original) as reader:
        architecture = Architecture.infer(reader.shapes)
        manifests = [Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None for folder in converted]
        digest = reader.digest() if any(manifests) else None
    for folder, manifest in zip(converted, manifests):
        if manifest and manifest.source["sha256"] != digest:
            raise DuQuantError(f"{folder}: was not converted from {original}, whose bytes are others; give its source")
        if not manifest:
            with open_source(folder) as reader:
                if Architecture.infer(reader.shapes) != architecture:
                    raise DuQuantError(f"{folder}: has other sizes than {original}")
    return manifests, architecture


def _bits(manifest: Manifest | None) -> str:
    """What a checkpoint's layers have: "W4A8"; "W4/8A8" where some have more."""
    if manifest is None:
        return "not quantized"
    weights, activations = (
        "/".join(map(str, sorted({getattr(spec, kind) for spec in manifest.layers.values()})))
        for kind in ("weight_bits", "activation_bits")
    )
    return f"W{weights}A{activations}"


def labels(folders: Sequence[pathlib.Path]) -> list[str]:
    """Names of folders, with as many of the folders above them as tell them apart.

    Raises:
        DuQuantError: If one is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DuQuantError("a converted checkpoint is given twice")


def _run_original(
    folder: pathlib.Path,
    calibration: Sequence[Example],
    held_out: Sequence[Example],
    settings: Settings,
    advance: Callable[[], object],
) -> tuple[list[Trajectory], list[Group]]:
    """What the original does on what is held out, and samples of what it feeds its layers."""
    policy = load_policy(folder, dtype=getattr(torch, settings.dtype), device=settings.device, optimize=False)
    groups = choose_groups(policy, settings.method_groups, settings.method_width) if calibration else []
    trajectories = []
    for kind, examples, rows in (
        ("calibration", calibration, settings.method_rows),
        ("held_out", held_out, settings.method_rows // 4),
    ):
        each = -(-rows // max(1, len(examples)))
        with collecting(policy, groups, kind, each, settings.steps) as begin:
            for example in examples:
                begin()
                trajectories.append(denoise(policy, example, settings.steps))
                if not trajectories[-1].x.isfinite().all():
                    raise DuQuantError(f"{folder}: NaN or Inf on observation {len(trajectories) - 1} of those used")
                advance()
    return trajectories[len(calibration) :], groups


def _compare_methods(groups: Sequence[Group], settings: Settings, progress: Progress) -> dict[str, dict[str, float]]:
    """Errors by method and layer; empty where there are no groups."""
    errors: dict[str, dict[str, float]] = {}
    if groups:
        advance = progress("Comparing methods", len(groups) * len(METHODS))
        for group in groups:
            for method, by_layer in errors_by_method(group, settings.device, advance).items():
                errors.setdefault(method, {}).update(by_layer)
    return errors


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What all converted checkpoints are compared with.

    Attributes:
        original: The folder of the original.
        examples: The observations to judge by.
        expected: What the original does on them.
        units: Of the robot.
        settings: How.
        progress: See `measure`.
    """

    original: pathlib.Path
    examples: list[Example]
    expected: list[Trajectory]
    units: Units
    settings: Settings
    progress: Progress

    def of(self, folder: pathlib.Path, manifest: Manifest | None) -> dict[str, Any]:
        """Everything about one checkpoint; `manifest` is None of one that is not quantized."""
        advance = self.progress(f"Running {folder.name}", len(self.examples) * (2 if manifest else 1))
        actual, quantized = self._run(folder, advance)
        layers = self._layers(manifest, quantized, advance) if manifest else {}
        by_step = compare_steps(self.expected, actual) | {"expert_layers": expert_by_step(layers)}
        ratios = activation_ratios(layers)
        return {
            "bits": _bits(manifest),
            "config": manifest.config.to_json() if manifest else None,
            "counts": manifest.counts if manifest else None,
            "backends": sorted({layer.running or layer.backend for layer in quantized.values()}),
            "actions": compare_actions(*map(self.actions, (self.expected, actual))),
            "steps": by_step,
            "trace": self.actions(actual[:1])[0].tolist(),
            "layers": layers,
            "mean_layer_error": statistics.mean(v["error"] for v in layers.values()) if layers else 0.0,
            "components": by_component(layers),
            "worst_layers": worst_layers(layers, self.settings.worst),
            "activations_over_ideal": ratios,
            "median_activations_over_ideal": statistics.median(ratios.values()) if ratios else None,
        }

    def actions(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """[E, H, D] fp64 in the robot's units."""
        return torch.stack([self.units.apply(each.x[-1]) for each in trajectories])

    def _run(
        self, folder: pathlib.Path, advance: Callable[[], object]
    ) -> tuple[list[Trajectory], Mapping[str, QuantLinear]]:
        """What a checkpoint does, and of it its quantized layers alone."""
        how = self.settings
        dtype = getattr(torch, how.dtype)
        policy = load_policy(folder, backend=how.backend, dtype=dtype, device=how.device, optimize=False)
        trajectories = []
        for example in self.examples:
            trajectories.append(denoise(policy, example, how.steps))
            advance()
        return trajectories, quantized_layers(policy)

    def _layers(
        self, manifest: Manifest, quantized: Mapping[str, QuantLinear], advance: Callable[[], object]
    ) -> dict[str, dict[str, Any]]:
        folded = folded_original(self.original, manifest, getattr(torch, self.settings.dtype), self.settings.device)
        return measure_layers(folded, quantized, self.examples, self.settings.steps, advance)
