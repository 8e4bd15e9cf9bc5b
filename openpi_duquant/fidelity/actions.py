"""Actions of two policies from the same observations and noise, step by step and in the robot's units."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.accuracy import relative_error
from openpi_duquant.accuracy import sqnr_db
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine import Policy
from openpi_duquant.recording import Example

STATS_NAME = "norm_stats.json"


@dataclasses.dataclass(frozen=True)
class Units:
    """How a model's actions become the robot's, as openpi's `transforms.Unnormalize` does it: a * scale + offset.

    Attributes:
        name: What they are.
        scale: [D] fp64, D the robot's dimensions, the first of the model's.
        offset: [D] fp64.
    """

    name: str
    scale: Tensor
    offset: Tensor

    def apply(self, actions: Tensor) -> Tensor:
        """[..., A] in the model's units -> [..., D] fp64."""
        return actions[..., : len(self.scale)].double() * self.scale + self.offset


def load_units(folder: pathlib.Path, *, pi05: bool, action_dim: int, asset: str | None = None) -> Units:
    """The units of a checkpoint's norm stats: quantiles for pi0.5, mean and deviation for pi0; else the model's own.

    Args:
        folder: The checkpoint.
        pi05: Whether it is a pi0.5.
        action_dim: Width of the model's actions.
        asset: The folder in `assets/` whose stats are taken, where there are several.

    Raises:
        DuQuantError: If stats are damaged, or it is not clear which.
    """
    found = {
        path.parent.relative_to(folder / "assets").as_posix(): path for path in folder.glob(f"assets/**/{STATS_NAME}")
    }
    if asset is None and len(found) > 1:
        raise DuQuantError(f"{folder}: has norm stats of {', '.join(sorted(found))}; choose one with --asset")
    if asset is not None and asset not in found:
        raise DuQuantError(f"{folder}: has no norm stats of {asset!r}, but of {', '.join(sorted(found)) or 'nothing'}")
    if not found:
        one = torch.ones(action_dim, dtype=torch.float64)
        return Units("the model's units: the checkpoint has no norm stats", one, torch.zeros_like(one))
    asset, path = (asset, found[asset]) if asset else next(iter(found.items()))
    names = ("q01", "q99") if pi05 else ("mean", "std")
    try:
        stats = json.loads(path.read_text())["norm_stats"]["actions"]
        first, second = (torch.tensor(stats[name], dtype=torch.float64)[:action_dim] for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DuQuantError(f"{path}: no readable norm stats of actions ({type(error).__name__}: {error})") from None
    if pi05:
        scale = (second - first + 1e-6) / 2
        return Units(f"policy units, by the quantiles of {asset}", scale, first + scale)
    return Units(f"policy units, by mean and deviation of {asset}", second + 1e-6, first)


class Trajectory(NamedTuple):
    """One denoising, in the model's units.

    Attributes:
        velocity: [steps, H, A] fp32, the field at every step.
        x: [steps, H, A] fp32, what every step leaves; the last are the actions.
    """

    velocity: Tensor
    x: Tensor


def denoise(policy: Policy, example: Example, num_steps: int) -> Trajectory:
    """Runs a policy once, not as a CUDA graph, and keeps what every step does."""
    velocities: list[Tensor] = []
    hook = policy.action_out_proj.register_forward_hook(
        lambda _, __, output: velocities.append(output[0].float().cpu())
    )
    try:
        policy.sample_actions(example.observation, example.noise, num_steps=num_steps)
    finally:
        hook.remove()
    velocity = torch.stack(velocities)
    return Trajectory(velocity, example.noise - velocity.cumsum(0) / num_steps)


def compare_actions(expected: Tensor, actual: Tensor) -> dict[str, Any]:
    """Errors of actions [E, H, D], fp64, of E observations.

    Returns:
        "relative_l2" over everything; "cosine_mean" and "cosine_min" over observations; by dimension,
        "rms_error" and "relative_error"; "worst_dimension", the one with the largest relative error.
    """
    cosines = F.cosine_similarity(actual.flatten(1), expected.flatten(1), eps=1e-30)
    by_dimension = [relative_error(actual[..., d], expected[..., d]) for d in range(expected.shape[-1])]
    return {
        "relative_l2": relative_error(actual, expected),
        "cosine_mean": cosines.mean().item(),
        "cosine_min": cosines.min().item(),
        "rms_error": (actual - expected).square().mean((0, 1)).sqrt().tolist(),
        "relative_error": by_dimension,
        "worst_dimension": max(range(len(by_dimension)), key=by_dimension.__getitem__),
    }


def compare_steps(expected: Sequence[Trajectory], actual: Sequence[Trajectory]) -> dict[str, list[float]]:
    """Relative errors by denoising step, over all observations: of "velocity", and of "x" after the step."""
    return {
        name: [
            relative_error(_at(actual, name, step), _at(expected, name, step))
            for step in range(len(expected[0].velocity))
        ]
        for name in Trajectory._fields
    }


def _at(trajectories: Sequence[Trajectory], name: str, step: int) -> Tensor:
    return torch.stack([getattr(each, name)[step] for each in trajectories])


def finite_db(error: float) -> float | None:
    """`sqnr_db`, and None for no error, which JSON can hold."""
    return sqnr_db(error) if error > 0 else None
