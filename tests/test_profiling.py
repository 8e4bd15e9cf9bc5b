"""What a profile counts, prints and writes; that it changes nothing, and costs nothing when it is off."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import time
from typing import get_args

import pytest
import torch
from torch import nn

from openpi_duquant import profiling
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.linear import name_layers
from openpi_duquant.linear import quantize_
from openpi_duquant.profiling import Label
from openpi_duquant.profiling import Profile
from openpi_duquant.profiling import Sum
from openpi_duquant.profiling import in_layer
from openpi_duquant.profiling import span

LABELS = get_args(Label)
EXPERT = "paligemma_with_expert.gemma_expert.model.layers.{}.self_attn.q_proj"
X = torch.zeros(4, 8)  # 32 elements, 128 bytes
CODES = torch.zeros(4, 8, dtype=torch.int8)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a quarter of a second after the last."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(100.0, 0.25).__next__)


@pytest.mark.usefixtures("ticking")
def test_spans_are_summed_by_label_and_group_of_layers() -> None:
    profile = Profile()
    with profile.active():
        for index in (0, 1):
            with profile.layer(EXPERT.format(index)), span("matmul", X):
                pass
        with profile.layer("other"), span("matmul", CODES):
            pass
        with span("weight_prequant", X):
            pass
    assert profile.sums == {
        ("matmul", "gemma_expert.self_attn.q_proj"): Sum(calls=2, seconds=0.5, elements=64, bytes=256),
        ("matmul", "other"): Sum(calls=1, seconds=0.25, elements=32, bytes=32),
        ("weight_prequant", "-"): Sum(calls=1, seconds=0.25, elements=32, bytes=128),
    }
    never = dict.fromkeys(LABELS, Sum())
    assert profile.totals() == never | {
        "matmul": Sum(calls=3, seconds=0.75, elements=96, bytes=288),
        "weight_prequant": Sum(calls=1, seconds=0.25, elements=32, bytes=128),
    }


def test_seconds_are_those_that_passed() -> None:
    profile = Profile()
    start = time.perf_counter()
    with profile.active(), span("matmul", X):
        time.sleep(0.05)
    assert 0.05 <= profile.totals()["matmul"].seconds <= time.perf_counter() - start


def test_the_profile_that_was_active_before_is_active_again() -> None:
    outer, inner = Profile(), Profile()
    with outer.active():
        with contextlib.suppress(KeyError), inner.active():
            with span("matmul", X):
                pass
            raise KeyError
        with outer.layer("a"):
            with contextlib.suppress(KeyError), outer.layer("b"):
                raise KeyError
            with span("matmul", X):
                pass
    assert isinstance(span("matmul", X), contextlib.nullcontext)
    assert list(inner.sums) == [("matmul", "-")]
    assert list(outer.sums) == [("matmul", "a")]


@pytest.mark.parametrize(
    ("layer", "group"),
    [
        (EXPERT.format(17), "gemma_expert.self_attn.q_proj"),
        ("paligemma_with_expert.paligemma.model.language_model.layers.3.mlp.up_proj", "language_model.mlp.up_proj"),
        ("a.vision_tower.vision_model.encoder.layers.12.mlp.fc1", "vision_tower.mlp.fc1"),
        ("action_in_proj", "action_in_proj"),
    ],
)
def test_a_group_is_the_same_layer_of_all_blocks(layer: str, group: str) -> None:
    assert profiling.group_of(layer) == group


@pytest.mark.usefixtures("ticking")
def test_the_table_has_every_label_then_every_group() -> None:
    profile = Profile(sync=True)
    with profile.active(), profile.layer(EXPERT.format(0)):
        for _ in range(4):
            with span("input_transform", torch.zeros(1000, 1000)):
                pass
    title, rule, header, *rows = profile.summary().splitlines()
    assert title == "[DUQUANT][PROFILE] fake quantization summary (cuda_sync=on)"
    assert set(rule) == {"-"}
    assert re.split(r"\s{2,}", header) == ["Label", "Calls", "Total ms", "Avg ms", "Elems", "GB/s"]
    table = [row.split() for row in rows[: len(LABELS)]]
    assert {row[0]: row[1:] for row in table} == {
        label: ["0", "0.00", "0.000", "0", "0.00"] for label in LABELS if label != "input_transform"
    } | {"input_transform": ["4", "1000.00", "250.000", "4000000", "0.02"]}  # 16 MB in a second
    blank, group, *_, last = rows[len(LABELS) :]
    assert (blank, group) == ("", "gemma_expert.self_attn.q_proj")
    assert last.split() == ["input_transform", "4", "1000.00", "250.000", "4000000", "0.02"]
    assert "cuda_sync=off" in Profile().summary()


@pytest.mark.usefixtures("ticking")
def test_files_hold_the_sums_and_a_bounded_trace(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "TRACED_SPANS", 5)
    profile = Profile()
    with profile.active(), profile.layer(EXPERT.format(1)):
        for label in ("matmul", "output_restore") * 4:
            with span(label, X):
                pass
    profile.save(tmp_path / "new" / "folder")
    record = json.loads((tmp_path / "new" / "folder" / "profile.json").read_text())
    assert {label: Sum(**part) for label, part in record["totals"].items()} == profile.totals()
    groups = {(part.pop("label"), part.pop("group")): Sum(**part) for part in record["groups"]}
    assert groups == profile.sums
    assert groups["matmul", "gemma_expert.self_attn.q_proj"].calls == 4
    assert record["cuda_sync"] is False
    assert record["stamp"]["versions"]["torch"] == torch.__version__
    trace = json.loads((tmp_path / "new" / "folder" / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in trace] == ["matmul", "output_restore", "matmul", "output_restore", "matmul"]
    for index, event in enumerate(trace):
        assert event["ph"] == "X"
        assert (event["ts"], event["dur"]) == (0.25e6 * (1 + 2 * index), 0.25e6)
        assert event["args"] == {"layer": EXPERT.format(1), "elements": 32}
        assert {type(event["pid"]), type(event["tid"])} == {int}


class Block(nn.Module):
    """Two layers, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 32)
        self.o_proj = nn.Linear(32, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(self.o_proj(self.q_proj(x))))


WIDTHS = {"q_proj": (64, 32), "o_proj": (32, 64)}


@pytest.mark.parametrize("backend", ["reference", "fake"])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_every_call_of_a_quantized_layer_is_counted_once(backend: str, activation_bits: int) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(5, 64)
    profile = Profile()
    config = DuQuantConfig(rotation_block=16, row_rotation="restore", activation_bits=activation_bits)
    with profile.active():
        quantize_(model, config, backend=backend)
    assert {key: (part.calls, part.elements) for key, part in profile.sums.items()} == {
        ("weight_prequant", layer): (1, 64 * 32) for layer in WIDTHS
    }
    profile.sums.clear()
    with torch.no_grad():
        expected = model(x)
        name_layers(model)
        off = model(x)
        with profile.active():
            on = model(x)
    assert torch.equal(off, expected)
    assert torch.equal(on, expected)
    a_bytes = 1 if activation_bits == 8 else 4
    expected_sums = {}
    for layer, (k, n) in WIDTHS.items():
        expected_sums["input_transform", layer] = 2, 2 * 5 * k, 4
        expected_sums["matmul", layer] = 2, 2 * 5 * k, a_bytes
        expected_sums["output_restore", layer] = 2, 2 * 5 * n, 4
        if activation_bits == 8:
            expected_sums["activation_forward", layer] = 2, 2 * 5 * k, 4
    found = {key: (part.calls, part.elements, part.bytes // part.elements) for key, part in profile.sums.items()}
    assert found == expected_sums


def test_a_named_function_keeps_its_name_and_result() -> None:
    @dataclasses.dataclass
    class Layer:
        factor: int

        def scale(self, x: int) -> int:
            return self.factor * x

    scale = in_layer("a", Layer(3).scale)
    assert scale.__name__ == "scale"
    assert scale(x=2) == 6


def test_off_a_span_is_a_null_context_and_costs_microseconds() -> None:
    assert type(span("matmul", X)) is contextlib.nullcontext
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            with span("matmul", X):
                pass
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 10e-6


def test_a_profile_until_exit_is_printed_and_written_at_exit(tmp_path: pathlib.Path) -> None:
    code = f"""
import pathlib, torch
from openpi_duquant.profiling import profile_until_exit, span
for _ in range(2):
    profile = profile_until_exit(pathlib.Path({str(tmp_path / "profiles")!r}), sync=False)
with span("matmul", torch.zeros(10)):
    pass
print("last line of the program")
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    program, table = done.stdout.split("last line of the program\n")
    assert program == ""
    assert table.startswith("[DUQUANT][PROFILE] fake quantization summary (cuda_sync=off)\n")
    assert table.count("[DUQUANT]") == 1
    (folder,) = (tmp_path / "profiles").iterdir()
    assert f"wrote {folder}/profile.json and trace.json" in table
    assert json.loads((folder / "profile.json").read_text())["totals"]["matmul"]["calls"] == 1
    assert len(json.loads((folder / "trace.json").read_text())["traceEvents"]) == 1
