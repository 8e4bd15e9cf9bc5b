"""A policy that is not learned: it knows where things are, and puts the named one into the basket."""

from typing import Any

from libero_standins import FLOOR
import numpy as np

from openpi_duquant.libero.simulator import LiberoSimulator

CHUNK = 5
METRES_PER_ACTION = 0.05
"""What an action of 1 asks of LIBERO's controller."""
ABOVE, FINGER, TOLERANCE = 0.16, 0.035, 0.012
"""Height to travel at, how far below a thing's top to grasp it, and how near is there; m."""
CLOSE, OPEN = 1.0, -1.0


class Expert:
    """openpi's policy interface over positions that are read from the simulator, not from the images."""

    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, simulator: LiberoSimulator) -> None:
        self.simulator = simulator
        self.calls = 0
        self.reset()

    def reset(self) -> None:
        """A new episode."""
        self._phase, self._waited = 0, 0

    def infer(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """CHUNK equal actions [CHUNK, 7] towards the target of the present phase."""
        self.calls += 1
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
        environment = self.simulator.environment.env
        return np.array(environment.sim.data.body_xpos[environment.obj_body_id[name]])
