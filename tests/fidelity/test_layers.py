"""Errors of the layers of a checkpoint, put together, and what is said of the worst."""

import dataclasses

import pytest
from tiny import TINY

from openpi_duquant.architecture import linear_shapes
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.fidelity import layers

GATE, Q = f"{LANGUAGE_MODEL}layers.0.mlp.gate_proj", f"{ACTION_EXPERT}layers.1.self_attn.q_proj"


def measured(
    error: float, activations: float | None, bits: int = 4, steps: tuple[float, ...] = ()
) -> dict[str, object]:
    return {
        "error": error, "activation_error": activations, "weight_bits": bits, "by_step": list(steps),
        "ideal_error": None if activations is None else 0.01,
    }  # fmt: skip


@pytest.mark.parametrize("pi05", [True, False])
def test_every_layer_is_in_a_part(pi05: bool) -> None:  # noqa: FBT001
    names = linear_shapes(parameter_shapes(dataclasses.replace(TINY, pi05=pi05)))
    parts = {name: layers.component(name) for name in names}
    assert parts[GATE] == ("language", "gate")
    assert parts[Q] == ("expert", "q")
    assert {part for part, _ in parts.values()} == {"vision", "language", "expert", "head"}
    assert all(part == "vision" for name, (part, _) in parts.items() if "vision" in name or "projector" in name)
    assert {name for name, (part, _) in parts.items() if part == "head"} == {n for n in names if "." not in n}


def test_parts_have_the_mean_of_their_layers_and_name_the_worst() -> None:
    given = {GATE: measured(0.1, 0.01), GATE.replace("0", "1"): measured(0.3, 0.01), Q: measured(0.01, 0.01)}
    language, expert = layers.by_component(given)
    assert (language["part"], language["projection"], language["layers"]) == ("language", "gate", 2)
    assert language["error"] == pytest.approx(0.2)
    assert language["worst_layer"] == GATE.replace("0", "1")
    assert expert["sqnr_db"] == pytest.approx(40)


def test_the_experts_steps_are_averaged_over_its_layers() -> None:
    given = {
        GATE: measured(0.1, 0.01, steps=(9,)),
        Q: measured(0, 0, steps=(0.1, 0.3)),
        Q + "x": measured(0, 0, steps=(0.3, 0.5)),
    }
    assert layers.expert_by_step(given) == pytest.approx([0.2, 0.4])
    assert layers.expert_by_step({GATE: measured(0.1, 0.01, steps=(9,))}) == []


@pytest.mark.parametrize(
    ("values", "weights", "suggestion"),
    [
        (measured(0.05, 0.03), 0.04, "take 8-bit weights"),
        (measured(0.05, 0.04), 0.03, "take 16-bit activations"),
        (measured(0.05, 0.03, bits=8), 0.04, "leave it out"),
        (measured(0.05, None), 0.05, "take 8-bit weights"),
        (measured(0.05, 0.051), 0, "take 16-bit activations"),
    ],
)
def test_the_larger_share_is_blamed(values: dict[str, object], weights: float, suggestion: str) -> None:
    first, second = layers.worst_layers({Q: measured(0.01, 0.01), GATE: values}, 2)
    assert (first["layer"], second["layer"]) == (GATE, Q)
    assert first["by_weights"] == pytest.approx(weights)
    assert first["suggestion"].startswith(suggestion)
    assert len(layers.worst_layers({Q: values, GATE: values}, 1)) == 1


def test_activations_are_measured_by_the_ideal() -> None:
    given = {GATE: measured(0.1, 0.012), Q: measured(0.1, None)}
    assert layers.activation_ratios(given) == pytest.approx({GATE: 1.2})
