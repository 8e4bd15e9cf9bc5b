"""What is kept of a run: a journal that a kill cannot hurt, and the files made of it at the end."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import fcntl
import json
import os
import pathlib
from typing import Any

from openpi_duquant.config import DuQuantError
from openpi_duquant.libero.runner import Record
from openpi_duquant.libero.statistics import call_times
from openpi_duquant.libero.statistics import summarize
from openpi_duquant.report import markdown_stamp
from openpi_duquant.report import markdown_table
from openpi_duquant.report import write_json

JOURNAL_NAME = "journal.jsonl"
TIMES = ("call_ms", "p50_ms", "p95_ms", "p99_ms")
OUTCOME = ("task", "instruction", "trial", "seed", "status", "steps", "rerun", "error")
CSV_COLUMNS = (*OUTCOME, "policy_calls", *TIMES, "seconds")


class Journal:
    """A file of one JSON line for the run and one for every episode, each on the disk before the next is begun.

    Attributes:
        records: Of finished episodes; the later of two of the same episode.

    Raises:
        DuQuantError: If another process writes it, or it is of another run than `header` describes.
    """

    def __init__(self, folder: pathlib.Path, header: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL_NAME
        self._file = path.open("a+b")
        try:
            self.records = self._read(path, header)
        except BaseException:
            self.close()
            raise

    def _read(self, path: pathlib.Path, header: Mapping[str, Any]) -> dict[tuple[int, int], Record]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DuQuantError(f"{path}: another evaluation is writing it") from None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # killed in the middle of it
            self._file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        values = [json.loads(line) for line in lines]
        if values:
            _require_same_run(path, values[0], json.loads(json.dumps(header)))
        else:
            self._write(header)
        return {(value["task"], value["trial"]): Record(**value) for value in values[1:]}

    def append(self, record: Record) -> None:
        """Keeps a record; it is on the disk when this returns."""
        self._write(dataclasses.asdict(record))
        self.records[record.task, record.trial] = record

    def close(self) -> None:
        """Lets others write it."""
        self._file.close()

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _require_same_run(path: pathlib.Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    flat = [{**run["arguments"], "assets": run["assets"], "policy": run["policy"]} for run in (was, now)]
    for name in flat[1]:
        before, after = (values.get(name) for values in flat)
        if before != after:
            detail = "is another one" if name == "policy" else f"was {before}, now it is {after}"
            raise DuQuantError(f"{path}: not the same run: {name} {detail}; resume it as it was, or use another folder")


def write_results(
    folder: pathlib.Path, run: Mapping[str, Any], records: Sequence[Record], total: int
) -> dict[str, Any]:
    """Writes results.json, results.csv and results.md; returns what is in the first.

    Args:
        folder: Where.
        run: "arguments", "assets", "policy" (what it says of itself; None of a policy in floating point) and "stamp".
        records: Of finished episodes.
        total: Episodes that the run should have.
    """
    records = sorted(records, key=lambda record: (record.task, record.trial))
    by_task = {task: [record for record in records if record.task == task] for task in {r.task for r in records}}
    rows = [_row(record) for record in records]
    results = {
        **run,
        "complete": len(records) == total,
        "summary": summarize(records),
        "tasks": [
            {"task": task, "instruction": of_task[-1].instruction, **summarize(of_task)}
            for task, of_task in sorted(by_task.items())
        ],
        "episodes": rows,
    }
    write_json(folder / "results.json", results)
    with (folder / "results.csv").open("w", newline="") as file:
        suite = {"assets": run["assets"], "suite": run["arguments"]["task_suite_name"]}
        writer = csv.DictWriter(file, [*suite, *CSV_COLUMNS], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(suite | row for row in rows)
    (folder / "results.md").write_text(markdown(results))
    return results


def _row(record: Record) -> dict[str, Any]:
    """A record without its single calls."""
    values = dataclasses.asdict(record)
    return values | call_times(values.pop("call_seconds"))


def markdown(results: Mapping[str, Any]) -> str:
    """The results for people."""
    arguments, summary = results["arguments"], results["summary"]
    title = f"# {arguments['task_suite_name']}, {arguments['num_trials_per_task']} trials a task"
    state = "" if results["complete"] else "\nInterrupted: not all episodes were run.\n"
    counts = ("task", "instruction", "episodes", "success", "95%", "errors")
    rows = [
        (
            row.get("task", "all"),
            row.get("instruction", ""),
            row["episodes"],
            percent(row["success_rate"]),
            interval(row["success_rate_95"]),
            row["errors"],
            *(number(row[name]) for name in (*TIMES, "episode_s")),
        )
        for row in (*results["tasks"], summary)
    ]
    policy = json.dumps(results["policy"], indent=1) if results["policy"] else "in floating point"
    errors = [
        f"- task {row['task']}, episode {row['trial']}: {row['error']}" for row in results["episodes"] if row["error"]
    ]
    parts = [
        f"{title}\n\nAssets: **{results['assets']}**\n{state}",
        markdown_table((*counts, "call ms", "p50", "p95", "p99", "episode s"), rows),
        "\nSuccess is counted over episodes without errors. Times are of the policy as its caller sees it.\n",
        *(["Errors:\n", *errors, ""] if errors else []),
        f"Policy:\n```json\n{policy}\n```\n",
        f"Arguments:\n```json\n{json.dumps(arguments, indent=1)}\n```\n",
        markdown_stamp(results["stamp"]),
    ]
    return "\n".join(parts) + "\n"


def percent(share: float | None) -> str:
    """A share for people."""
    return "-" if share is None else f"{100 * share:.1f}%"


def interval(bounds: Sequence[float] | None) -> str:
    """An interval of shares for people."""
    return "-" if bounds is None else f"{percent(bounds[0])} to {percent(bounds[1])}"


def number(value: float | None) -> str:
    """A time for people."""
    return "-" if value is None else f"{value:.1f}"
