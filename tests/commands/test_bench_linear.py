"""bench-linear, but for the measuring itself, which needs a GPU."""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import interpreted
import pytest
import torch

from openpi_duquant import kernels
from openpi_duquant.commands import linear_timing
from openpi_duquant.commands import main
from openpi_duquant.commands import simulation
from openpi_duquant.commands.bench_linear import SHAPES
from openpi_duquant.kernels import triton_matmul

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


def test_the_transform_is_set_against_the_loop(
    measured: list[tuple[Any, ...]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"naive loop": 900.0, "naive loop, in a graph": 330.0, "triton, restored": 3.0}

    def measure(*arguments: object) -> dict[str, object]:
        measured.append(arguments[:4])
        return ROW | {"transform": times[arguments[3]]}

    monkeypatch.setattr(linear_timing, "measure", measure)
    options = "--output", tmp_path, "--layers", "expert q", "--tokens", 10, "--backends"
    assert run(monkeypatch, *options, *list(times)[:2]) == 0
    assert "naive loop:" not in (tmp_path / "linear.md").read_text()
    assert run(monkeypatch, *options, *times) == 0
    assert [call[3] for call in measured] == list(times)
    table = (tmp_path / "linear.md").read_text().partition("against the naive loop:")[2]
    assert re.search(r"\| expert q \| +10 \| +900 \| +330 \| +3 \| +300 \| +110 \|", table)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that is timed runs once, on the CPU; Triton in its interpreter."""

    def once(work: Callable[..., object], *_: object) -> float:
        try:
            work(0)
        except TypeError:
            work()
        return 2.0

    triton = dataclasses.replace(
        triton_matmul.BACKEND, can_run=lambda *_: (True, []), load=lambda *_: None, fused=False
    )
    monkeypatch.setitem(kernels.BACKENDS, "triton", triton)
    monkeypatch.setattr(linear_timing, "_DEVICE", "cpu")
    monkeypatch.setattr(linear_timing, "L2_BYTES", 1)
    for name in ("microseconds", "wall_microseconds"):
        monkeypatch.setattr(linear_timing, name, once)
    with interpreted.operators():
        yield


RATES = {"memory TB/s": 4.0, "bf16 TFLOP/s": 800.0, "int8 TOP/s": 1600.0}


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("backend", ["triton", "triton, restored"])
@pytest.mark.parametrize("fault", [False, True])
def test_a_row_says_whether_sums_are_exact(backend: str, monkeypatch: pytest.MonkeyPatch, *, fault: bool) -> None:
    right = kernels.BACKENDS["triton"].matmul
    if fault:
        wrong = dataclasses.replace(kernels.BACKENDS["triton"], matmul=lambda *given: right(*given) + 1)
        monkeypatch.setitem(kernels.BACKENDS, "triton", wrong)
    row = linear_timing.measure(3, 64, 128, backend, RATES)
    assert row["exact"] is not fault
    assert (row["transform"], row["matmul"], row["layer_us"]) == (2.0, 2.0, 2.0)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("backend", ["naive loop", "naive loop, in a graph"])
def test_the_naive_loop_is_the_research_codes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    plain = simulation.rotate

    def rotate(x: torch.Tensor, matrices: torch.Tensor, style: simulation.Style) -> torch.Tensor:
        products.append((tuple(matrices.shape), style))
        return plain(x, matrices, style)

    monkeypatch.setattr(simulation, "rotate", rotate)
    row = linear_timing.measure(3, 64, 128, backend, RATES)
    assert (row["transform"], row["layer_us"], row["exact"], row["note"]) == (2.0, 2.0, None, "no integers")
    before, after = ((8, 16, 16), simulation.Style()), ((4, 16, 16), simulation.Style())
    assert products == [before, before, after]


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
