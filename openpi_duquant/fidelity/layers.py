"""Errors of a converted checkpoint's layers, each fed what the original feeds it."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import re
import statistics
from typing import Any

import torch

from openpi_duquant.accuracy import LayerErrors
from openpi_duquant.architecture import kept_in_float32
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.conversion import folded_tensors
from openpi_duquant.conversion import make_plan
from openpi_duquant.engine import Policy
from openpi_duquant.engine import assemble
from openpi_duquant.fidelity.actions import finite_db
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear
from openpi_duquant.quant import gaussian_int8_error
from openpi_duquant.recording import Example


def folded_original(
    source: pathlib.Path, manifest: Manifest, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Policy:
    """The original with the folds of a conversion, not quantized: what its layers are compared with."""
    with SafetensorsReader(source) as reader:
        plan = make_plan(reader.types, manifest.config, calibrated=manifest.calibration is not None)
        tensors = folded_tensors(reader.read, plan)
        state = {name: tensor if kept_in_float32(name) else tensor.to(dtype) for name, tensor in tensors}
    return assemble(plan.architecture, state, {}, backend="auto", dtype=dtype, device=device)


def measure_layers(
    folded: Policy,
    layers: Mapping[str, QuantLinear],
    examples: Sequence[Example],
    num_steps: int,
    advance: Callable[[], object],
) -> dict[str, dict[str, Any]]:
    """What every layer's rounding does to its outputs.

    Args:
        folded: From `folded_original`.
        layers: The quantized layers, by name.
        examples: The observations.
        num_steps: Denoising steps.
        advance: Called after every observation.

    Returns:
        By layer: "error" (relative), "sqnr_db", "by_step" (errors; a layer of the language model has one step);
        "activation_error" of the outputs with floating-point weights, "input_error" of the transformed inputs, and
        "ideal_error", what int8 leaves of Gaussian inputs; None of 16-bit activations.
    """
    with LayerErrors(folded, layers, activations=True) as errors:
        for example in examples:
            errors.run(lambda policy, x=example: policy.sample_actions(x.observation, x.noise, num_steps=num_steps))
            advance()
    return {name: _measured(errors, name, layers[name].spec) for name in layers if name in errors.names}


def _measured(errors: LayerErrors, name: str, spec: LayerSpec) -> dict[str, Any]:
    outputs, inputs = errors.of_activations(name)
    rounded = spec.activation_bits == 8
    return {
        "error": errors.of(name),
        "sqnr_db": finite_db(errors.of(name)),
        "by_step": errors.by_call(name),
        "weight_bits": spec.weight_bits,
        "activation_error": outputs if rounded else None,
        "input_error": inputs if rounded else None,
        "ideal_error": gaussian_int8_error(spec.in_features) if rounded else None,
    }


def component(layer: str) -> tuple[str, str]:
    """The part of the policy that a layer is in (vision, language, expert, head), and its projection (q, down, ...)."""
    prefixes = {LANGUAGE_MODEL: "language", ACTION_EXPERT: "expert", "paligemma_with_expert.": "vision"}
    part = next((part for prefix, part in prefixes.items() if layer.startswith(prefix)), "head")
    return part, re.sub(r"_proj$", "", layer.rpartition(".")[2])


def by_component(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean error and SQNR of the layers of every part and projection, and the worst layer."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        members.setdefault(component(name), []).append(name)
    return [
        {
            "part": part,
            "projection": projection,
            "layers": len(names),
            "error": (mean := statistics.mean(layers[name]["error"] for name in names)),
            "sqnr_db": finite_db(mean),
            "worst_layer": max(names, key=lambda name: layers[name]["error"]),
        }
        for (part, projection), names in members.items()
    ]


def expert_by_step(layers: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Mean error of the expert's layers at every denoising step; empty where none is quantized."""
    steps = [values["by_step"] for name, values in layers.items() if component(name)[0] == "expert"]
    return [statistics.mean(errors) for errors in zip(*steps)]


def worst_layers(layers: Mapping[str, Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The layers with the largest errors, whether weights or activations make them, and what would help."""
    worst = sorted(layers, key=lambda name: layers[name]["error"], reverse=True)[:count]
    return [{"layer": name, **_blame(layers[name])} for name in worst]


def _blame(values: Mapping[str, Any]) -> dict[str, Any]:
    total, activations = values["error"], values["activation_error"] or 0.0
    weights = max(0.0, total**2 - activations**2) ** 0.5
    if activations > weights:
        advice = "take 16-bit activations, or leave it out"
    elif values["weight_bits"] == 4:
        advice = "take 8-bit weights"
    else:
        advice = "leave it out"
    return {"error": total, "by_weights": weights, "by_activations": activations, "suggestion": advice}


def activation_ratios(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By layer, the outputs' error by 8-bit activations alone over the ideal for Gaussian inputs of that width."""
    return {
        name: values["activation_error"] / values["ideal_error"]
        for name, values in layers.items()
        if values["activation_error"] is not None
    }
