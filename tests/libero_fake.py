"""A simulator and a policy that take microseconds, behind the same interfaces as the real ones; and runs of them.

As a script it is a run in a process of its own, which a test can kill: libero_fake.py <Run as JSON>.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
from typing import Any

import numpy as np
import torch

from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.evaluation import Evaluation
from openpi_duquant.libero.runner import Runner

SETTINGS = Settings(resize_size=8, max_steps=14)
FACTS = {"layers": 252}


class FakeSimulator:
    """Solved when the first numbers of all actions add up to more than a goal that depends on the episode's seed."""

    def __init__(self) -> None:
        self.actions: list[list[float]] = []
        self._goal = 0.0

    def start(self, episode: Episode) -> tuple[Mapping[str, Any], str]:
        """The same scene every time, but for the goal."""
        self._goal = 1.0 + episode.seed % 10
        self.actions = []
        return self._raw(), f"do task {episode.task}"

    def step(self, action: Sequence[float]) -> tuple[Mapping[str, Any], bool]:
        """One more action."""
        self.actions.append(list(action))
        return self._raw(), sum(action[0] for action in self.actions) > self._goal

    def _raw(self) -> Mapping[str, Any]:
        image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
        return {
            "agentview_image": image,
            "robot0_eye_in_hand_image": image + 1,
            "robot0_eef_pos": np.array([0.1, 0.2, len(self.actions)]),
            "robot0_eef_quat": np.array([0.0, 0.0, 1.0, 0.0]),
            "robot0_gripper_qpos": np.array([0.3, 0.4]),
        }


class FakePolicy:
    """Noise for actions, as a flow-matching policy draws it: from torch's generator.

    Attributes:
        seen: Observations of the episode at hand.
        before_call: Called before every call, with the number of calls there were in all episodes.
    """

    def __init__(self, before_call: Callable[[int], None] = lambda _: None) -> None:
        self.seen: list[dict[str, Any]] = []
        self.before_call = before_call
        self._calls = 0

    def reset(self) -> None:
        """Forgets what was seen."""
        self.seen = []

    def infer(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """A chunk [10, 7]."""
        call, self._calls = self._calls, self._calls + 1
        self.before_call(call)
        self.seen.append(obs)
        return {"actions": torch.rand(10, 7).numpy()}


@dataclasses.dataclass
class Run:
    """A run of the fakes, and at which call it is disturbed, and how: a signal's name, or "error"."""

    results_dir: str
    trials: int = 4
    resume: bool = False
    keep_going: bool = False
    disturbed_at: int | None = None
    how: str = "SIGKILL"
    only_once: str = ""  # a file: the disturbance happens only if it can be made
    num_workers: int = 1
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self) -> Arguments:
        """The arguments of the evaluation."""
        common = {"host": ("fake",), "tasks": (1, 3), "settings": SETTINGS, "videos": False}
        own = {name: getattr(self, name) for name in ("resume", "keep_going", "num_workers")}
        folder = pathlib.Path(self.results_dir)
        return Arguments(**common | own | self.changed, num_trials_per_task=self.trials, results_dir=folder)

    def disturb(self, call: int) -> None:
        """Does it, where it is time."""
        if call != self.disturbed_at:
            return
        if self.only_once:
            try:
                pathlib.Path(self.only_once).touch(exist_ok=False)
            except FileExistsError:
                return
        if self.how == "error":
            raise RuntimeError("the policy\nbroke")
        os.kill(os.getpid(), getattr(signal, self.how))

    def __call__(self) -> dict[str, Any]:
        """Runs it; returns the results."""
        with Evaluation(self.arguments(), stand_ins=True, build=functools.partial(build, self)) as evaluation:
            list(evaluation.run())
        return evaluation.results


def build(run: Run, _: int) -> Runner:
    """The runner of a worker."""
    return Runner(FakeSimulator(), FakePolicy(run.disturb), SETTINGS, FACTS)


def outcomes(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What a run found, without the times it took."""
    names = ("task", "trial", "seed", "status", "instruction", "steps", "policy_calls", "error")
    return [tuple(row[name] for name in names) for row in results["episodes"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    Run(**json.loads(sys.argv[1]))()
