"""Calibrated conversion: each layer is fed by its quantized predecessors; what is done once is not done again."""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import pathlib
import re
import shutil
import types
import weakref

import pytest
from safetensors import SafetensorError
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import convert
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.calibration import Calibrator
from openpi_duquant.calibration import calibrator
from openpi_duquant.calibration import record_states
from openpi_duquant.calibration.states import States
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import calibrated
from openpi_duquant.conversion.calibrated import kept_until_done
from openpi_duquant.engine import gemma
from openpi_duquant.engine.policy import Policy
from openpi_duquant.kernels import attention
from openpi_duquant.linear.rounding import InputMoment
from openpi_duquant.recording import Example
from openpi_duquant.recording import Recording

CONFIG = DuQuantConfig(rotation_block=32)
SOURCES = ("bfloat16", "pi0")
STEPS = 3


def recording(folder: pathlib.Path, count: int = 6, first: int = 0) -> Recording:
    """Prompts of two lengths, so that there are batches of two shapes."""
    with SafetensorsReader(folder) as reader:
        architecture = Architecture.infer(reader.shapes)
    made = (synthetic.libero_like_observation(architecture, seed=s, prompt_tokens=9 + s % 2) for s in range(count))
    return Recording([Example(*pair) for pair in made][first:], {"num_steps": STEPS})


def float32(folder: pathlib.Path, backend: str = "fake") -> Policy:
    return load_policy(folder, dtype=torch.float32, backend=backend, optimize=False)


@contextlib.contextmanager
def first_arguments(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", SOURCES)
def test_without_quantized_layers_the_states_are_those_of_the_policy(checkpoints: pathlib.Path, name: str) -> None:
    policy, given = float32(checkpoints / name), recording(checkpoints / name)
    schedule = policy.tabulated(STEPS)
    states = record_states(policy, given.examples, schedule)
    assert [len(each.language) for each in states] == [3, 3]
    with SafetensorsReader(checkpoints / name) as reader:
        made = Calibrator(policy.architecture, CONFIG, {}, states, schedule, torch.float32)
        for index in range(policy.architecture.expert.depth):
            assert not made.quantize(index, reader)
    states = made._stream._states
    leaves = []
    for example in given.examples:
        outputs: list[Tensor] = []
        hook = policy.expert.layers[-1].register_forward_hook(lambda *a, to=outputs: to.append(a[2][0]))
        policy.sample_actions(example.observation, example.noise, num_steps=STEPS)
        hook.remove()
        leaves.append(torch.stack(outputs))
    for batch, members in zip(states, (leaves[::2], leaves[1::2])):
        torch.testing.assert_close(batch.expert, torch.cat(members, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOURCES)
def test_a_layer_is_calibrated_on_what_the_converted_policy_feeds_it(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given = recording(checkpoints / name, 2)
    given.examples[1] = given.examples[0]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    advance = Calibrator._advance

    def spy(self: Calibrator, index: int, *arguments: object) -> dict[str, Tensor]:
        (states,) = self._stream._states
        seen[index] = states.language.clone(), states.expert.clone()
        return advance(self, index, *arguments)

    monkeypatch.setattr(Calibrator, "_advance", spy)
    convert(checkpoints / name, tmp_path / "target", CONFIG, calibration=given)
    policy, example = float32(tmp_path / "target"), given.examples[0]
    for index in (0, 1):
        language, expert = policy.language_model.layers[index], policy.expert.layers[index]
        with first_arguments(language) as words, first_arguments(expert) as actions:
            policy.sample_actions(example.observation, example.noise, num_steps=STEPS)
        assert relative_error(seen[index][0][:1], words[0]) < 1e-3  # an int8 code may differ
        # The first step starts from the same noise; later ones from what the original makes of it.
        assert relative_error(seen[index][1][0, :1], actions[0]) < 1e-3
    original = float32(checkpoints / name)
    with first_arguments(original.expert) as steps:
        original.sample_actions(example.observation, example.noise, num_steps=STEPS)
    torch.testing.assert_close(seen[0][1][:, :1], torch.stack(steps), rtol=1e-5, atol=1e-5)


def moments(source: pathlib.Path, target: pathlib.Path, given: Recording) -> dict[str, InputMoment | None]:
    """What a conversion knows of the inputs of every group."""
    found: dict[str, InputMoment | None] = {}
    quantize_group = calibrator.quantize_group

    def spy(weights: dict[str, Tensor], *others: object) -> dict[str, dict[str, Tensor]]:
        found[next(iter(weights))] = others[-1]
        return quantize_group(weights, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrator, "quantize_group", spy)
        convert(source, target, CONFIG, calibration=given)
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_all_steps_of_an_observation_are_in_one_half_of_the_moments(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    source, given = checkpoints / name, recording(checkpoints / name, 2)
    assert len({example.observation.tokenized_prompt_mask.sum().item() for example in given.examples}) == 2
    alone = moments(source, tmp_path / "one", dataclasses.replace(given, examples=given.examples[:1]))
    both = moments(source, tmp_path / "two", given)
    for group, moment in alone.items():
        assert moment is None or moment.halves == [], group
    for model in ("paligemma_with_expert.paligemma.model.language_model", "paligemma_with_expert.gemma_expert.model"):
        group = f"{model}.layers.0.self_attn.q_proj"  # reads what the original reads
        torch.testing.assert_close(both[group].halves[0], alone[group].whole, rtol=1e-4, atol=1e-5)


def test_no_original_states_are_kept_while_layers_are_calibrated(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[weakref.ref] = []

    def spy(*arguments: object) -> list[States]:
        states = record_states(*arguments)
        first.extend(weakref.ref(tensor) for each in states for tensor in (each.language, each.expert))
        return states

    def check(_: int) -> None:
        assert first
        assert not any(tensor() is not None for tensor in first)

    monkeypatch.setattr(calibrated, "record_states", spy)
    source, observed = checkpoints / "float32", []
    convert(
        source, tmp_path / "target", CONFIG,
        calibration=recording(source, 5), progress=check, observed=observed.append,
    )  # fmt: skip
    assert sum(observed) == 5


def test_what_reads_the_time_step_alone_is_rounded_to_nearest(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, given = checkpoints / "bfloat16", recording(checkpoints / "bfloat16", 1)
    config = dataclasses.replace(CONFIG, include=r"dense$|\.q_proj$")
    manifest = convert(source, tmp_path / "target", config, calibration=given)
    dense = {name for name in manifest.layers if name.endswith("dense")}
    assert len(dense) == 5
    errors = manifest.calibration["errors"]
    assert {name for name in errors if "expert.model" in name} == {
        name for name in manifest.layers if "expert.model" in name
    } - dense
    example = given.examples[0]
    assert float32(tmp_path / "target").sample_actions(example.observation, example.noise).isfinite().all()


def test_observations_may_have_different_horizons(checkpoints: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given = recording(checkpoints / "pi0", 3)
    given.examples[2] = dataclasses.replace(given.examples[2], noise=given.examples[2].noise[:, :4])
    manifest = convert(checkpoints / "pi0", tmp_path / "target", CONFIG, calibration=given)
    assert manifest.calibration["errors"]


def action_error(folder: pathlib.Path, original: pathlib.Path, examples: list[Example]) -> float:
    policies = [float32(path) for path in (folder, original)]
    errors = []
    for example in examples:
        actual, expected = (policy.sample_actions(example.observation, example.noise) for policy in policies)
        errors.append(((actual - expected).norm() / (expected - example.noise).norm()).item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_nearer_to_the_original_than_rounding_to_nearest(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    source = checkpoints / name
    convert(source, tmp_path / "calibrated", CONFIG, calibration=recording(source, 8))
    convert(source, tmp_path / "nearest", CONFIG)
    held_out = recording(source, 12, first=8).examples
    errors = {kind: action_error(tmp_path / kind, source, held_out) for kind in ("calibrated", "nearest")}
    assert errors["calibrated"] < 0.7 * errors["nearest"], errors


def test_the_manifest_says_what_error_every_layer_that_runs_has(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    given = recording(checkpoints / "float32")
    config = dataclasses.replace(CONFIG, activation_bits=16)
    convert(checkpoints / "float32", tmp_path / "target", config, calibration=given)
    manifest = Manifest.load(tmp_path / "target")
    assert manifest.calibration["num_steps"] == STEPS
    errors = manifest.calibration["errors"]
    unread = {name for name in manifest.layers if re.search(r"language_model\.layers\.1\.(mlp|self_attn\.o)", name)}
    assert len(unread) == 4
    assert errors.keys() == manifest.layers.keys() - unread
    # The first layer of all reads what the original reads: its error can be had from the two policies' first layers.
    layer = "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.k_proj"
    original, converted = float32(checkpoints / "float32"), float32(tmp_path / "target")
    states = record_states(original, given.examples, original.tabulated(STEPS))
    x = torch.cat([each.language.flatten(0, 1) for each in states])
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gain = 1 + original.language_model.layers[0].input_layernorm.weight
    expected = (normed * gain) @ original.get_submodule(layer).weight.T
    kept = 1 + converted.language_model.layers[0].input_layernorm.weight
    difference = converted.get_submodule(layer)(normed * kept) - expected
    assert errors[layer] == pytest.approx((difference.norm() / expected.norm()).item(), rel=1e-3)


def test_layers_with_more_error_than_allowed_get_8_bits_and_no_others(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, given = checkpoints / "pi0", recording(checkpoints / "pi0")
    before = convert(source, tmp_path / "four", CONFIG, calibration=given)
    limit = sorted(before.calibration["errors"].values())[-6]
    config = dataclasses.replace(CONFIG, keep_error_below=limit)
    after = convert(source, tmp_path / "mixed", config, calibration=given)
    assert max(after.calibration["errors"].values()) <= limit
    bits = {name: spec.weight_bits for name, spec in after.layers.items()}
    first = next(name for name, error in before.calibration["errors"].items() if error > limit)
    assert bits[first] == 8  # those after it read what it feeds them, and may be spared
    assert {bits[name] for name in bits} == {4, 8}
    for name, spec in after.layers.items():
        assert spec.weight_bits == bits[spec.group], name
    stored = sum(spec.in_features * spec.out_features // 2 for name, spec in after.layers.items() if bits[name] == 8)
    assert after.counts["quantized_bytes"] - before.counts["quantized_bytes"] == stored
    held_out = recording(source, 12, first=8).examples
    assert action_error(tmp_path / "mixed", source, held_out) < action_error(tmp_path / "four", source, held_out)


def digest(folder: pathlib.Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class Spy:
    """Counts the groups that are quantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        quantize_group = calibrator.quantize_group

        def count(weights: dict[str, Tensor], *arguments: object) -> dict[str, dict[str, Tensor]]:
            self.calls.append(next(iter(weights)))
            return quantize_group(weights, *arguments)

        monkeypatch.setattr(calibrator, "quantize_group", count)


def test_an_interrupted_conversion_goes_on_and_comes_to_the_same(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, given, spy = checkpoints / "pi0", recording(checkpoints / "pi0"), Spy(monkeypatch)
    config = dataclasses.replace(CONFIG, keep_error_below=0.03, attention_temperature=True)
    whole = convert(source, tmp_path / "whole", config, calibration=given)
    all_calls, spy.calls = len(spy.calls), []

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", config, calibration=given, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.calibration", "whole"]
    first_calls, spy.calls = len(spy.calls), []
    resumed = convert(source, tmp_path / "target", config, calibration=given)
    assert 0 < len(spy.calls) == all_calls - first_calls
    assert digest(tmp_path / "target") == digest(tmp_path / "whole")
    assert resumed.layers == whole.layers
    assert resumed.calibration == whole.calibration
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_leaves_what_is_done(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, given = checkpoints / "pi0", recording(checkpoints / "pi0", 1)

    def full(_: object, path: pathlib.Path, *__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DuQuantError, match=r"layer_01\.safetensors: cannot be written"):
        convert(source, tmp_path / "target", CONFIG, calibration=given, progress=lambda _: patch.setattr(
            calibrated, "save_file", full))  # fmt: skip
    left = {path.name for path in (tmp_path / ".target.calibration").iterdir()}
    assert left == {"key.json", "lock", "layer_00.safetensors"}


def test_room_is_made_sure_of_for_calibrated_layers_beside_the_result(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, given = checkpoints / "pi0", recording(checkpoints / "pi0", 1)
    counts = convert(source, tmp_path / "nearest", CONFIG).counts
    usage = types.SimpleNamespace(free=counts["bytes"] + counts["quantized_bytes"] // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    convert(source, tmp_path / "fits", CONFIG)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(DuQuantError, match="target: takes"):
        convert(source, tmp_path / "target", CONFIG, calibration=given)
    usage.free = 10 * counts["bytes"]
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", CONFIG, calibration=given, progress=interrupt)
    usage.free = (
        counts["bytes"] + counts["quantized_bytes"] // 2 + 30_000
    )  # for the norms; half of the layers are there
    convert(source, tmp_path / "target", CONFIG, calibration=given)


@pytest.mark.parametrize("change", ["config", "observations"])
def test_what_was_done_for_something_else_is_done_again(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source, given, spy = checkpoints / "float32", recording(checkpoints / "float32"), Spy(monkeypatch)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", CONFIG, calibration=given, progress=interrupt)
    interrupted, spy.calls = spy.calls, []
    config = dataclasses.replace(CONFIG, gptq_dampening=0.1) if change == "config" else CONFIG
    info = given.info | ({"sha256": "of others"} if change == "observations" else {})
    convert(source, tmp_path / "target", config, calibration=dataclasses.replace(given, info=info))
    assert spy.calls[: len(interrupted)] == interrupted


def test_two_conversions_to_one_target_do_not_mix(checkpoints: pathlib.Path, tmp_path: pathlib.Path) -> None:
    refused = pytest.raises(DuQuantError, match="target: another calibrated conversion is making it; wait")
    with kept_until_done(tmp_path / "target", "key"), refused:
        convert(checkpoints / "pi0", tmp_path / "target", CONFIG, calibration=recording(checkpoints / "pi0"))


@pytest.mark.parametrize(
    ("config", "calibrated", "message"),
    [
        (DuQuantConfig(weight_rounding="gptq"), False, "'gptq' needs calibration data"),
        (DuQuantConfig(keep_error_below=0.1), False, "keep_error_below needs calibration data"),
        (DuQuantConfig(attention_temperature=True), False, "attention_temperature needs calibration data"),
        (DuQuantConfig(output_energy=True), False, "output_energy needs calibration data"),
        (DuQuantConfig(weight_rounding="nearest"), True, "does not look at calibration data"),
    ],
)
def test_calibration_data_and_config_must_go_together(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, config: DuQuantConfig, calibrated: object, message: str
) -> None:
    given = recording(checkpoints / "pi0") if calibrated else None
    with pytest.raises(DuQuantError, match=message):
        convert(checkpoints / "pi0", tmp_path / "target", config, calibration=given)
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_not_finite_are_refused_by_name(checkpoints: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given = recording(checkpoints / "pi0")
    given.examples[0].observation.state[:] = torch.inf
    with pytest.raises(DuQuantError, match=r"gemma_expert.*layers\.0\.self_attn\.q_proj: .* NaN or Inf"):
        convert(checkpoints / "pi0", tmp_path / "target", CONFIG, calibration=given)


@pytest.mark.parametrize("which", ["noise", "tokens"])
def test_observations_of_another_policy_are_refused(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, which: str
) -> None:
    given = recording(checkpoints / "pi0", 2)
    if which == "noise":
        given.examples[1] = dataclasses.replace(given.examples[1], noise=torch.zeros(1, 10, 7))
    else:
        given.examples[1].observation.tokenized_prompt[0, 0] = 257_000
    message = {"noise": "actions are 7 wide", "tokens": "has token 257000"}[which]
    with pytest.raises(DuQuantError, match=f"observation 1: {message}.*; record with this policy"):
        convert(checkpoints / "pi0", tmp_path / "target", CONFIG, calibration=given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["simple", "llm", "optimized"])
def test_presets_of_one_model_are_calibrated(checkpoints: pathlib.Path, tmp_path: pathlib.Path, preset: str) -> None:
    config = dataclasses.replace(PRESETS[preset], rotation_block=16)
    manifest = convert(checkpoints / "pi0", tmp_path / "target", config, calibration=recording(checkpoints / "pi0"))
    assert set(manifest.calibration["errors"]) <= set(manifest.layers)
    assert len(manifest.calibration["errors"]) >= 10
    example = recording(checkpoints / "pi0").examples[0]
    assert float32(tmp_path / "target").sample_actions(example.observation, example.noise).isfinite().all()


def attention_of(policy: Policy, example: Example, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Queries, keys and output of every attention of both models in a call of one denoising step."""
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *others: tuple[Tensor, Tensor], **named: bool) -> Tensor:
        result = attention.attend(q, k, v, *others, **named)
        seen.append((q, torch.cat((k, others[1][0]), 1) if len(others) > 1 else k, result))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(gemma, "attention", types.SimpleNamespace(attend=attend))
        policy.sample_actions(example.observation, example.noise, num_steps=1)
    return seen


def spread(queries: Tensor, keys: Tensor) -> Tensor:
    """By head, how far logits are from each query's mean."""
    logits = queries.double().transpose(1, 2) @ keys.double()[:, None].mT
    return (logits - logits.mean(-1, keepdim=True)).square().mean((0, 2, 3)).sqrt()


def energies(policy: Policy, seen: list[tuple[Tensor, ...]]) -> list[float]:
    layers = [*policy.language_model.layers[:-1], *policy.expert.layers]
    return [layer.self_attn.o_proj(y).norm().item() for layer, (_, _, y) in zip(layers, seen, strict=True)]


@pytest.mark.parametrize("name", SOURCES)
def test_corrected_attention_has_the_spread_and_the_energy_of_the_original(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, given = checkpoints / name, recording(checkpoints / name, 1)
    given.info["num_steps"] = 1
    coarse = dataclasses.replace(CONFIG, rotation="none", scale_search="max", permute=False, gptq_dampening=1e6)
    original = float32(source)
    wanted = attention_of(original, given.examples[0], monkeypatch)
    gaps = {}
    for corrected in (False, True):
        config = dataclasses.replace(coarse, attention_temperature=corrected, output_energy=corrected)
        manifest = convert(source, tmp_path / str(corrected), config, calibration=given)
        policy = float32(tmp_path / str(corrected))
        found = attention_of(policy, given.examples[0], monkeypatch)
        spreads = torch.stack([spread(q, k) / spread(*first[:2]) for (q, k, _), first in zip(found, wanted)])
        powers = torch.tensor(energies(policy, found)) / torch.tensor(energies(original, wanted))
        gaps[corrected] = (spreads - 1).abs().max().item(), (powers - 1).abs().max().item()
        assert len(manifest.calibration["corrections"]) == (2 * len(wanted) if corrected else 0)
    assert min(gaps[False]) > 0.01
    assert max(gaps[True]) < 1e-3, gaps


def test_a_rotation_of_rows_across_heads_cannot_be_corrected(checkpoints: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = DuQuantConfig(row_rotation="restore", output_rotation_block=64, attention_temperature=True)
    with pytest.raises(DuQuantError, match=r"attention_temperature: .*q_proj mixes heads"):
        convert(checkpoints / "pi0", tmp_path / "target", config, calibration=recording(checkpoints / "pi0"))
