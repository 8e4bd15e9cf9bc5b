"""Reports: the stamp says what ran, tables read back as what went in."""

import datetime as dt
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess

import pytest
import torch

from openpi_duquant import report


def test_the_stamp_names_what_ran() -> None:
    stamp = report.stamp()
    age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(stamp["date"])
    assert dt.timedelta(0) <= age < dt.timedelta(minutes=1)
    assert stamp["versions"]["python"] == platform.python_version()
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["versions"]["openpi-duquant"] == importlib.metadata.version("openpi-duquant")
    assert (stamp["gpu"] is None) == (not torch.cuda.is_available())
    assert stamp["machine"] == platform.machine()
    assert json.loads(json.dumps(stamp)) == stamp
    line = report.markdown_stamp(stamp)
    assert len(line.splitlines()) == 1
    for value in (stamp["date"], torch.__version__, stamp["machine"], str(stamp["commit"]), str(stamp["gpu"])):
        assert value in line


@pytest.fixture
def package_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder that the report takes for the one its package lies in."""
    (tmp_path / "openpi_duquant").mkdir()
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set in a hook
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "openpi_duquant" / "report.py"))
    return tmp_path


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_package_and_says_if_it_was_changed(package_in: pathlib.Path) -> None:
    assert report.stamp()["commit"] is None  # outside a checkout
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package_in), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (package_in / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    assert report.stamp()["commit"] == git("rev-parse", "HEAD")[:12]
    (package_in / "file").write_text("two")
    assert report.stamp()["commit"] == git("rev-parse", "HEAD")[:12] + "-dirty"


def test_the_commit_is_none_where_git_fails(package_in: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package_in / ".git").mkdir()  # no repository
    assert report.stamp()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert report.stamp()["commit"] is None


ROWS = [("default", 252, "0.281", ""), ("quantvla, svd", 9, "-0.5", "~3")]


def test_a_table_reads_back_as_what_went_in() -> None:
    lines = report.markdown_table(("policy", "layers", "error", "times"), ROWS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["policy", "layers", "error", "times"]
    assert cells[2:] == [[str(cell) for cell in row] for row in ROWS]
    assert len(lines) == 4


def test_a_tables_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    lines = report.markdown_table(("policy", "layers", "error", "times"), ROWS).splitlines()
    bars = [[index for index, character in enumerate(line) if character == "|"] for line in lines]
    assert all(places == bars[0] for places in bars)
    assert len(bars[0]) == 5
    rule = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert [cell.endswith(":") for cell in rule] == [False, True, True, True]
    assert all(set(cell.rstrip(":")) == {"-"} for cell in rule)
    assert "|    252 |" in lines[2]
    assert "| default       |" in lines[2]


def test_a_table_without_rows_has_a_header_and_a_rule() -> None:
    assert report.markdown_table(("a", "bc"), []).splitlines() == ["| a | bc |", "| - | -- |"]


def test_json_is_written_as_it_is(tmp_path: pathlib.Path) -> None:
    values = {"a": [1, 2.5, None, True, "text"], "b": {"c": "ä"}}
    report.write_json(tmp_path / "values.json", values)
    assert json.loads((tmp_path / "values.json").read_text()) == values
    assert (tmp_path / "values.json").read_text().endswith("\n")
