"""A profile of whole policies: how often each operation runs, in either runtime, and that it changes no action."""

from collections.abc import Callable
import json
import logging
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from openpi_duquant import profiling

pytestmark = pytest.mark.openpi
TESTS = pathlib.Path(__file__).parents[1]

# Three blocks, ten steps: (language model, a call) + (expert, a call).
MATMULS = {"engine": (2 * 7 + 2) + 10 * 3 * 7, "module": (3 + 10 * 3) * 7}
# The engine rounds an input once for all that read it: qkv, o, gate-up, down; of the last language layer k-v only.
ROUNDINGS = {"engine": (2 * 4 + 1) + 10 * 3 * 4, "module": (3 + 10 * 3) * 7}


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, plugin: types.ModuleType) -> profiling.Profile:
    """The profile that OPENPI_DUQUANT_PROFILE would start; not active yet, and not printed at exit."""
    profile = profiling.Profile()
    monkeypatch.setattr(plugin.loading, "profile_until_exit", lambda *_, **__: profile)
    return profile


@pytest.mark.parametrize("runtime", ["engine", "module"])
def test_each_operation_of_a_call_is_counted_and_changes_nothing(
    stock: Callable[..., Any],
    variables: Callable[..., None],
    hosts: Any,
    example: Callable[..., dict[str, Any]],
    profile: profiling.Profile,
    caplog: pytest.LogCaptureFixture,
    runtime: str,
) -> None:
    noise = np.random.default_rng(1).standard_normal((10, 32)).astype(np.float32)
    folder = hosts.converted / "pi05"
    plain = stock("pi05_libero_duquant", folder, runtime=runtime).infer(example("libero"), noise=noise)
    assert not caplog.records or "profiling" not in caplog.text
    variables(PROFILE="1")
    policy = stock("pi05_libero_duquant", folder, runtime=runtime)
    assert "profiling runs without torch.compile and without CUDA graphs" in [
        record.message.split(":")[0] for record in caplog.records if record.levelno == logging.WARNING
    ]
    with profile.active():
        profiled = policy.infer(example("libero"), noise=noise)
    np.testing.assert_array_equal(profiled["actions"], plain["actions"])
    totals = {label: part.calls for label, part in profile.totals().items()}
    assert totals == {
        "weight_prequant": 0,
        "input_transform": ROUNDINGS[runtime],
        "activation_forward": ROUNDINGS[runtime],
        "matmul": MATMULS[runtime],
        "output_restore": MATMULS[runtime],
    }
    assert profile.sums["matmul", "gemma_expert.mlp.down_proj"].calls == 30
    assert profile.sums["matmul", "language_model.mlp.down_proj"].calls == (2 if runtime == "engine" else 3)


def test_the_variable_prints_and_writes_at_exit(openpi: pathlib.Path, hosts: Any, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "call_a_policy.py"
    script.write_text(f"""
from openpi.policies import policy_config
from openpi.policies.libero_policy import make_libero_example
from openpi.training.config import get_config
policy = policy_config.create_trained_policy(get_config("pi05_libero_duquant"), {str(hosts.original / "pi05")!r})
policy.infer(make_libero_example())
""")
    environment = {
        **os.environ,  # noqa: TID251
        "OPENPI_DATA_HOME": str(openpi),
        "OPENPI_DUQUANT_PROFILE": str(tmp_path / "profiles"),
        "OPENPI_DUQUANT_PROFILE_SYNC": "1",
        "OPENPI_DUQUANT_PACKDIR": str(tmp_path / "packs"),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, str(TESTS / "tiny_openpi.py"), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[DUQUANT][PROFILE] fake quantization summary (cuda_sync=on)\n" in done.stdout
    assert "\ngemma_expert.self_attn.q_proj\n" in done.stdout
    (folder,) = (tmp_path / "profiles").iterdir()
    record = json.loads((folder / "profile.json").read_text())
    assert record["totals"]["matmul"]["calls"] == MATMULS["engine"]
    assert record["totals"]["weight_prequant"]["calls"] == 3 * 2 * 4  # an original checkpoint: groups were quantized
    assert record["totals"]["weight_prequant"]["seconds"] > 0
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert len(trace) == sum(part["calls"] for part in record["totals"].values())
