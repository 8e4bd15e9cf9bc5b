"""One episode: what the policy sees, when it is asked, and when it ends. As in openpi's examples/libero/main.py."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import time
from typing import Any, Protocol

import numpy as np

from openpi_duquant.config import DuQuantError

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Steps that the policy has in each suite: openpi's, a little more than the longest demonstration takes."""

WAITING_ACTION = (0.0,) * 6 + (-1.0,)


@dataclasses.dataclass(frozen=True)
class Episode:
    """A task of a suite, one of its initial states, and the seed of the run."""

    suite: str
    task: int
    trial: int
    run_seed: int

    @property
    def seed(self) -> int:
        """Seed of everything random in this episode: it depends on nothing that was run before, or elsewhere."""
        return int(np.random.SeedSequence((self.run_seed, self.task, self.trial)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How episodes are run: openpi's defaults.

    Attributes:
        replan_steps: Actions of a chunk that are executed before the policy is asked again.
        num_steps_wait: Steps that things have to fall and settle before the policy is asked.
        resize_size: Edge of the images that the policy sees, in pixels.
        max_steps: Steps that the policy has; none means those of the suite.
    """

    replan_steps: int = 5
    num_steps_wait: int = 10
    resize_size: int = 224
    max_steps: int | None = None

    def __post_init__(self) -> None:
        least = {"replan_steps": 1, "num_steps_wait": 0, "resize_size": 1, "max_steps": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise DuQuantError(f"{name}: {value} is less than {minimum}")


class Policy(Protocol):
    """openpi's policy interface."""

    def infer(self, obs: dict[str, Any]) -> Mapping[str, Any]:
        """A chunk "actions" [horizon, 7] for an observation."""

    def reset(self) -> None:
        """Forgets the episode before."""


class Simulator(Protocol):
    """What an episode needs of LIBERO."""

    def start(self, episode: Episode) -> tuple[Mapping[str, Any], str]:
        """Puts the scene into the episode's initial state; returns the observation and the instruction."""

    def step(self, action: Sequence[float]) -> tuple[Mapping[str, Any], bool]:
        """Executes an action [7]; returns the observation, and whether the task is solved."""


@dataclasses.dataclass
class Rollout:
    """What happened, so far.

    Attributes:
        instruction: What the policy was told.
        success: Whether the task is solved.
        steps: Steps the policy took.
        call_seconds: Duration of every policy call.
        frames: Images [H, W, 3] uint8 that the policy was or would have been shown, one a step.
    """

    instruction: str = ""
    success: bool = False
    steps: int = 0
    call_seconds: list[float] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)


def run_episode(simulator: Simulator, policy: Policy, episode: Episode, settings: Settings, rollout: Rollout) -> None:
    """Runs an episode until the task is solved or the steps are spent.

    Args:
        simulator: The simulator.
        policy: The policy.
        episode: Which one.
        settings: How.
        rollout: Filled while the episode runs, so that what an exception leaves can still be looked at.

    Raises:
        DuQuantError: If the policy predicts fewer actions than are to be executed.
    """
    policy.reset()
    raw, rollout.instruction = simulator.start(episode)
    for _ in range(settings.num_steps_wait):
        raw, _ = simulator.step(WAITING_ACTION)
    plan: Iterator[np.ndarray] = iter(())
    while rollout.steps < (settings.max_steps or MAX_STEPS[episode.suite]) and not rollout.success:
        seen = observe(raw, rollout.instruction, settings.resize_size)
        rollout.frames.append(seen["observation/image"])
        action = next(plan, None)
        if action is None:
            start = time.perf_counter()
            chunk = np.asarray(policy.infer(seen)["actions"])
            rollout.call_seconds.append(time.perf_counter() - start)
            if len(chunk) < settings.replan_steps:
                raise DuQuantError(f"replan_steps is {settings.replan_steps}, the policy predicts {len(chunk)} actions")
            plan = iter(chunk[: settings.replan_steps])
            action = next(plan)
        raw, rollout.success = simulator.step(action.tolist())
        rollout.steps += 1


def observe(raw: Mapping[str, Any], instruction: str, size: int) -> dict[str, Any]:
    """openpi's observation: images [size, size, 3] uint8 turned by 180 degrees, state [8] and prompt."""
    state = (raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"])
    return {
        "observation/image": _image(raw["agentview_image"], size),
        "observation/wrist_image": _image(raw["robot0_eye_in_hand_image"], size),
        "observation/state": np.concatenate(state),
        "prompt": instruction,
    }


def _image(image: np.ndarray, size: int) -> np.ndarray:
    turned = np.ascontiguousarray(image[::-1, ::-1])
    if turned.shape[:2] == (size, size):
        return turned
    from openpi_client import image_tools  # noqa: PLC0415

    return image_tools.convert_to_uint8(image_tools.resize_with_pad(turned, size, size))


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """The rotation of a unit quaternion [4] (x, y, z, w) as axis times angle [3], in radians.

    The angle is in [0, 2 pi], as robosuite's quat2axisangle has it, which openpi's policies were trained with.
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * (2.0 * math.acos(w) / sine)
