"""A policy that is not learned: it knows where things are, and puts the named one into the basket.

As a script it is an evaluation in a process of its own: libero_expert.py <results> <assets> <call to be killed at>.
"""

import functools
import os
import pathlib
import signal
import sys
from typing import Any

from libero_standins import FLOOR
import numpy as np

from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.evaluation import Evaluation
from openpi_duquant.libero.runner import Runner
from openpi_duquant.libero.simulator import LiberoSimulator

CHUNK = 5
METRES_PER_ACTION = 0.05
"""What an action of 1 asks of LIBERO's controller."""
ABOVE, FINGER, TOLERANCE = 0.16, 0.035, 0.012
"""Height to travel at, how far below a thing's top to grasp it, and how near is there; m."""
CLOSE, OPEN = 1.0, -1.0


class Expert:
    """openpi's policy interface over positions that are read from the simulator, not from the images."""

    def __init__(self, simulator: LiberoSimulator, die_at_call: int = -1) -> None:
        self._simulator, self._die_at_call = simulator, die_at_call
        self._calls = 0
        self.reset()

    def reset(self) -> None:
        """A new episode."""
        self._phase, self._waited = 0, 0

    def infer(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """CHUNK equal actions [CHUNK, 7] towards the target of the present phase."""
        if self._calls == self._die_at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        self._calls += 1
        hand = np.asarray(obs["observation/state"][:3])
        target, gripper = self._target(hand, obs["prompt"])
        move = np.clip((target - hand) / (CHUNK * METRES_PER_ACTION) * 1.6, -1.0, 1.0)
        return {"actions": np.tile(np.concatenate([move, np.zeros(3), [gripper]]), (CHUNK, 1))}

    def _target(self, hand: np.ndarray, prompt: str) -> tuple[np.ndarray, float]:
        name = prompt.removeprefix("pick up the ").removesuffix(" and place it in the basket").replace(" ", "_")
        thing, basket = self._position(f"{name}_1"), self._position("basket_1")
        up = np.array([0.0, 0.0, ABOVE])
        over_thing, over_basket = thing * [1, 1, 0] + up, basket * [1, 1, 0] + up + [0, 0, 0.03]
        grasp = thing + np.array([0.0, 0.0, max(0.0, thing[2] - FLOOR - FINGER)])
        phases = (
            (over_thing, OPEN, 0),
            (grasp, OPEN, 0),
            (grasp, CLOSE, 2),
            (np.array([*hand[:2], over_basket[2]]), CLOSE, 0),
            (over_basket, CLOSE, 0),
            (over_basket, OPEN, 100),
        )
        target, gripper, wait = phases[self._phase]
        if wait or np.abs(target - hand).max() < TOLERANCE:
            self._waited += 1
            if self._waited > wait:
                self._phase, self._waited = self._phase + 1, 0
        return target, gripper

    def _position(self, name: str) -> np.ndarray:
        environment = self._simulator.environment.env
        return np.array(environment.sim.data.body_xpos[environment.obj_body_id[name]])


def without_antialiasing() -> None:
    """From now on LIBERO's images have ragged edges: on a CPU, smooth ones take most of the time of a step."""
    from robosuite.utils.binding_utils import MjSim  # noqa: PLC0415 - after MUJOCO_GL is set

    make = MjSim.from_xml_string

    def from_xml_string(xml: str) -> MjSim:
        simulation = make(xml)
        simulation.model._model.vis.quality.offsamples = 0
        return simulation

    MjSim.from_xml_string = staticmethod(from_xml_string)


def build(arguments: Arguments, simulator: LiberoSimulator, _: int, die_at_call: int = -1) -> Runner:
    """The runner of an evaluation, with videos; the process is killed at one of the expert's calls."""
    videos = arguments.results_dir / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    expert = Expert(simulator, die_at_call)
    return Runner(simulator, expert, arguments.settings, None, (videos, "stand-in-assets_"))


if __name__ == "__main__":
    folder, assets, call = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    few = {"tasks": (0, 1), "num_trials_per_task": 2, "settings": Settings(max_steps=40)}
    asked = Arguments(host=("expert",), task_suite_name="libero_object", results_dir=folder, resume=True, **few)
    simulator = LiberoSimulator("libero_object", assets)
    without_antialiasing()
    make = functools.partial(build, asked, simulator, die_at_call=call)
    with Evaluation(asked, stand_ins=True, build=make) as evaluation:
        list(evaluation.run())
