"""Recordings of openpi's policies, in Python and in LIBERO; test_serving has those of a server."""

import importlib
import pathlib
import sys
import types
from typing import Any
from unittest import mock

from libero_fake import FakeSimulator
import numpy as np
import pytest
import torch

from openpi_duquant import commands
from openpi_duquant import load_policy
from openpi_duquant.fidelity.actions import load_units
from openpi_duquant.libero import evaluation
from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.policies import load_in_process
from openpi_duquant.recorder import Recorder
from openpi_duquant.recording import Example
from openpi_duquant.recording import load_recording

pytestmark = pytest.mark.openpi


def replayed(checkpoint: pathlib.Path, example: Example) -> np.ndarray:
    """Our engine's actions, in the model's units."""
    return load_policy(checkpoint).sample_actions(example.observation, example.noise)[0].numpy()


def actions_in_model_units(policy: Any, observation: dict[str, Any], noise: np.ndarray) -> np.ndarray:
    """What openpi's Policy makes of an observation, but for its output transforms."""
    policy._output_transform = lambda outputs: outputs
    return policy.infer(observation, noise=noise)["actions"]


@pytest.mark.parametrize("model", ["pi05", "pi0"])
@pytest.mark.parametrize("runtime", ["engine", "module", "floating point"])
def test_what_is_recorded_makes_the_engine_do_what_the_policy_did(
    stock: Any, hosts: Any, example: Any, tmp_path: pathlib.Path, model: str, runtime: str
) -> None:
    quantized = runtime != "floating point"
    folder = (hosts.converted if quantized else hosts.original) / model
    if quantized:
        policy = stock(f"{model}_libero_duquant", folder, runtime=runtime)
    else:
        policy, _ = load_in_process(folder, f"{model}_libero")
    noise = np.random.default_rng(0).standard_normal((policy._model.config.action_horizon, 32), np.float32)
    with Recorder(tmp_path / "r") as recorder:
        recorder.watch(policy)
        expected = [actions_in_model_units(policy, example("libero", seed), noise) for seed in (1, 2)]
    recording = load_recording(tmp_path / "r")
    assert recording.info["images"] == {"base_0_rgb": [224, 224], "left_wrist_0_rgb": [224, 224]}
    for actions, recorded in zip(expected, recording.examples, strict=True):
        assert np.array_equal(recorded.noise[0].numpy(), noise)
        assert all(image.dtype == torch.uint8 for image in recorded.observation.images.values())
        error = np.linalg.norm(replayed(folder, recorded) - actions) / np.linalg.norm(actions)
        assert error < (1e-6 if runtime == "engine" else 0.05)


def test_a_recorded_policy_draws_the_same_noise(stock: Any, hosts: Any, example: Any, tmp_path: pathlib.Path) -> None:
    policy = stock("pi05_libero_duquant", hosts.converted / "pi05")
    torch.manual_seed(3)
    expected = policy.infer(example("libero"))["actions"]
    torch.manual_seed(3)
    with Recorder(tmp_path / "r") as recorder:
        recorder.watch(policy)
        np.testing.assert_array_equal(policy.infer(example("libero"))["actions"], expected)


def test_a_policy_of_jax_is_recorded_too(tmp_path: pathlib.Path) -> None:
    import jax
    from openpi.models.pi0_config import Pi0Config
    from openpi.policies.policy import Policy

    def sample_actions(rng: Any, observation: Any, **_: Any) -> Any:
        return jax.random.normal(rng, (*observation.state.shape[:1], 10, 32))

    model = types.SimpleNamespace(sample_actions=sample_actions)
    fake = Pi0Config(action_horizon=10).fake_obs(1)
    inputs = jax.tree.map(lambda x: np.asarray(x)[0], {name: x for name, x in fake.to_dict().items() if x is not None})
    with mock.patch("openpi.shared.nnx_utils.module_jit", lambda function: function):
        policy = Policy(model)
    with Recorder(tmp_path / "r") as recorder:
        recorder.watch(policy)
        policy.infer(inputs)
    (recorded,) = load_recording(tmp_path / "r").examples
    assert recorded.noise.shape == (1, 10, 32)
    assert recorded.observation.images["base_0_rgb"].shape == (1, 224, 224, 3)
    assert recorded.observation.state.shape == (1, 32)


@pytest.fixture
def simulator(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> FakeSimulator:
    """What stands for LIBERO."""
    simulator = FakeSimulator()
    simulator.assets = tmp_path
    monkeypatch.setattr(evaluation, "LiberoSimulator", lambda *_: simulator)
    return simulator


@pytest.mark.usefixtures("plugin", "simulator")
def test_an_evaluation_in_libero_is_recorded(hosts: Any, tmp_path: pathlib.Path) -> None:
    arguments = evaluation.Arguments(
        checkpoint=hosts.original / "pi05",
        policy_config="pi05_libero",
        settings=Settings(resize_size=8, max_steps=11, num_steps_wait=1),
        results_dir=tmp_path / "results",
        videos=False,
        record=tmp_path / "r",
    )
    with arguments.recorder(stand_ins=True) as recorder:
        record = evaluation.build_runner(arguments, 0, recorder)(Episode("libero_object", 0, 0, 7))
    assert record.error is None
    recording = load_recording(tmp_path / "r")
    assert len(recording.examples) == len(record.call_seconds) > 1
    told = {"source": "libero_spatial", "config": "pi05_libero", "assets": "stand-in assets"}
    assert {name: recording.info[name] for name in told} == told


def test_the_warm_up_is_not_recorded(plugin: types.ModuleType, hosts: Any, tmp_path: pathlib.Path) -> None:
    from openpi_duquant.commands.serve_policy import warm_up

    policy = plugin.create_trained_policy(plugin.get_config("pi05_libero_duquant"), hosts.converted / "pi05")
    with Recorder(tmp_path / "r") as recorder:
        recorder.watch(policy)
        warm_up(policy)
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("plugin", "simulator")
def test_the_command_runs_libero_and_keeps_nothing_else(
    hosts: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("openpi_duquant.commands.evaluate_libero")  # the package has its function there
    monkeypatch.setattr(module, "check", lambda _: ([], False))
    given = "--checkpoint", hosts.original / "pi05", "--tasks", 1, "--limit", 3
    monkeypatch.setattr(
        sys, "argv", ["openpi-duquant", "record-observations", "libero", str(tmp_path / "r"), *map(str, given)]
    )
    commands.main()
    recording = load_recording(tmp_path / "r")
    assert (recording.info["count"], recording.info["num_steps"]) == (3, 10)
    assert recording.info["seen"] > 3
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("pi05", [True, False])
def test_units_are_those_of_openpis_unnormalize(hosts: Any, pi05: bool) -> None:  # noqa: FBT001
    from openpi import transforms
    from openpi.training import checkpoints

    actions = np.random.default_rng(0).standard_normal((10, 32))
    stats = checkpoints.load_norm_stats(hosts.original / "pi05" / "assets", "droid")
    expected = transforms.Unnormalize({"actions": stats["actions"]}, use_quantiles=pi05)({"actions": actions})[
        "actions"
    ]
    units = load_units(hosts.original / "pi05", pi05=pi05, action_dim=32, asset="droid")
    np.testing.assert_allclose(units.apply(torch.tensor(actions)).numpy(), expected[:, :8], rtol=1e-12)
