"""The choice of layers, on small names and on pi0.5's real ones."""

import dataclasses
import re

import pytest

from openpi_duquant.architecture import PI05
from openpi_duquant.architecture import linear_shapes
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import select_linears

PI05_LAYERS = list(linear_shapes(parameter_shapes(PI05)))
PI0_LAYERS = list(linear_shapes(parameter_shapes(dataclasses.replace(PI05, pi05=False))))
PI0_HEADS = ["action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out"]
HEADS = ["action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"]
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = ["vision_tower.q_proj", "a.q_proj", "a.fc", "b.o_proj", "b.embed.up_proj", "action_in_proj"]


def layers(prefix: str, parts: list[str]) -> set[str]:
    return {f"{prefix}layers.{index}.{part}" for index in range(18) for part in parts}


LLM, EXPERT = layers(LANGUAGE_MODEL, ATTENTION + MLP), layers(ACTION_EXPERT, ATTENTION + MLP)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("default", 252, LLM | EXPERT),
        ("simple", 126, EXPERT),
        ("optimized", 126, EXPERT),
        ("llm", 126, LLM),
        ("dit_qkvo", 72, layers(ACTION_EXPERT, ATTENTION)),
        ("full_llm_dit", 252, LLM | EXPERT),
        ("quantvla", 180, LLM | layers(ACTION_EXPERT, MLP)),
    ],
)
def test_a_preset_selects_its_layers(name: str, count: int, expected: set[str]) -> None:
    for names in (PI05_LAYERS, PI0_LAYERS):
        selected = select_linears(names, PRESETS[name])
        assert len(selected) == count
        assert set(selected) == expected


def test_every_preset_is_counted() -> None:
    counted = {"default", "simple", "optimized", "llm", "dit_qkvo", "full_llm_dit", "quantvla"}
    assert set(PRESETS) == counted


def test_pi05_has_more_layers_than_any_preset_takes() -> None:
    assert set(HEADS) < set(PI05_LAYERS)
    assert any("vision_tower" in name and name.endswith("q_proj") for name in PI05_LAYERS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DuQuantConfig(), ["a.q_proj", "b.o_proj"]),
        (DuQuantConfig(scope="a."), ["a.q_proj"]),
        (DuQuantConfig(include="fc"), ["a.fc"]),
        (DuQuantConfig(include="proj"), ["a.q_proj", "b.o_proj", "action_in_proj"]),
        (DuQuantConfig(exclude="^b"), ["vision_tower.q_proj", "a.q_proj"]),
        (DuQuantConfig(include_action_head=True), ["a.q_proj", "b.o_proj", "action_in_proj"]),
        (DuQuantConfig(scope="a.", include_action_head=True), ["a.q_proj", "action_in_proj"]),
        (DuQuantConfig(layers=("b.embed.up_proj", "a.fc")), ["a.fc", "b.embed.up_proj"]),
        (DuQuantConfig(layers=("a.fc",), scope="b.", include="q", exclude="fc"), ["a.fc"]),
        (DuQuantConfig(layers=("a.fc",), include_action_head=True), ["a.fc"]),
        (DuQuantConfig(layer_bits={"a.q_proj": 8}), ["a.q_proj", "b.o_proj"]),
    ],
)
def test_names_are_selected_in_their_order(config: DuQuantConfig, expected: list[str]) -> None:
    assert select_linears(iter(NAMES), config) == expected


@pytest.mark.parametrize(("names", "heads"), [(PI05_LAYERS, HEADS), (PI0_LAYERS, PI0_HEADS)], ids=["pi0.5", "pi0"])
def test_the_action_head_is_added_whole(names: list[str], heads: list[str]) -> None:
    selected = select_linears(names, DuQuantConfig(include_action_head=True))
    assert set(selected) == LLM | EXPERT | set(heads)


@pytest.mark.parametrize(
    "config",
    [DuQuantConfig(layers=("a.q_porj",)), DuQuantConfig(layer_bits={"a.q_porj": 8})],
    ids=["layers", "layer_bits"],
)
def test_a_layer_that_is_not_there_shows_near_misses(config: DuQuantConfig) -> None:
    with pytest.raises(DuQuantError, match=r"'a\.q_porj'.*near misses: a\.q_proj"):
        select_linears(NAMES, config)


@pytest.mark.parametrize(
    ("config", "held"),
    [
        (DuQuantConfig(scope="c."), 0),
        (DuQuantConfig(scope="q_proj"), 0),
        (DuQuantConfig(include="lora"), 6),
        (DuQuantConfig(scope="b.", exclude="."), 2),
    ],
)
def test_an_empty_selection_says_what_was_asked(config: DuQuantConfig, held: int) -> None:
    with pytest.raises(DuQuantError, match=r"no linear layer selected.*near misses") as caught:
        select_linears(NAMES, config)
    for value in (config.scope, config.include, config.exclude):
        assert repr(value) in str(caught.value)
    assert re.search(rf"\b{held} of 6 layers", str(caught.value))


def test_a_scope_mistyped_shows_what_it_may_have_meant() -> None:
    with pytest.raises(DuQuantError, match=r"near misses: .*gemma_expert"):
        select_linears(PI05_LAYERS, DuQuantConfig(scope="paligemma_with_expert.gemma_exprt.model."))


def test_a_model_without_linears_says_so() -> None:
    with pytest.raises(DuQuantError, match="has no linear layer"):
        select_linears([], DuQuantConfig())


def test_bits_of_a_layer_that_is_left_out_are_refused() -> None:
    config = DuQuantConfig(include="a$", layer_bits={"b": 8})
    with pytest.raises(DuQuantError, match="layer_bits names 'b'"):
        select_linears(["a", "b"], config)
