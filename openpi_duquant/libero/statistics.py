"""Numbers over episodes: how often, how sure, how fast."""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from openpi_duquant.libero.runner import Record

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float] | None:
    """Interval of a success probability (Wilson, JASA 22, 1927); none without trials.

    It stays within [0, 1] and has a width at 0 and at 100%, where the plain normal interval has none.
    """
    if not trials:
        return None
    share, z2 = successes / trials, z * z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Counts, success rate with its 95% interval, and times. Errors are neither successes nor failures.

    Times are those of policy calls, in ms (None without calls), of throughput in calls a second of policy time, and
    the mean of an episode in s; episodes that ended in an error are left out of all of them.
    """
    counts = {kind: sum(record.status == kind for record in records) for kind in ("success", "failure", "error")}
    finished = [record for record in records if record.status != "error"]
    return {
        "episodes": len(records),
        "successes": counts["success"],
        "failures": counts["failure"],
        "errors": counts["error"],
        "success_rate": counts["success"] / len(finished) if finished else None,
        "success_rate_95": wilson_interval(counts["success"], len(finished)),
        **call_times([seconds for record in finished for seconds in record.call_seconds]),
        "episode_s": sum(record.seconds for record in finished) / len(finished) if finished else None,
    }


def call_times(seconds: Sequence[float]) -> dict[str, Any]:
    """Mean, p50, p95 and p99 of policy calls in ms, and how many fit into a second."""
    names = ("call_ms", "p50_ms", "p95_ms", "p99_ms", "calls_per_s")
    if not seconds:
        return {"policy_calls": 0} | dict.fromkeys(names)
    values = (np.mean(seconds), *np.percentile(seconds, (50, 95, 99)))
    times = (*(1000.0 * float(value) for value in values), 1.0 / float(np.mean(seconds)))
    return {"policy_calls": len(seconds)} | dict(zip(names, times))
