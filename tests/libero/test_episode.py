"""An episode asks the policy when openpi's client does, shows it the same, and ends when it does."""

import dataclasses
import math

from libero_fake import FACTS
from libero_fake import SETTINGS
from libero_fake import FakePolicy
from libero_fake import FakeSimulator
import numpy as np
import pytest

from openpi_duquant import DuQuantError
from openpi_duquant.libero.episode import MAX_STEPS
from openpi_duquant.libero.episode import WAITING_ACTION
from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.episode import Rollout
from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.episode import axis_angle
from openpi_duquant.libero.episode import run_episode
from openpi_duquant.libero.runner import Runner

EPISODE = Episode("libero_object", 2, 0, 7)


class Numbered(FakePolicy):
    """Actions whose first number is (call, place in the chunk); nothing is ever solved."""

    def infer(self, obs: dict) -> dict[str, np.ndarray]:
        """A chunk [10, 7]."""
        super().infer(obs)
        actions = np.zeros((10, 7))
        actions[:, 0], actions[:, 1], actions[:, 2] = -1, len(self.seen), np.arange(10)
        return {"actions": actions}


@pytest.mark.parametrize(("replan", "wait", "limit"), [(5, 10, 40), (3, 0, 41), (10, 1, 7), (1, 2, 3)])
def test_waiting_steps_replanning_and_the_limit_are_counted_exactly(replan: int, wait: int, limit: int) -> None:
    simulator, policy, rollout = FakeSimulator(), Numbered(), Rollout()
    settings = dataclasses.replace(SETTINGS, replan_steps=replan, num_steps_wait=wait, max_steps=limit)
    run_episode(simulator, policy, EPISODE, settings, rollout)
    assert simulator.actions[:wait] == [list(WAITING_ACTION)] * wait
    told = [(int(action[1]), int(action[2])) for action in simulator.actions[wait:]]
    assert told == [(1 + step // replan, step % replan) for step in range(limit)]
    assert len(policy.seen) == len(rollout.call_seconds) == math.ceil(limit / replan)
    assert (rollout.steps, len(rollout.frames), rollout.success) == (limit, limit, False)


@pytest.mark.parametrize(("suite", "limit"), MAX_STEPS.items())
def test_a_suite_has_openpis_limit(suite: str, limit: int) -> None:
    simulator = FakeSimulator()
    run_episode(simulator, Numbered(), Episode(suite, 0, 0, 7), Settings(resize_size=8), Rollout())
    assert len(simulator.actions) == limit + 10


def test_an_episode_ends_with_the_step_that_solves_it() -> None:
    simulator, policy, rollout = FakeSimulator(), FakePolicy(), Rollout()
    run_episode(simulator, policy, EPISODE, dataclasses.replace(SETTINGS, max_steps=100), rollout)
    total = np.cumsum([action[0] for action in simulator.actions])
    goal = 1.0 + EPISODE.seed % 10
    assert rollout.success
    assert total[-1] > goal >= total[-2]
    assert len(simulator.actions) == rollout.steps + 10


def test_the_policy_sees_what_openpis_client_shows() -> None:
    simulator, policy = FakeSimulator(), FakePolicy()
    run_episode(simulator, policy, EPISODE, SETTINGS, Rollout())
    seen, raw = policy.seen[0], simulator._raw()
    assert set(seen) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert np.array_equal(seen["observation/image"], np.rot90(raw["agentview_image"], 2))
    assert np.array_equal(seen["observation/wrist_image"], np.rot90(raw["robot0_eye_in_hand_image"], 2))
    assert seen["observation/image"].flags["C_CONTIGUOUS"]
    assert seen["observation/state"] == pytest.approx([0.1, 0.2, 10, 0, 0, math.pi, 0.3, 0.4])  # after 10 waiting steps
    assert seen["prompt"] == "do task 2"


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.5, math.pi, 3.5])
def test_axis_times_angle_turns_as_the_quaternion_does(angle: float) -> None:
    axis = np.array([2.0, -1.0, 2.0]) / 3
    quaternion = np.array([*(axis * math.sin(angle / 2)), math.cos(angle / 2)])
    before = quaternion.copy()
    assert axis_angle(quaternion) == pytest.approx(axis * angle, abs=1e-6)
    assert np.array_equal(quaternion, before)


def test_a_quaternion_a_rounding_error_beyond_one_is_no_rotation() -> None:
    assert axis_angle(np.array([0.0, 0.0, 0.0, 1.0000001])).tolist() == [0, 0, 0]


def test_too_short_a_chunk_is_an_error_that_says_so() -> None:
    settings = dataclasses.replace(SETTINGS, replan_steps=11)
    with pytest.raises(DuQuantError, match="replan_steps is 11, the policy predicts 10 actions"):
        run_episode(FakeSimulator(), FakePolicy(), EPISODE, settings, Rollout())


@pytest.mark.parametrize("field", ["replan_steps", "resize_size", "max_steps"])
def test_settings_that_make_no_sense_are_refused(field: str) -> None:
    with pytest.raises(DuQuantError, match=f"{field}: 0 is less than 1"):
        Settings(**{field: 0})


def test_an_episode_depends_on_nothing_that_ran_before() -> None:
    runner = Runner(FakeSimulator(), FakePolicy(), SETTINGS, FACTS)
    later = Episode("libero_object", 2, 5, 7)
    first, second, again = runner(EPISODE), runner(later), runner(EPISODE)
    assert (first.status, first.steps, first.seed) == (again.status, again.steps, again.seed)
    assert first.seed != second.seed
    assert first.steps == Runner(FakeSimulator(), FakePolicy(), SETTINGS, FACTS)(EPISODE).steps


def test_an_exception_becomes_an_error_with_what_went_before() -> None:
    def fail(call: int) -> None:
        if call == 1:
            raise KeyError("two\nlines")

    record = Runner(FakeSimulator(), FakePolicy(fail), dataclasses.replace(SETTINGS, replan_steps=2), FACTS)(EPISODE)
    assert (record.status, record.steps, len(record.call_seconds)) == ("error", 2, 1)
    assert record.error == r"KeyError: 'two\nlines'"
    assert "in fail" in record.traceback
