"""The launchers: their variables are the presets, the caller's come first, and mistakes end in one line at once."""

import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import time
from typing import Any

import pytest

from openpi_duquant import PRESETS
from openpi_duquant import DuQuantConfig
from openpi_duquant import DuQuantError
from openpi_duquant.environment import read_environment
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.evaluation import check

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "libero"
LAUNCHERS = {
    "run_default.sh": "default",
    "run_simple_w4a8.sh": "simple",
    "run_optimized_duquant.sh": "optimized",
    "run_dit_qkvo_w4a8.sh": "dit_qkvo",
    "run_llm_w4a8.sh": "llm",
    "run_full_llm_dit_w4a8.sh": "full_llm_dit",
    "run_quantvla.sh": "quantvla",
}
BASELINE, VERIFY = "run_fp16_baseline.sh", "verify_duquant_layers.sh"
ALL = (*LAUNCHERS, BASELINE, VERIFY)

STUB = """#!{python}
import json, os, sys
with open({dump!r}, "w") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}, file)
sys.exit(7)
"""


@pytest.fixture
def checkpoint(source: pathlib.Path) -> dict[str, str]:
    """CKPT."""
    return {"CKPT": str(source)}


def launch(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher in an environment of nothing but PATH and these variables."""
    environment = {"PATH": os.defpath, "PYTHON": sys.executable, **variables}
    command = ["bash", str(FOLDER / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.fixture
def stub(tmp_path: pathlib.Path) -> tuple[str, pathlib.Path]:
    """A PYTHON that notes what it was called with and exits with status 7; and the file of its notes."""
    path, dump = tmp_path / "python", tmp_path / "dump.json"
    path.write_text(STUB.format(python=sys.executable, dump=str(dump)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path), dump


def noted(stub: tuple[str, pathlib.Path], name: str, *arguments: str, **variables: str) -> tuple[list[str], Any]:
    """Arguments that a launcher gives main.py, and what its environment says."""
    finished = launch(name, *arguments, PYTHON=stub[0], **variables)
    assert (finished.returncode, finished.stderr) == (7, "")  # the status is passed on
    notes = json.loads(stub[1].read_text())
    main, *passed = notes["arguments"]
    assert pathlib.Path(main) == FOLDER / "main.py"
    return passed, read_environment(notes["environment"])


@pytest.mark.parametrize(("name", "preset"), LAUNCHERS.items())
def test_the_variables_of_a_launcher_are_exactly_its_preset(
    stub: tuple[str, pathlib.Path], checkpoint: dict[str, str], name: str, preset: str
) -> None:
    arguments, environment = noted(stub, name, **checkpoint)
    assert DuQuantConfig(**environment.fields) == PRESETS[preset]
    assert arguments[:2] == ["--policy-config", "pi05_libero_duquant"]


def test_every_preset_has_a_launcher() -> None:
    assert set(LAUNCHERS.values()) == set(PRESETS)
    assert {path.name for path in FOLDER.glob("*.sh")} == {*ALL, "common.sh"}


@pytest.mark.parametrize(("name", "preset"), LAUNCHERS.items())
def test_what_the_caller_set_is_kept_even_if_it_is_empty(
    stub: tuple[str, pathlib.Path], checkpoint: dict[str, str], name: str, preset: str
) -> None:
    own = {"OPENPI_DUQUANT_WBITS_DEFAULT": "8", "OPENPI_DUQUANT_SCOPE": "", "OPENPI_DUQUANT_BACKEND": "fake"}
    fields = noted(stub, name, **checkpoint, **own)[1].fields
    expected = DuQuantConfig(**{**vars(PRESETS[preset]), "weight_bits": 8, "scope": ""})
    assert DuQuantConfig(**fields) == expected


def test_the_baseline_sets_no_variable(stub: tuple[str, pathlib.Path], checkpoint: dict[str, str]) -> None:
    arguments, environment = noted(stub, BASELINE, **checkpoint)
    assert arguments[:2] == ["--policy-config", "pi05_libero"]
    assert environment.fields == {}


def test_the_callers_choices_reach_main(stub: tuple[str, pathlib.Path], checkpoint: dict[str, str]) -> None:
    choices = {"TASK_SUITE": "libero_10", "NUM_TRIALS": "3", "SEED": "11", "TASKS": "0,2 4", "RESULTS_DIR": "a b/c"}
    arguments, _ = noted(stub, "run_llm_w4a8.sh", "--resume", "--num-workers", "2", **checkpoint, **choices)
    text = "\n".join(arguments)
    for expected in (
        "--task-suite-name\nlibero_10",
        "--num-trials-per-task\n3",
        "--seed\n11",
        "--tasks\n0\n2\n4",
        "--results-dir\na b/c",
        f"--checkpoint\n{checkpoint['CKPT']}",
        "--resume\n--num-workers\n2",
    ):
        assert expected in text
    arguments, _ = noted(stub, "run_llm_w4a8.sh", HOST="left right", PORT="8000 8001", LIBERO_ASSETS="/some/assets")
    text = "\n".join(arguments)
    assert "--host\nleft\nright\n--port\n8000\n8001" in text
    assert "--assets\n/some/assets" in text
    assert "--results-dir\nresults/libero/llm_w4a8/libero_spatial" in text
    assert "--checkpoint" not in text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wrong", ["missing", "empty", "unset"])
def test_a_wrong_checkpoint_ends_at_once_in_one_line_that_names_it(
    tmp_path: pathlib.Path, name: str, wrong: str
) -> None:
    folder = tmp_path / "my checkpoint"
    if wrong == "empty":
        folder.mkdir()
    start = time.monotonic()
    finished = launch(name, **({} if wrong == "unset" else {"CKPT": str(folder)}))
    assert time.monotonic() - start < 5
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: checkpoint")
    assert finished.stderr.count("\n") == 1
    assert ("CKPT" if wrong == "unset" else str(folder)) in finished.stderr


def test_the_layers_of_all_presets_are_listed_with_their_counts(checkpoint: dict[str, str]) -> None:
    finished = launch(VERIFY, **checkpoint)
    assert finished.returncode == 0, finished.stderr
    parts = dict(part.split("\n", 1) for part in finished.stdout.split("== ")[1:])
    assert set(parts) == set(PRESETS)
    counts = {preset: int(text.rpartition(" layers quantized")[0].split("\n")[-1]) for preset, text in parts.items()}
    whole = {"default": 28, "simple": 14, "optimized": 14, "dit_qkvo": 8, "llm": 14, "full_llm_dit": 28, "quantvla": 20}
    assert counts == whole  # two layers: a ninth of the full model's
    for preset, text in parts.items():
        assert text.count("_proj ") == counts[preset]


@pytest.mark.skipif(not shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent)), reason="shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    command = [shellcheck, "--external-sources", *map(str, sorted(FOLDER.glob("*.sh")))]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.stdout + finished.stderr == ""


def test_main_says_in_one_line_what_is_missing(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(FOLDER / "main.py"), "--checkpoint", str(tmp_path / "none")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    assert finished.stderr == f"error: checkpoint: there is no folder {tmp_path / 'none'}\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "give --checkpoint .* or --host"),
        ({"host": ("a",), "checkpoint": pathlib.Path("b")}, "give --checkpoint .* or --host"),
        ({"host": ("a",), "num_workers": 0}, "num_workers: 0"),
        ({"host": ("a",), "tasks": (11,)}, "no task 11"),
    ],
)
def test_choices_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DuQuantError, match=said):
        check(Arguments(**change))


def test_a_run_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(DuQuantError, match="holds a run; --resume continues it"):
        check(Arguments(host=("a",), results_dir=tmp_path))
