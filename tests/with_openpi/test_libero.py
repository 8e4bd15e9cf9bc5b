"""LIBERO's evaluation with policies of the real openpi in the same process."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from libero_fake import FakeSimulator
from libero_standins import make_standin_assets
import pytest

from openpi_duquant import PRESETS
from openpi_duquant import convert
from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.policies import load_in_process
from openpi_duquant.libero.runner import Runner

REPOSITORY = pathlib.Path(__file__).parents[2]
LAUNCHERS = {
    "run_default": "default",
    "run_simple_w4a8": "simple",
    "run_optimized_duquant": "optimized",
    "run_dit_qkvo_w4a8": "dit_qkvo",
    "run_llm_w4a8": "llm",
    "run_full_llm_dit_w4a8": "full_llm_dit",
    "run_quantvla": "quantvla",
    "run_fp16_baseline": None,
}


@pytest.mark.openpi
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("kind", ["converted", "original"])
def test_a_policy_runs_episodes_that_depend_on_their_seed_alone(hosts: Any, kind: str) -> None:
    config = "pi05_libero_duquant" if kind == "converted" else "pi05_libero"
    policy, metadata = load_in_process(getattr(hosts, kind) / "pi05", config)
    assert ("duquant" in metadata) == (kind == "converted")
    assert json.loads(json.dumps(metadata.get("duquant"))) == metadata.get("duquant")
    simulator = FakeSimulator()
    runner = Runner(simulator, policy, Settings(resize_size=8, max_steps=11, num_steps_wait=1), metadata.get("duquant"))
    moves = []
    for trial in (0, 1, 0):
        record = runner(Episode("libero_object", 0, trial, 7))
        assert (record.error, len(record.call_seconds)) == (None, -(-record.steps // 5))
        moves.append(simulator.actions)
    assert moves[0] == moves[2] != moves[1]


@pytest.mark.openpi
@pytest.mark.libero
@pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="needs LIBERO beside openpi")
@pytest.mark.parametrize(("launcher", "preset"), LAUNCHERS.items())
def test_a_launcher_runs_a_policy_in_its_process(
    launcher: str, preset: str | None, hosts: Any, openpi: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    checkpoint = hosts.original / "pi05"
    if preset:
        convert(checkpoint, tmp_path / "converted", PRESETS[preset])
        checkpoint = tmp_path / "converted"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/tiny_openpi.py "$@"\n')
    python.chmod(0o755)
    environment = {
        "PATH": os.defpath,
        "HOME": str(tmp_path),
        "PYTHON": str(python),
        "PYTHONPATH": f"{REPOSITORY}",
        "OPENPI_SRC": os.environ["OPENPI_SRC"],  # noqa: TID251
        "OPENPI_DATA_HOME": str(openpi),
        "OPENPI_DISABLE_TORCH_COMPILE": "1",
        "CKPT": str(checkpoint),
        "TASK_SUITE": "libero_object",
        "TASKS": "0",
        "NUM_TRIALS": "1",
        "LIBERO_ASSETS": str(make_standin_assets(tmp_path / "standins")),
        "RESULTS_DIR": str(tmp_path / "results"),
    }
    command = ["bash", str(REPOSITORY / "examples" / "libero" / f"{launcher}.sh"), "--max-steps", "11"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["summary"]["policy_calls"] == 3
    assert results["assets"] == "stand-in assets"
    assert (results["policy"] or {}).get("config") == (PRESETS[preset].to_json() if preset else None)
