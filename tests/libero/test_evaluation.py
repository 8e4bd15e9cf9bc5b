"""A run keeps every finished episode whatever ends it, and resumed it finds what it would have found."""

from collections.abc import Callable, Iterator
import csv
import dataclasses
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import libero_fake
from libero_fake import Run
from libero_fake import outcomes
import pytest

from openpi_duquant import DuQuantError
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.results import JOURNAL_NAME
from openpi_duquant.libero.results import Journal

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")


@pytest.fixture
def uninterrupted(tmp_path: pathlib.Path) -> dict[str, Any]:
    """The results of a run that nothing disturbs."""
    results = Run(str(tmp_path / "uninterrupted"))()
    assert len(results["episodes"]) == 8
    assert {row["status"] for row in results["episodes"]} == {"success", "failure"}
    return results


def in_own_process(run: Run) -> subprocess.CompletedProcess[str]:
    """Runs it where it can be killed."""
    command = [sys.executable, libero_fake.__file__, json.dumps(dataclasses.asdict(run))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def read(folder: pathlib.Path) -> dict[str, Any]:
    """results.json."""
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("call", [0, 9, 15])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "error"])
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(
    uninterrupted: dict[str, Any], tmp_path: pathlib.Path, how: str, call: int
) -> None:
    finished = in_own_process(Run(str(tmp_path / "run"), disturbed_at=call, how=how))
    assert finished.returncode not in (0, None)
    if how == "SIGKILL":
        assert finished.returncode == -signal.SIGKILL
    else:
        assert not read(tmp_path / "run")["complete"]
    lines = (tmp_path / "run" / JOURNAL_NAME).read_text().splitlines()
    kept = [json.loads(line) for line in lines[1:]]
    calls = [len(record["call_seconds"]) for record in kept if record["status"] != "error"]
    assert sum(calls) <= call  # no episode is kept that was not finished
    resumed = Run(str(tmp_path / "run"), resume=True)()
    assert outcomes(resumed) == outcomes(uninterrupted)
    assert resumed["complete"]
    again = [json.loads(line) for line in (tmp_path / "run" / JOURNAL_NAME).read_text().splitlines()]
    assert len(again) == 1 + 8 + (how == "error")  # no finished episode was run again
    assert read(tmp_path / "run") == json.loads(json.dumps(resumed))


def test_a_journal_that_was_cut_in_the_middle_of_a_line_loses_that_line_alone(
    uninterrupted: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    journal = tmp_path / "uninterrupted" / JOURNAL_NAME
    whole = journal.read_bytes()
    for cut in (1, 20):
        journal.write_bytes(whole[:-cut])
        assert outcomes(Run(str(tmp_path / "uninterrupted"), resume=True)()) == outcomes(uninterrupted)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"seed": 8}, "seed was 7, now it is 8"), ({"tasks": (1,)}, "tasks was"), ({"policy_config": "x"}, "policy_conf")],
)
def test_another_run_is_not_mixed_into_this_one(tmp_path: pathlib.Path, changed: dict[str, Any], said: str) -> None:
    Run(str(tmp_path), trials=1)()
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    with pytest.raises(DuQuantError, match=f"not the same run: {said}"):
        Run(str(tmp_path), trials=1, resume=True, changed=changed)()
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before


def test_another_policy_is_not_mixed_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(str(tmp_path), trials=1)()
    monkeypatch.setattr(libero_fake, "FACTS", {"layers": 126})
    with pytest.raises(DuQuantError, match="policy is another one"):
        Run(str(tmp_path), trials=1, resume=True)()


def test_two_processes_do_not_write_one_journal(tmp_path: pathlib.Path) -> None:
    header = {"arguments": {}, "assets": "LIBERO", "policy": None}
    journal = Journal(tmp_path, header)
    with pytest.raises(DuQuantError, match="another evaluation is writing it"):
        Journal(tmp_path, header)
    journal.close()
    Journal(tmp_path, header).close()


def test_an_error_stops_the_run_unless_told_to_go_on_and_counts_as_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match=r"^task 1, episode 0: RuntimeError: the policy broke; --resume"):
        Run(str(tmp_path / "stops"), disturbed_at=0, how="error")()
    assert [row["status"] for row in read(tmp_path / "stops")["episodes"]] == ["error"]
    summary = Run(str(tmp_path / "goes on"), disturbed_at=0, how="error", keep_going=True)()["summary"]
    assert (summary["episodes"], summary["errors"]) == (8, 1)
    assert summary["successes"] + summary["failures"] == 7


def test_every_file_names_the_assets_and_says_what_ran(uninterrupted: dict[str, Any], tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "uninterrupted"
    for path in folder.iterdir():
        assert "stand-in assets" in path.read_text(), path
    assert {path.name for path in folder.iterdir()} == {JOURNAL_NAME, "results.json", "results.csv", "results.md"}
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["task"]), int(row["trial"]), row["status"]) for row in rows] == [
        (row["task"], row["trial"], row["status"]) for row in uninterrupted["episodes"]
    ]
    assert {row["assets"] for row in rows} == {"stand-in assets"}
    assert uninterrupted["policy"] == libero_fake.FACTS
    assert {"versions", "gpu", "commit", "date"} <= set(uninterrupted["stamp"])
    assert uninterrupted["arguments"]["seed"] == 7
    page = (folder / "results.md").read_text()
    assert '"layers": 252' in page
    assert "do task 3" in page


@pytest.fixture
def fakes_in_workers() -> Iterator[None]:
    """Ray's processes get the fakes by value: they do not find the tests."""
    from ray import cloudpickle  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(libero_fake)
    yield
    cloudpickle.unregister_pickle_by_value(libero_fake)


@needs_ray
@pytest.mark.usefixtures("fakes_in_workers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("deaths", ["none", "one", "two"])
def test_workers_find_what_one_process_finds_and_an_episode_whose_worker_dies_is_run_again_once(
    uninterrupted: dict[str, Any], tmp_path: pathlib.Path, deaths: str
) -> None:
    disturbed = {
        "none": {},
        "one": {"disturbed_at": 7, "only_once": str(tmp_path / "died")},
        "two": {"disturbed_at": 0},  # every worker at its first call: every episode twice
    }[deaths]
    run = Run(str(tmp_path / "ray"), num_workers=2, keep_going=True, **disturbed)
    results = run()
    reruns = [row["rerun"] for row in results["episodes"]]
    if deaths == "two":
        assert results["summary"]["errors"] == 8
        assert all("died twice" in row["error"] for row in results["episodes"])
    else:
        assert outcomes(results) == outcomes(uninterrupted)
        assert sum(reruns) == (deaths == "one")
        assert ("true" in (tmp_path / "ray" / JOURNAL_NAME).read_text()) == (deaths == "one")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_workers_are_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match="needs Ray: pip install"):
        Run(str(tmp_path), num_workers=2)()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task_suite_name": "libero_1"}, "unknown task suite 'libero_1': choose from libero_spatial"),
        ({"tasks": (10,)}, "libero_spatial has no task 10, but 0 to 9"),
        ({"tasks": (-1,)}, "no task -1"),
        ({"num_trials_per_task": 51}, "51 is not 1 to 50"),
        ({"num_trials_per_task": 0}, "0 is not 1 to 50"),
        ({"seed": -1}, "seed: -1 is negative"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DuQuantError, match=said):
        Arguments(**change).episodes()


@pytest.mark.parametrize(("suite", "tasks"), [("libero_object", 10), ("libero_90", 90)])
def test_without_tasks_all_are_run_as_openpi_does(suite: str, tasks: int) -> None:
    episodes = Arguments(task_suite_name=suite).episodes()
    assert len(episodes) == 50 * tasks
    assert len({episode.seed for episode in episodes}) == len(episodes)
    same: Callable[[int], list[int]] = lambda seed: [e.seed for e in Arguments(seed=seed).episodes()]  # noqa: E731
    assert same(7) == same(7) != same(8)
