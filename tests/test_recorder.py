"""What a recorder keeps of a policy's calls."""

import dataclasses
import functools
import pathlib
import types

import numpy as np
import pytest
from tiny import TINY
import torch
from torch import Tensor

from openpi_duquant import synthetic
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.observation import Observation
from openpi_duquant.recorder import Recorder
from openpi_duquant.recording import load_recording


class FakePolicy:
    """Calls its `_sample_actions` as openpi's Policy does."""

    def __init__(self) -> None:
        self._sample_actions = self._answer

    def _answer(
        self, device: str, observation: Observation, *, num_steps: int = 10, noise: Tensor | None = None
    ) -> Tensor:
        del device, noise
        return torch.full((len(observation.state), 10, 32), float(num_steps))

    def infer(self, observation: Observation, **kwargs: object) -> Tensor:
        return self._sample_actions("cpu", observation, **kwargs)


@functools.cache
def libero_like() -> tuple[Observation, Tensor]:
    return synthetic.libero_like_observation(TINY)


def numbered(number: int, batch: int = 1) -> Observation:
    """An observation whose state holds its number."""
    observation, _ = libero_like()
    state = torch.full((1, 32), float(number)) + torch.arange(batch)[:, None]
    expanded = {
        name: {camera: part.expand(batch, *part.shape[1:]) for camera, part in getattr(observation, name).items()}
        for name in ("images", "image_masks")
    }
    tokens = {
        name: getattr(observation, name).expand(batch, -1) for name in ("tokenized_prompt", "tokenized_prompt_mask")
    }
    return dataclasses.replace(observation, state=state, **expanded, **tokens)


def numbers(folder: pathlib.Path) -> list[int]:
    return [int(example.observation.state[0, 0]) for example in load_recording(folder).examples]


def record(folder: pathlib.Path, calls: int, **options: int) -> list[int]:
    policy = FakePolicy()
    with Recorder(folder, **options) as recorder:
        recorder.watch(policy)
        for number in range(calls):
            policy.infer(numbered(number))
    return numbers(folder)


def test_calls_are_answered_as_before_and_kept_in_order(tmp_path: pathlib.Path) -> None:
    policy = FakePolicy()
    noise = torch.arange(320.0).reshape(1, 10, 32)
    with Recorder(tmp_path / "r", info={"config": "pi05_libero"}) as recorder:
        recorder.watch(policy)
        assert policy.infer(numbered(0), num_steps=3, noise=noise)[0, 0, 0] == 3
        policy.infer(numbered(1))
        policy.infer(numbered(2), num_steps=4)
    found = load_recording(tmp_path / "r")
    assert numbers(tmp_path / "r") == [0, 1, 2]
    assert torch.equal(found.examples[0].noise, noise)
    assert not torch.equal(found.examples[1].noise, found.examples[2].noise)
    assert {name: found.info[name] for name in ("config", "num_steps", "seed", "seen", "count")} == {
        "config": "pi05_libero", "num_steps": 4, "seed": 0, "seen": 3, "count": 3,
    }  # fmt: skip


def test_a_policy_is_let_go_when_the_block_is_left(tmp_path: pathlib.Path) -> None:
    policy = FakePolicy()
    before = policy._sample_actions
    with Recorder(tmp_path / "first") as first, Recorder(tmp_path / "second") as second:
        first.watch(policy)
        second.watch(policy)
        policy.infer(numbered(0))
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second") == [0]
    policy.infer(numbered(1))
    assert (first._seen, second._seen) == (1, 1)
    assert policy._sample_actions == before


def test_the_policy_draws_the_noise_that_it_would_have_drawn(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    record(tmp_path / "r", 2)
    assert torch.equal(torch.randn(3), expected)


def test_more_calls_than_the_limit_are_sampled_evenly(tmp_path: pathlib.Path) -> None:
    runs = [record(tmp_path / str(seed), 40, limit=4, seed=seed) for seed in range(60)]
    assert all(len(run) == 4 and run == sorted(set(run)) for run in runs)
    assert record(tmp_path / "again", 40, limit=4, seed=3) == runs[3]
    by_quarter = torch.bincount(torch.tensor(runs).flatten() // 10, minlength=4)
    assert by_quarter.sum() == 240
    assert by_quarter.min() > 40  # 60 each, binomial: a deviation of 20 is three standard deviations


def test_every_row_of_a_batch_is_an_observation(tmp_path: pathlib.Path) -> None:
    policy = FakePolicy()
    with Recorder(tmp_path / "r") as recorder:
        recorder.watch(policy)
        policy.infer(numbered(5, batch=3))
    assert numbers(tmp_path / "r") == [5, 6, 7]


def test_arrays_of_other_libraries_are_taken(tmp_path: pathlib.Path) -> None:
    given = numbered(1)
    arrays = types.SimpleNamespace(
        images={camera: image.numpy() for camera, image in given.images.items()},
        image_masks={camera: mask.numpy() for camera, mask in given.image_masks.items()},
        state=given.state.numpy(),
        tokenized_prompt=given.tokenized_prompt.numpy().astype(np.int32),
        tokenized_prompt_mask=given.tokenized_prompt_mask.numpy(),
        token_ar_mask=None,
    )
    with Recorder(tmp_path / "r") as recorder:
        recorder.see(arrays, (10, 32))
    (example,) = load_recording(tmp_path / "r").examples
    assert torch.equal(example.observation.images["base_0_rgb"], given.images["base_0_rgb"])
    assert example.noise.shape == (1, 10, 32)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interruption_leaves_what_was_seen(tmp_path: pathlib.Path, raised: type[BaseException]) -> None:
    policy = FakePolicy()

    def interrupted() -> None:
        with Recorder(tmp_path / "r") as recorder:
            recorder.watch(policy)
            policy.infer(numbered(7))
            raise raised

    with pytest.raises(raised):
        interrupted()
    assert numbers(tmp_path / "r") == [7]


def test_what_cannot_be_recorded_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match="less than 1"):
        Recorder(tmp_path / "r", limit=0)
    with pytest.raises(DuQuantError, match="exists already"):
        Recorder(tmp_path)
    with pytest.raises(DuQuantError, match="object cannot be recorded"), Recorder(tmp_path / "r") as recorder:
        recorder.watch(object())
    assert not list(tmp_path.iterdir())
