"""Random checkpoints: openpi's names and sizes, the outliers they are made for, and nothing left to chance."""

import dataclasses
import json
import math
import pathlib
import re

import pytest
from safetensors.torch import load_file
import torch

from openpi_duquant import DuQuantError
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.architecture import PI05
from openpi_duquant.architecture import SMALL
from openpi_duquant.architecture import Architecture

LANGUAGE, EXPERT = "paligemma.model.language_model.layers", "gemma_expert.model.layers"
LINEARS = {
    # pattern: how many of them there are in the released pi0.5, and the sum of their weights
    r"vision_tower.*(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])": (27 * 6, 27 * (4 * 1152**2 + 2 * 1152 * 4304)),
    r"multi_modal_projector": (1, 2048 * 1152),
    LANGUAGE + r"\.\d+\.(self_attn|mlp)": (126, 18 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 16384 * 2048)),
    EXPERT + r"\.\d+\.(self_attn|mlp)": (126, 18 * (2 * 2048 * 1024 + 2 * 256 * 1024 + 3 * 4096 * 1024)),
    r"gemma_expert.*norm\.dense": (37, 37 * 3072 * 1024),
    r"^(action_in|action_out)_proj|^time_mlp": (4, 2 * 32 * 1024 + 2 * 1024**2),
    r"lm_head": (2, 257152 * (2048 + 1024)),
}


@pytest.mark.parametrize("pattern", LINEARS)
def test_the_full_size_has_the_linear_layers_of_the_released_pi05(pattern: str) -> None:
    shapes = synthetic.checkpoint_shapes(PI05)
    found = [shape for name, shape in shapes.items() if re.search(pattern, name) and name.endswith(".weight")]
    found = [shape for shape in found if len(shape) == 2]
    assert (len(found), sum(map(math.prod, found))) == LINEARS[pattern]


def test_the_full_size_has_458_linear_layers_and_3_617_billion_parameters() -> None:
    shapes = synthetic.checkpoint_shapes(PI05)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and "position_embedding" not in name]
    assert len(matrices) == sum(count for count, _ in LINEARS.values()) == 458
    assert len(shapes) == 812
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 3) == 3.617


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_the_file_holds_every_tensor_in_one_dtype(
    checkpoints: pathlib.Path, tiny: Architecture, name: str, dtype: torch.dtype
) -> None:
    tensors = load_file(checkpoints / name / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == synthetic.checkpoint_shapes(tiny)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in tensors.values())
    config = json.loads((checkpoints / name / "config.json").read_text())
    assert config["precision"] == name
    assert (config["action_dim"], config["action_horizon"]) == (32, 10)
    statistics = checkpoints / name / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    assert {"state", "actions"} == set(json.loads(statistics.read_text())["norm_stats"])


@pytest.mark.parametrize("name", ["bfloat16", "pi0"])
def test_norms_have_outlier_channels_twelve_times_the_others(checkpoints: pathlib.Path, name: str) -> None:
    tensors = load_file(checkpoints / name / "model.safetensors")
    gains = {n: 1 + t.float() for n, t in tensors.items() if n.endswith("norm.weight") and "vision" not in n}
    scales = {n: 1 + t.float().chunk(3)[0] for n, t in tensors.items() if n.endswith("norm.dense.bias")}
    assert len(gains) == (5 if name == "bfloat16" else 10)
    assert len(gains | scales) == 10  # two a layer and the last, in each Gemma
    for gain in (gains | scales).values():
        assert (gain.abs() > 8).sum() == max(1, round(0.01 * len(gain)))
        assert gain.abs().median() < 1.5


def test_weights_are_scaled_to_their_fan_in(checkpoints: pathlib.Path, tiny: Architecture) -> None:
    tensors = load_file(checkpoints / "float32" / "model.safetensors")
    for name, width in (("0.mlp.gate_proj", 128), ("1.self_attn.q_proj", 128)):
        weight = tensors[f"paligemma_with_expert.{LANGUAGE}.{name}.weight"]
        assert weight.std() * math.sqrt(width) == pytest.approx(1, rel=0.05)
    down = tensors[f"paligemma_with_expert.{EXPERT}.0.mlp.down_proj.weight"]
    assert down.std() * math.sqrt(256 * 2 * tiny.expert.depth) == pytest.approx(1, rel=0.05)


def test_a_seed_makes_the_same_checkpoint_and_another_seed_another(
    source: pathlib.Path, tmp_path: pathlib.Path, tiny: Architecture
) -> None:
    done = []
    synthetic.make_checkpoint(tmp_path / "same", tiny, seed=3, progress=done.append)
    synthetic.make_checkpoint(tmp_path / "other", tiny, seed=4)
    content = (source / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == content
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != content
    assert sum(done) == 2 * sum(map(math.prod, synthetic.checkpoint_shapes(tiny).values()))


def test_nothing_is_made_where_something_is(tmp_path: pathlib.Path, tiny: Architecture) -> None:
    (tmp_path / "mine").write_text("precious")
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(DuQuantError, match="exists already"):
            synthetic.make_checkpoint(folder, tiny)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("pi05", [True, False])
def test_an_observation_is_what_a_policy_reads(tmp_path: pathlib.Path, tiny: Architecture, *, pi05: bool) -> None:
    architecture = dataclasses.replace(tiny, pi05=pi05)
    synthetic.make_checkpoint(tmp_path / "made", architecture)
    observation, noise = synthetic.libero_like_observation(architecture, seed=5, action_horizon=7, prompt_tokens=9)
    assert observation.tokenized_prompt_mask.sum() == 9
    assert observation.tokenized_prompt.max() < architecture.vocab_size
    assert [bool(mask) for mask in observation.image_masks.values()] == [True, True, False]
    assert all(image.dtype == torch.uint8 and image.float().std() > 20 for image in observation.images.values())
    actions = load_policy(tmp_path / "made").sample_actions(observation, noise, num_steps=2)
    assert actions.shape == noise.shape == (1, 7, 32)
    assert actions.isfinite().all()
    again, _ = synthetic.libero_like_observation(architecture, seed=5, action_horizon=7, prompt_tokens=9)
    assert torch.equal(again.images["base_0_rgb"], observation.images["base_0_rgb"])


def test_the_small_size_is_small() -> None:
    assert sum(map(math.prod, synthetic.checkpoint_shapes(SMALL).values())) < 10e6


def test_weights_without_a_file_are_a_checkpoints(tiny: Architecture) -> None:
    weights = synthetic.RandomWeights(tiny, seed=3)
    shapes = synthetic.checkpoint_shapes(tiny)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()} == weights.types
    assert weights.types == {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    assert len(weights) == len(shapes)
    assert "novelty" not in weights


def test_they_are_the_same_whenever_they_are_looked_up(tiny: Architecture) -> None:
    weights, name = synthetic.RandomWeights(tiny, seed=3), "time_mlp_in.weight"
    assert torch.equal(weights[name], synthetic.RandomWeights(tiny, seed=3)[name])
    assert not torch.equal(weights[name], weights["time_mlp_out.weight"])
    assert not torch.equal(weights[name], synthetic.RandomWeights(tiny, seed=4)[name])
