"""Actions in the robot's units, and their errors, against the formulas."""

import json
import pathlib

import numpy as np
import pytest
import torch

from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.config import DuQuantError
from openpi_duquant.fidelity.actions import Trajectory
from openpi_duquant.fidelity.actions import compare_actions
from openpi_duquant.fidelity.actions import compare_steps
from openpi_duquant.fidelity.actions import denoise
from openpi_duquant.fidelity.actions import load_units
from openpi_duquant.recording import Example

STATS = {"mean": [1.0, -2.0], "std": [0.5, 3.0], "q01": [-4.0, 0.0], "q99": [6.0, 0.5]}


def with_stats(folder: pathlib.Path, *assets: str) -> pathlib.Path:
    for asset in assets:
        (folder / "assets" / asset).mkdir(parents=True)
        (folder / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": {"actions": STATS}}))
    return folder


def test_pi05_has_quantiles_and_pi0_mean_and_deviation(tmp_path: pathlib.Path) -> None:
    folder = with_stats(tmp_path, "robots/left")
    actions = torch.tensor([[-1.0, 1.0, 9.0], [0.0, 0.0, 9.0]])
    quantiles = load_units(folder, pi05=True, action_dim=3)
    assert torch.allclose(quantiles.apply(actions), torch.tensor([[-4.0, 0.5], [1.0, 0.25]]).double(), atol=1e-5)
    deviations = load_units(folder, pi05=False, action_dim=3)
    assert torch.allclose(deviations.apply(actions), torch.tensor([[0.5, 1.0], [1.0, -2.0]]).double(), atol=1e-5)
    assert "robots/left" in quantiles.name


def test_without_stats_the_units_are_the_models(tmp_path: pathlib.Path) -> None:
    units = load_units(tmp_path, pi05=True, action_dim=3)
    assert "no norm stats" in units.name
    assert units.apply(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 2, 3]


def test_stats_that_are_unclear_are_refused(tmp_path: pathlib.Path) -> None:
    folder = with_stats(tmp_path, "a", "b")
    with pytest.raises(DuQuantError, match="a, b; choose one with --asset"):
        load_units(folder, pi05=True, action_dim=3)
    assert "of b" in load_units(folder, pi05=True, action_dim=3, asset="b").name
    with pytest.raises(DuQuantError, match="no norm stats of 'c', but of a, b"):
        load_units(folder, pi05=True, action_dim=3, asset="c")
    (folder / "assets" / "a" / "norm_stats.json").write_text('{"norm_stats": {}}')
    with pytest.raises(DuQuantError, match=r"norm_stats\.json: no readable norm stats"):
        load_units(folder, pi05=True, action_dim=3, asset="a")


def test_errors_of_actions_are_as_defined() -> None:
    generator = np.random.default_rng(0)
    expected, error = generator.standard_normal((2, 5, 4, 3))
    error *= np.array([0.1, 0.01, 0.3])
    found = compare_actions(torch.tensor(expected), torch.tensor(expected + error))
    assert found["relative_l2"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(expected))
    flat, other = expected.reshape(5, -1), (expected + error).reshape(5, -1)
    cosines = (flat * other).sum(1) / np.linalg.norm(flat, axis=1) / np.linalg.norm(other, axis=1)
    assert (found["cosine_mean"], found["cosine_min"]) == pytest.approx((cosines.mean(), cosines.min()))
    assert found["rms_error"] == pytest.approx(np.sqrt((error**2).mean((0, 1))))
    relative = np.sqrt((error**2).sum((0, 1)) / (expected**2).sum((0, 1)))
    assert found["relative_error"] == pytest.approx(relative)
    assert found["worst_dimension"] == 2


def test_actions_that_are_alike_have_no_error() -> None:
    actions = torch.randn(2, 4, 3, dtype=torch.float64)
    found = compare_actions(actions, actions.clone())
    assert found["relative_l2"] == 0
    assert found["rms_error"] == found["relative_error"] == [0, 0, 0]
    assert found["cosine_min"] == pytest.approx(1)


@pytest.mark.parametrize("model", ["pi0", "bfloat16"])
def test_a_denoising_ends_at_the_actions(checkpoints: pathlib.Path, model: str) -> None:
    policy = load_policy(checkpoints / model, dtype=torch.float32, optimize=False)
    example = Example(*synthetic.libero_like_observation(policy.architecture, action_horizon=6))
    trajectory = denoise(policy, example, 4)
    actions = policy.sample_actions(example.observation, example.noise, num_steps=4)[0]
    assert trajectory.velocity.shape == trajectory.x.shape == (4, 6, 32)
    torch.testing.assert_close(trajectory.x[-1], actions)
    torch.testing.assert_close(trajectory.x[0], example.noise[0] - trajectory.velocity[0] / 4)
    assert not policy.action_out_proj._forward_hooks


def test_errors_by_step_are_over_all_observations() -> None:
    made = [Trajectory(torch.randn(3, 4, 2), torch.randn(3, 4, 2)) for _ in range(2)]
    moved = [each._replace(x=each.x + torch.tensor([0.0, 1.0, 2.0])[:, None, None]) for each in made]
    found = compare_steps(made, moved)
    assert found["velocity"] == [0, 0, 0]
    of = [torch.stack([each.x[step] for each in made]).norm().item() for step in range(3)]
    assert found["x"] == pytest.approx([step * 16**0.5 / of[step] for step in range(3)])
