"""Records what a policy's model sees while it is used: an even sample of all calls, in bounded memory."""

from collections.abc import Mapping
import dataclasses
import logging
import pathlib
import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.observation import Observation
from openpi_duquant.recording import Example
from openpi_duquant.recording import compact
from openpi_duquant.recording import require_new
from openpi_duquant.recording import save_recording

logger = logging.getLogger("openpi_duquant")


class Recorder:
    """Keeps up to `limit` of all observations, each as likely as any other (reservoir sampling, Vitter's algorithm R).

        with Recorder("observations") as recorder:
            recorder.watch(policy)  # any pi0 or pi0.5 policy that openpi or the plugin made
            ...  # use it

    However the block is left, by Ctrl-C too, what was kept until then is written; see `save_recording`.

    Args:
        folder: Folder to make.
        limit: Observations to keep.
        seed: Of the choice among them, and of the noise of calls that were not given any.
        info: JSON values for the recording's info: which policy, which run.

    Raises:
        DuQuantError: If the folder exists, or the limit is not positive.
    """

    def __init__(
        self, folder: pathlib.Path | str, *, limit: int = 64, seed: int = 0, info: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = pathlib.Path(folder)
        require_new(self.folder)
        if limit < 1:
            raise DuQuantError(f"record limit: {limit} is less than 1")
        self._limit, self._info = limit, {"seed": seed} | dict(info or {})
        self._random = random.Random(seed)
        self._noise = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[int, Example]] = []
        self._watched: list[tuple[Any, Any]] = []
        self._seen = 0

    def watch(self, policy: Any) -> None:  # noqa: ANN401
        """Records every call of an openpi Policy until the block is left, of PyTorch or JAX; its answers stay the same.

        Raises:
            DuQuantError: If it is no openpi Policy of a model in this process.
        """
        sample_actions = getattr(policy, "_sample_actions", None)
        if sample_actions is None:
            raise DuQuantError(f"{type(policy).__name__} cannot be recorded: give openpi's Policy, which holds a model")

        def recorded(place: Any, observation: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            actions = sample_actions(place, observation, *args, **kwargs)
            self._info["num_steps"] = kwargs.get("num_steps", 10)
            self.see(observation, actions.shape[1:], kwargs.get("noise"))
            return actions

        self._watched.append((policy, sample_actions))
        policy._sample_actions = recorded  # noqa: SLF001

    def see(self, observation: Any, actions: tuple[int, int], noise: Any = None) -> None:  # noqa: ANN401
        """Counts in a batch of observations.

        Args:
            observation: openpi's Observation or ours, of torch, numpy or JAX arrays, [B, ...].
            actions: Action horizon and width.
            noise: [B, *actions], what the call started from; drawn when not given, for the policy keeps its own.
        """
        for row in range(len(observation.state)):
            place = self._seen if self._seen < self._limit else self._random.randrange(self._seen + 1)
            self._seen += 1
            if place >= self._limit:
                continue
            drawn = torch.randn(1, *actions, generator=self._noise) if noise is None else _row(noise, row).float()
            kept = self._seen, Example(compact(_one(observation, row)), drawn)
            self._kept[place : place + 1] = [kept]

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes what was kept; a warning where there is nothing. The policies are as they were."""
        for policy, sample_actions in reversed(self._watched):
            policy._sample_actions = sample_actions  # noqa: SLF001
        self._watched.clear()
        if not self._kept:
            logger.warning("%s is not made: the policy was never called", self.folder)
            return
        examples = [example for _, example in sorted(self._kept, key=lambda pair: pair[0])]
        save_recording(self.folder, examples, self._info | {"seen": self._seen})
        logger.info("wrote %s: %d of %d observations", self.folder, len(examples), self._seen)


def _one(observation: Any, row: int) -> Observation:  # noqa: ANN401
    """One observation of a batch, on the CPU."""
    fields = {field.name: getattr(observation, field.name) for field in dataclasses.fields(Observation)}
    return Observation(
        **{
            name: {camera: _row(part, row) for camera, part in value.items()}
            if isinstance(value, Mapping)
            else _row(value, row)
            for name, value in fields.items()
        }
    )


def _row(values: Any, row: int) -> Tensor:  # noqa: ANN401
    """values[row : row + 1] of a torch, numpy or JAX array, copied to the CPU."""
    one = values[row : row + 1]
    return one.detach().cpu().clone() if isinstance(one, Tensor) else torch.from_numpy(np.array(one))
