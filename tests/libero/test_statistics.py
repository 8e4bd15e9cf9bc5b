"""Success rates and times against their definitions."""

import math

import numpy as np
import pytest

from openpi_duquant.libero.runner import Record
from openpi_duquant.libero.statistics import summarize
from openpi_duquant.libero.statistics import wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (7, 10), (490, 500), (1, 1)])
def test_the_wilson_interval_holds_the_probabilities_that_the_score_test_keeps(successes: int, trials: int) -> None:
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:  # there the score statistic is the quantile of the normal distribution
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959964, rel=1e-5)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_the_wilson_interval_of_nothing_is_none_and_of_a_known_case_is_known() -> None:
    assert wilson_interval(0, 0) is None
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai and DasGupta's 80% of 10


def test_errors_count_neither_as_failures_nor_in_the_times() -> None:
    calls = [0.010, 0.020, 0.030, 0.100]
    records = [
        Record(0, 0, 1, "success", steps=9, call_seconds=calls[:2], seconds=1.0),
        Record(0, 1, 1, "failure", steps=9, call_seconds=calls[2:], seconds=3.0),
        Record(0, 2, 1, "error", steps=9, call_seconds=[9.0], seconds=9.0, error="RuntimeError: broke"),
    ]
    summary = summarize(records)
    counts = {name: summary[name] for name in ("episodes", "successes", "failures", "errors", "policy_calls")}
    assert counts == {"episodes": 3, "successes": 1, "failures": 1, "errors": 1, "policy_calls": 4}
    assert summary["success_rate"] == 0.5
    assert summary["success_rate_95"] == wilson_interval(1, 2)
    assert summary["call_ms"] == pytest.approx(40.0)
    assert summary["calls_per_s"] == pytest.approx(25.0)
    assert summary["p50_ms"] == pytest.approx(1000 * np.percentile(calls, 50))
    assert summary["p99_ms"] == pytest.approx(1000 * np.percentile(calls, 99))
    assert summary["episode_s"] == pytest.approx(2.0)


def test_without_a_finished_episode_there_is_no_rate() -> None:
    summary = summarize([Record(0, 0, 1, "error", error="broke")])
    assert summary["errors"] == 1
    assert summary["success_rate"] is summary["success_rate_95"] is summary["call_ms"] is summary["episode_s"] is None
