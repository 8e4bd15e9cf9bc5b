"""Folds leave the policy's actions alone, and move what they name."""

import dataclasses

import pytest
import structured
from tiny import TINY
from tiny import random_state
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import Plan
from openpi_duquant.conversion import folded_tensors
from openpi_duquant.conversion import make_plan
from openpi_duquant.engine import assemble
from openpi_duquant.folds import fold_norm_gain
from openpi_duquant.linear import quantize_

CONFIGS = PRESETS | {
    "duquant": DuQuantConfig(rotation="duquant", rotation_block=16),
    "propagate": DuQuantConfig(rotation="svd", rotation_block=16, row_rotation="propagate"),
    "propagate v only": DuQuantConfig(row_rotation="propagate", include=r"\.v_proj$", rotation_block=16),
}
LAYER = "layers.0."


def planned(architecture: Architecture, config: DuQuantConfig) -> tuple[dict[str, Tensor], Plan, dict[str, Tensor]]:
    """A random state, the plan, and the folded state."""
    state = random_state(architecture)
    plan = make_plan({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}, config)
    return state, plan, dict(folded_tensors(state.__getitem__, plan))


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_folded_policy_gives_the_originals_actions(name: str, *, pi05: bool) -> None:
    architecture = dataclasses.replace(TINY, pi05=pi05)
    state, _, folded = planned(architecture, CONFIGS[name])
    observation, noise = synthetic.libero_like_observation(architecture, prompt_tokens=6)
    actions = [
        assemble(architecture, tensors, {}, backend="auto", dtype=torch.float32).sample_actions(observation, noise)
        for tensors in (state, folded)
    ]
    assert relative_error(actions[1] - noise, actions[0] - noise) < 1e-5


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("default", {"norm_gain": 6, "down_permutation": 6, "value_head": 3}),
        ("simple", {}),
        ("optimized", {"down_permutation": 3, "value_head": 3}),
        ("dit_qkvo", {"value_head": 3}),
        ("quantvla", {"down_permutation": 6, "value_head": 3}),
        ("duquant", {"norm_gain": 6, "value_head": 3}),
        ("propagate v only", {"norm_gain": 3, "value_head": 3}),
    ],
)
def test_a_preset_folds_what_its_layers_call_for(name: str, kinds: dict[str, int]) -> None:
    _, plan, _ = planned(TINY, CONFIGS[name])
    found = [fold.kind for fold in plan.folds]
    assert {kind: found.count(kind) for kind in found} == kinds


def test_norm_gains_are_balanced_with_the_columns_of_all_consumers() -> None:
    state, _, folded = planned(TINY, DuQuantConfig(scope=LANGUAGE_MODEL, include=r"\.q_proj$", permute=False))
    prefix = LANGUAGE_MODEL + LAYER
    gain, kept = (1 + tensors[prefix + "input_layernorm.weight"] for tensors in (state, folded))
    names = [f"{prefix}self_attn.{projection}_proj.weight" for projection in ("q", "k", "v")]
    for name in names:
        torch.testing.assert_close(folded[name] * kept, state[name] * gain)
    columns = torch.cat([folded[name] for name in names]).norm(dim=0)
    torch.testing.assert_close(columns / columns.mean(), kept / kept.mean(), rtol=0.02, atol=0)  # bf16
    assert gain.max() > 5 * gain.median()
    assert kept.max() < 4 * kept.median()
    unread = prefix + "post_attention_layernorm.weight"
    assert torch.equal(folded[unread], state[unread])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rotation", ["hadamard", "duquant", "svd", "none"])
def test_a_gain_is_balanced_where_that_lessens_the_error_of_rounding(rotation: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = structured.Layer(), torch.randn(1000, structured.WIDTH)
    gain, weight = layer.before_mlp.gain.detach(), layer.gate_proj.weight.detach()
    folded = fold_norm_gain({"norm": gain - 1, "gate": weight}, "norm", "gate")
    config = DuQuantConfig(rotation=rotation, rotation_block=16)
    errors = []
    for kept in (1 + folded["norm"], torch.ones_like(gain), gain):
        model = nn.ModuleDict({"gate_proj": nn.Linear(*weight.T.shape, bias=False)})
        model.gate_proj.weight.data = weight * gain / kept
        quantize_(model, config, backend="fake")
        errors.append(relative_error(model.gate_proj(x * kept), x * gain @ weight.T))
    balanced, all_in_the_weight, all_in_the_norm = errors
    _, plan, _ = planned(dataclasses.replace(TINY, pi05=False), config)
    if any(fold.kind == "norm_gain" for fold in plan.folds):
        assert balanced < 0.8 * min(all_in_the_weight, all_in_the_norm)
    else:
        assert all_in_the_norm < 0.8 * min(balanced, all_in_the_weight)


@pytest.mark.parametrize("dead", [[3, 5], list(range(32))], ids=["some", "all"])
def test_channels_that_a_norm_drops_stay_dropped(dead: list[int]) -> None:
    weights = {"norm": torch.randn(32) * 0.1, "a": torch.randn(8, 32), "b": torch.randn(4, 32)}
    weights["norm"][dead] = -1.0
    folded = fold_norm_gain(weights, "norm", "a", "b")
    kept = 1 + folded["norm"]
    assert torch.equal(folded["norm"], folded["norm"].bfloat16().float())
    for name in ("a", "b"):
        torch.testing.assert_close(folded[name] * kept, weights[name] * (1 + weights["norm"]))


def test_gate_and_up_take_the_permutation_of_down() -> None:
    state, plan, folded = planned(TINY, dataclasses.replace(PRESETS["optimized"], rotation="none", row_rotation="0"))
    prefix = ACTION_EXPERT + LAYER + "mlp."
    before, after = state[prefix + "down_proj.weight"], folded[prefix + "down_proj.weight"]
    order = [(column == before.T).all(1).nonzero().item() for column in after.T]
    assert sorted(order) == list(range(64))
    assert order != list(range(64))
    for projection in ("gate", "up"):
        name = f"{prefix}{projection}_proj.weight"
        assert torch.equal(folded[name], state[name][order])
    assert not plan.layers[prefix + "down_proj"].permute


def test_one_value_head_transform_serves_all_heads_and_both_models() -> None:
    state, _, folded = planned(TINY, CONFIGS["optimized"])
    prefixes = LANGUAGE_MODEL + LAYER + "self_attn.", ACTION_EXPERT + LAYER + "self_attn."
    for prefix in prefixes:
        value, folded_value = state[prefix + "v_proj.weight"], folded[prefix + "v_proj.weight"]
        output, folded_output = state[prefix + "o_proj.weight"], folded[prefix + "o_proj.weight"]
        for head in (slice(0, 64), slice(64, 128)):
            product = folded_output[:, head] @ folded_value
            torch.testing.assert_close(product, output[:, head] @ value, rtol=0, atol=1e-5)
    language, expert = (prefix + "v_proj.weight" for prefix in prefixes)
    transform = folded[language].double() @ torch.linalg.inv(state[language].double())
    assert not torch.allclose(transform, torch.eye(64, dtype=torch.float64), atol=0.1)
    torch.testing.assert_close((transform @ state[expert].double()).float(), folded[expert], rtol=0, atol=1e-4)


def test_only_values_get_a_propagated_rotation() -> None:
    _, plan, _ = planned(TINY, CONFIGS["propagate"])
    rotated = {name for name, spec in plan.layers.items() if spec.output_rotation != "none"}
    assert rotated == {name for name in plan.layers if name.endswith("v_proj")}
    assert {plan.layers[name].output_rotation for name in rotated} == {"folded"}


def test_propagate_needs_a_value_projection() -> None:
    with pytest.raises(DuQuantError, match="propagate"):
        planned(TINY, dataclasses.replace(CONFIGS["propagate"], include=r"\.q_proj$"))
