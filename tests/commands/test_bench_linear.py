"""bench-linear, but for the measuring itself, which needs a GPU."""

import json
import pathlib
import re
import sys
from typing import Any

import pytest
import torch

from openpi_duquant.commands import linear_timing
from openpi_duquant.commands import main
from openpi_duquant.commands.bench_linear import SHAPES

ROW = {
    "transform": 3.0, "matmul": 2.5, "epilogue": 1.25, "layer_us": 8.0, "tops": 30.0, "roofline": 0.5, "exact": True,
    "note": "",
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Shapes that were measured, on a machine that pretends to have a GPU."""
    calls: list[tuple[Any, ...]] = []

    def measure(*arguments: object) -> dict[str, object]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[:4])
        return dict(ROW)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    monkeypatch.setattr(linear_timing, "ceilings", lambda: {"memory TB/s": 4.0})
    monkeypatch.setattr(linear_timing, "measure", measure)
    return calls


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["openpi-duquant", "bench-linear", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_an_interrupted_run_goes_on_where_it_was(
    measured: list[tuple[Any, ...]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--output", tmp_path, "--layers", "expert q", "expert o", "--tokens", 1, 10, "--backends", "bitblas"
    assert run(monkeypatch, *options) == "error: interrupted"
    first = list(measured)
    assert first == [(1, 2048, 1024, "bitblas"), (10, 2048, 1024, "bitblas"), (1, 1024, 2048, "bitblas")]
    measured.clear()
    assert run(monkeypatch, *options) == 0
    assert measured == [(10, 1024, 2048, "bitblas")]
    rows = json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert [(row["layer"], row["m"]) for row in rows] == [
        ("expert q", 1), ("expert q", 10), ("expert o", 1), ("expert o", 10),
    ]  # fmt: skip
    table = (tmp_path / "linear.md").read_text()
    assert "| expert q" in table
    assert re.search(r"\| +2\.5 \| +1\.25 \| +8 \| +30 \|", table)
    assert "pretended" in table
    assert (tmp_path / "linear.png").stat().st_size > 1000


def test_results_of_another_gpu_are_not_mixed(
    measured: list[tuple[Any, ...]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--output", tmp_path, "--layers", "expert q", "--tokens", 1, "--backends", "bitblas"
    assert run(monkeypatch, *options) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert "was measured with pretended, here is another" in run(monkeypatch, *options)
    assert len(measured) == 1


@pytest.mark.parametrize(("option", "name"), [("--layers", "expert x"), ("--backends", "cutlass")])
def test_an_unknown_name_lists_those_there_are(
    option: str, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = run(monkeypatch, "--output", tmp_path, option, name)
    assert status.startswith(f"error: {option.strip('-')}: there is no {name!r}; choose from ")


def test_without_a_gpu_it_stops(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in run(monkeypatch, "--output", tmp_path)


def test_every_layer_of_pi05_is_there() -> None:
    widths = set(SHAPES.values())
    assert {(2048, 2048), (256, 2048), (16384, 2048), (2048, 16384)} <= widths
    assert {(2048, 1024), (256, 1024), (1024, 2048), (4096, 1024), (1024, 4096)} <= widths
    assert {(2560, 2048), (32768, 2048), (2560, 1024), (8192, 1024)} <= widths
