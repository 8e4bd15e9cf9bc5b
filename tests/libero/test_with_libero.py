"""Real LIBERO, without a display, on assets that are not LIBERO's. `make test-libero` installs it and runs these."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import libero_engine
import libero_expert
from libero_standins import make_standin_assets
import pytest

from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.evaluation import Evaluation
from openpi_duquant.libero.runner import Runner
from openpi_duquant.libero.simulator import LiberoSimulator

LAUNCHERS = pathlib.Path(__file__).parents[2] / "examples" / "libero"
PRESETS = {
    "run_default": "default",
    "run_simple_w4a8": "simple",
    "run_optimized_duquant": "optimized",
    "run_dit_qkvo_w4a8": "dit_qkvo",
    "run_llm_w4a8": "llm",
    "run_full_llm_dit_w4a8": "full_llm_dit",
    "run_quantvla": "quantvla",
    "run_fp16_baseline": None,
}

pytestmark = [
    pytest.mark.libero,
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="needs LIBERO"),
    pytest.mark.filterwarnings("ignore"),  # LIBERO's and robosuite's
]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The stand-ins."""
    return make_standin_assets(tmp_path_factory.mktemp("assets") / "standins")


@pytest.fixture(scope="session")
def simulator(assets: pathlib.Path) -> Iterator[LiberoSimulator]:
    """libero_object on stand-ins."""
    simulator = LiberoSimulator("libero_object", assets)
    libero_expert.without_antialiasing()
    yield simulator
    simulator.close()


def files_that_do_not_say_stand_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Of everything a run wrote."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 4
    return [
        path
        for path in files
        if not (path.name.startswith("stand-in-assets_") if path.suffix == ".mp4" else "stand-in" in path.read_text())
    ]


def test_the_expert_solves_three_tasks_five_times_each(simulator: LiberoSimulator, tmp_path: pathlib.Path) -> None:
    arguments = Arguments(
        host=("expert",),
        task_suite_name="libero_object",
        tasks=(0, 1, 2),
        num_trials_per_task=5,
        results_dir=tmp_path,
    )
    build = functools.partial(libero_expert.build, arguments, simulator)
    with Evaluation(arguments, stand_ins=True, build=build) as evaluation:
        for record in evaluation.run():
            assert record.status == "success", record
    assert [(task["task"], task["successes"], task["episodes"]) for task in evaluation.results["tasks"]] == [
        (0, 5, 5),
        (1, 5, 5),
        (2, 5, 5),
    ]
    assert not files_that_do_not_say_stand_in(tmp_path)
    videos = {path.name for path in (tmp_path / "videos").iterdir()}
    assert videos == {f"stand-in-assets_task{t:02}_episode{e:03}_success.mp4" for t in range(3) for e in range(5)}


def test_a_quantized_engine_policy_runs_a_full_episode_with_the_right_number_of_calls(
    simulator: LiberoSimulator, converted: Callable[[str], pathlib.Path]
) -> None:
    policy = libero_engine.EnginePolicy(converted("optimized"))
    record = Runner(simulator, policy, Settings(), policy.metadata)(
        Arguments(task_suite_name="libero_object").episodes()[0]
    )
    assert record.error is None
    assert (record.status, record.steps, policy.calls, len(record.call_seconds)) == ("failure", 280, 56, 56)
    assert record.instruction == "pick up the alphabet soup and place it in the basket"


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(
    assets: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def run(folder: str, *, die_at_call: int = -1) -> int:
        command = [sys.executable, libero_expert.__file__, str(tmp_path / folder), str(assets), str(die_at_call)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert finished.returncode in (0, -signal.SIGKILL), finished.stderr
        return finished.returncode

    def videos(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder / "videos").iterdir()}

    def outcomes(folder: str) -> list[tuple[object, ...]]:
        rows = json.loads((tmp_path / folder / "results.json").read_text())["episodes"]
        return [
            tuple(row[name] for name in ("task", "trial", "seed", "status", "steps", "policy_calls")) for row in rows
        ]

    assert run("undisturbed") == 0
    assert run("disturbed", die_at_call=21) == -signal.SIGKILL  # in the third of four episodes of eight calls
    assert len((tmp_path / "disturbed" / "journal.jsonl").read_text().splitlines()) == 1 + 2
    assert run("disturbed") == 0
    assert outcomes("disturbed") == outcomes("undisturbed")
    assert len(outcomes("disturbed")) == 4
    assert videos("disturbed") == videos("undisturbed")  # every image that was seen


@contextlib.contextmanager
def server(checkpoint: pathlib.Path) -> Iterator[int]:
    """A policy server; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, libero_engine.__file__, str(checkpoint), str(port)])
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("launcher", "preset"), PRESETS.items())
def test_a_launcher_evaluates_a_server_from_a_clean_shell(
    launcher: str,
    preset: str | None,
    assets: pathlib.Path,
    source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    command = ["bash", str(LAUNCHERS / f"{launcher}.sh"), "--max-steps", "11", "--num-steps-wait", "2"]
    with server(converted(preset) if preset else source) as port:
        environment = {
            "PATH": os.defpath,
            "HOME": str(tmp_path),
            "PYTHON": sys.executable,
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "TASK_SUITE": "libero_object",
            "TASKS": "0",
            "NUM_TRIALS": "1",
            "LIBERO_ASSETS": str(assets),
            "RESULTS_DIR": str(tmp_path / "results"),
        }
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=environment, stdin=subprocess.DEVNULL
        )
    assert finished.returncode == 0, finished.stderr
    printed = finished.stdout
    for line in ("Average policy call: ", "Throughput: ", "Episode time: "):
        assert printed.count(f"\n{line}") == 2  # of the episode, and of all
    for part in ("p50 ", "p95 ", "p99 ", "Success rate: 0.0%, 95% interval 0.0% to 79.3%", "0 errors"):
        assert part in printed
    assert printed.count("stand-in assets") == 2
    assert not files_that_do_not_say_stand_in(tmp_path / "results")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["summary"]["policy_calls"] == 3
    assert (results["policy"] is None) == (preset is None)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "error: LIBERO's assets: there are no scenes in "),
        ({"LIBERO_ASSETS": "{assets}", "LIBERO_CONFIG_PATH": "/nowhere"}, "error: LIBERO config: there is no /nowhere"),
        ({"LIBERO_ASSETS": "{assets}", "MUJOCO_GL": "osmosis"}, "error: MuJoCo"),
        ({"LIBERO_ASSETS": "{assets}", "PORT": "1"}, "error: no policy server answers at 127.0.0.1:1"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    assets: pathlib.Path, tmp_path: pathlib.Path, variables: dict[str, str], said: str
) -> None:
    given = {name: value.format(assets=assets) for name, value in variables.items()}
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "PYTHON": sys.executable, "HOST": "127.0.0.1"} | given
    command = ["bash", str(LAUNCHERS / "run_default.sh"), "--results-dir", str(tmp_path / "results")]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    assert finished.returncode == 1
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error")]
    assert [error.startswith(said) for error in errors] == [True], finished.stderr
    assert "Traceback" not in finished.stderr
