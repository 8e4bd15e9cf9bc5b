"""Runs episodes one after another and makes a record of each, whatever happens in it."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import pathlib
import time
import traceback
from typing import Any, Literal

import torch

from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.episode import Policy
from openpi_duquant.libero.episode import Rollout
from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.episode import Simulator
from openpi_duquant.libero.episode import run_episode

VIDEO_FPS = 10


@dataclasses.dataclass(frozen=True)
class Record:
    """What became of an episode.

    Attributes:
        task: Number of the task in its suite.
        trial: Number of the initial state.
        seed: Of everything random in the episode.
        status: Solved, not solved within its steps, or stopped by an exception.
        instruction: What the policy was told.
        steps: Steps the policy took.
        call_seconds: Duration of every policy call.
        seconds: Duration of the episode, from its reset to its end.
        error: The exception in one line.
        traceback: Where it was raised.
        rerun: Whether a worker died over it before.
    """

    task: int
    trial: int
    seed: int
    status: Literal["success", "failure", "error"]
    instruction: str = ""
    steps: int = 0
    call_seconds: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    traceback: str | None = None
    rerun: bool = False


@dataclasses.dataclass
class Runner:
    """A simulator and a policy.

    Attributes:
        simulator: The simulator.
        policy: The policy.
        settings: How episodes are run.
        facts: What a quantized policy says of itself, JSON values; none of another.
        videos: Folder for videos, and what their names start with; none for no videos.
    """

    simulator: Simulator
    policy: Policy
    settings: Settings
    facts: dict[str, Any] | None
    videos: tuple[pathlib.Path, str] | None = None

    def __call__(self, episode: Episode) -> Record:
        """Runs an episode; an exception in it ends up in the record."""
        torch.manual_seed(episode.seed)  # a policy in this process draws its noise from here
        rollout, start, error, trace = Rollout(), time.perf_counter(), None, None
        try:
            run_episode(self.simulator, self.policy, episode, self.settings, rollout)
        except Exception as caught:  # noqa: BLE001 - whatever it is, it is reported as an error of this episode
            error, trace = f"{type(caught).__name__}: {' '.join(str(caught).split())}", traceback.format_exc()
        seconds = time.perf_counter() - start
        status = "error" if error else "success" if rollout.success else "failure"
        if self.videos and rollout.frames:
            folder, prefix = self.videos
            _write_video(folder / f"{prefix}task{episode.task:02}_episode{episode.trial:03}_{status}.mp4", rollout)
        which = episode.task, episode.trial, episode.seed
        what = status, rollout.instruction, rollout.steps, rollout.call_seconds
        return Record(*which, *what, seconds, error, trace)


def _write_video(path: pathlib.Path, rollout: Rollout) -> None:
    import imageio  # noqa: PLC0415

    for earlier in path.parent.glob(f"{path.stem.rpartition('_')[0]}_*.mp4"):
        earlier.unlink()  # of a run of this episode that was interrupted, or ended in an error
    imageio.mimwrite(path, rollout.frames, fps=VIDEO_FPS, macro_block_size=1)


class ThisProcess:
    """Runs episodes in this process; `workers.RayWorkers` runs them in several."""

    def __init__(self, build: Callable[[int], Runner]) -> None:
        self._runner = build(0)
        self.facts = self._runner.facts

    def run(self, episodes: Iterable[Episode]) -> Iterator[Record]:
        """Records, in order."""
        return map(self._runner, episodes)

    def close(self) -> None:
        """Nothing to do."""
