"""openpi-duquant evaluate-libero, which is also examples/libero/main.py."""

from collections.abc import Mapping
import contextlib
import functools
from typing import Any

import tyro

from openpi_duquant.commands.console import console
from openpi_duquant.config import DuQuantError
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.evaluation import Evaluation
from openpi_duquant.libero.evaluation import build_runner
from openpi_duquant.libero.evaluation import check
from openpi_duquant.libero.results import interval
from openpi_duquant.libero.results import number
from openpi_duquant.libero.results import percent
from openpi_duquant.libero.runner import Record
from openpi_duquant.libero.statistics import summarize
from openpi_duquant.progress import progress_bar


def evaluate_libero(arguments: tyro.conf.OmitArgPrefixes[Arguments] = Arguments()) -> None:  # noqa: B008 - frozen
    """Evaluate a policy in LIBERO: in this process (--checkpoint), or a running server's (--host, --port).

    Writes results.json, results.csv, results.md, videos, and a journal that --resume continues from after any
    interruption. The status is non-zero if an episode ended in an error.
    """
    results = run_episodes(arguments)
    console.print(summary_lines(results))
    console.print(f"wrote {arguments.results_dir}/results.json, .csv and .md")
    if arguments.record:
        console.print(f"recorded {arguments.record}")
    errors = results["summary"]["errors"]
    if errors:
        raise DuQuantError(
            f"{errors} of {len(arguments.episodes())} episodes ended in an error; --resume runs them again"
        )


def run_episodes(arguments: Arguments) -> dict[str, Any]:
    """Runs what is left to run, an episode a line, and returns the results."""
    lines, stand_ins = check(arguments)
    for line in lines:
        console.print(line)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(arguments.recorder(stand_ins=stand_ins))
        build = functools.partial(build_runner, arguments, recorder=recorder)
        evaluation = stack.enter_context(Evaluation(arguments, stand_ins=stand_ins, build=build))
        total, left = len(evaluation.episodes), len(evaluation.waiting())
        if arguments.resume:
            console.print(f"resumed: {total - left} of {total} episodes are finished")
        with progress_bar("Episodes", total) as advance:
            advance(total - left)
            for record in evaluation.run():
                advance(1)
                console.print(episode_lines(record))
    return evaluation.results


def episode_lines(record: Record) -> str:
    """An episode, as it is printed."""
    rerun = ", run again after its worker died" if record.rerun else ""
    what = f"task {record.task}, episode {record.trial}: {record.status} after {record.steps} steps{rerun}"
    if record.error:
        return f"{what}: {record.error}"
    return f"{what}\n{_time_lines(summarize([record]))}"


def summary_lines(results: Mapping[str, Any]) -> str:
    """The whole run, as it is printed."""
    summary = results["summary"]
    rate = f"{percent(summary['success_rate'])}, 95% interval {interval(summary['success_rate_95'])}"
    counts = f"{summary['successes']} successes, {summary['failures']} failures, {summary['errors']} errors"
    return "\n".join((f"{results['assets']}: {counts}", f"Success rate: {rate}", _time_lines(summary)))


def _time_lines(summary: Mapping[str, Any]) -> str:
    tail = ", ".join(f"{name} {number(summary[f'{name}_ms'])}" for name in ("p50", "p95", "p99"))
    return (
        f"Average policy call: {number(summary['call_ms'])} ms ({tail})\n"
        f"Throughput: {number(summary['calls_per_s'])} calls/s\n"
        f"Episode time: {number(summary['episode_s'])} s"
    )
