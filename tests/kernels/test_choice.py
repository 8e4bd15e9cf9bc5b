"""What `auto` takes where several backends run, with times that are given instead of measured."""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import json
import logging
import pathlib

import pytest
import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant import packing
from openpi_duquant.environment import cache_folder
from openpi_duquant.kernels import Backend
from openpi_duquant.kernels import Problem
from openpi_duquant.kernels import choice
from openpi_duquant.kernels import driver
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.files import write_whole
from openpi_duquant.profiling import Profile
from openpi_duquant.profiling import span

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PROBLEM = Problem(64, 128, 4, 8, 1, "none", 0, torch.bfloat16, tokens=((10, 10), (968, 1)))
WHERE = {"gpu": "pretended", "driver": "CUDA 13.0", "torch": "2.11", "triton": "3.6", "kernels": "abc"}
TRITON, BITBLAS = Backend(lambda *_: None), Backend(lambda *_: None, fuses_epilogue=True)
RIVALS = {"triton": TRITON, "bitblas": BITBLAS}


class Stopwatch:
    """Gives times out, and keeps what was asked for. By default a call takes triton 100 us and bitblas 130 us."""

    def __init__(self) -> None:
        self.times = {id(TRITON): {10: 4.0, 968: 60.0}, id(BITBLAS): {10: 3.0, 968: 100.0}}
        self.asked: list[tuple[str, Problem]] = []
        self.where = dict(WHERE)

    def measure(self, backend: Backend, problem: Problem, _: torch.device) -> dict[int, float]:
        self.asked.append(("triton" if backend is TRITON else "bitblas", problem))
        found = self.times[id(backend)]
        if isinstance(found, Exception):
            raise found
        return {m: found[m] for m, _ in problem.tokens}


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[Stopwatch]:
    """A machine with a GPU, on which triton and bitblas run and nothing is known yet."""
    watch = Stopwatch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measure", watch.measure)
    monkeypatch.setattr(choice, "environment", lambda _: dict(watch.where))
    monkeypatch.setattr(choice, "_decided", {})
    monkeypatch.setattr(kernels, "BACKENDS", kernels.BACKENDS | RIVALS)
    kernels._log_choice.cache_clear()
    yield watch
    kernels._log_choice.cache_clear()


def fastest(problem: Problem = PROBLEM) -> str:
    """What a new process takes."""
    choice._decided.clear()
    return choice.decide(RIVALS, [problem], CUDA)[problem].fastest(problem)


def files() -> list[pathlib.Path]:
    return sorted((cache_folder() / "auto").glob("*"))


def test_the_sum_over_a_call_counts(stopwatch: Stopwatch) -> None:
    assert kernels.resolve("auto", PROBLEM, CUDA) == "triton"
    often = dataclasses.replace(PROBLEM, tokens=((10, 100), (968, 1)))  # 460 against 400
    assert kernels.resolve("auto", often, CUDA) == "bitblas"
    assert stopwatch.asked == [(name, problem) for problem in (PROBLEM, often) for name in RIVALS]


def test_what_was_measured_is_kept(stopwatch: Stopwatch) -> None:
    assert fastest() == "triton"
    (path,) = files()
    assert path.name.startswith("W4A8-64x128-")
    assert json.loads(path.read_text())["microseconds"] == {
        "triton": {"10": 4.0, "968": 60.0}, "bitblas": {"10": 3.0, "968": 100.0},
    }  # fmt: skip
    stopwatch.asked.clear()
    stopwatch.times[id(TRITON)] = {10: 1000.0, 968: 1000.0}
    assert fastest() == "triton"
    assert not stopwatch.asked


@pytest.mark.parametrize("what", WHERE)
def test_it_is_measured_again_where_something_else_runs(what: str, stopwatch: Stopwatch) -> None:
    assert fastest() == "triton"
    stopwatch.times[id(TRITON)] = {10: 1000.0, 968: 1000.0}
    stopwatch.where[what] += "1"
    assert fastest() == "bitblas"
    stopwatch.where[what] = WHERE[what]
    assert fastest() == "triton"
    assert len(files()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"out_features": 128}, {"in_features": 64}, {"weight_bits": 8}, {"dtype": torch.float16},
        {"output_rotation": "matrix", "output_block": 16}, {"tokens": ((10, 1),)},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_layer_is_measured(change: dict[str, object], stopwatch: Stopwatch) -> None:
    fastest()
    stopwatch.asked.clear()
    other = dataclasses.replace(PROBLEM, **change)
    fastest(other)
    assert stopwatch.asked == [("triton", other), ("bitblas", other)]


def spoil(change: Callable[[dict[str, object]], object]) -> Callable[[str], str]:
    def spoiled(text: str) -> str:
        kept = json.loads(text)
        change(kept)
        return json.dumps(kept)

    return spoiled


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda _: "null",
        lambda _: '"\\ud800"',
        spoil(lambda kept: kept.pop("measured")),
        spoil(lambda kept: kept["measured"].update(gpu="another")),
        spoil(lambda kept: kept["microseconds"].pop("bitblas")),
        spoil(lambda kept: kept["microseconds"]["triton"].pop("968")),
        spoil(lambda kept: kept["microseconds"]["triton"].update({"10": "fast"})),
        spoil(lambda kept: kept["microseconds"]["triton"].update({"10": None})),
        spoil(lambda kept: kept["microseconds"]["triton"].update({"10": float("nan")})),
        spoil(lambda kept: kept["microseconds"]["triton"].update({"10": -1.0})),
    ],
)
def test_a_damaged_file_is_measured_and_written_again(damage: Callable[[str], str], stopwatch: Stopwatch) -> None:
    fastest()
    (path,) = files()
    right = path.read_text()
    path.write_text(damage(right))
    stopwatch.asked.clear()
    assert fastest() == "triton"
    assert len(stopwatch.asked) == 2
    assert path.read_text() == right
    path.write_bytes(b"\xff\xfe\x00")
    assert fastest() == "triton"
    assert path.read_text() == right


def test_a_cache_that_cannot_be_written_is_done_without(
    stopwatch: Stopwatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "openpi-duquant").write_text("a file, where a folder belongs")
    assert fastest() == "triton"
    assert len(stopwatch.asked) == 2
    assert "cannot keep what was measured" in caplog.text


def test_several_writers_leave_a_whole_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "file"
    contents = [str(index).encode() * 200_000 for index in range(8)]
    seen = set()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(write_whole, path, content) for content in contents * 4]
        while not all(job.done() for job in writing):
            seen |= {path.read_bytes()} if path.exists() else set()
    for job in writing:
        job.result()
    assert seen | {path.read_bytes()} <= set(contents)
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_whole(tmp_path / "taken", b"content")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_backend_that_cannot_be_measured_is_left_out(stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture) -> None:
    stopwatch.times[id(TRITON)] = RuntimeError("CUDA out of memory")
    assert kernels.resolve("auto", PROBLEM, CUDA) == "bitblas"
    assert "backend auto: triton is left out for W4A8 64x128: RuntimeError: CUDA out of memory" in caplog.messages
    assert not files()  # the next process tries again
    stopwatch.asked.clear()
    assert kernels.resolve("auto", PROBLEM, CUDA) == "bitblas"
    assert not stopwatch.asked


def test_where_none_can_be_measured_the_reference_runs_and_it_is_said(
    stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopwatch.times = {id(backend): RuntimeError("no GPU left") for backend in RIVALS.values()}
    assert kernels.resolve("auto", PROBLEM, CUDA) == "reference"
    assert caplog.records[-1].levelno == logging.WARNING
    assert (
        "runs on reference; triton fails: RuntimeError: no GPU left; bitblas fails: RuntimeError: no GPU left"
        in caplog.messages[-1]
    )


def test_one_table_is_logged_once(stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture) -> None:
    wide = dataclasses.replace(PROBLEM, in_features=256, tokens=((10, 1),))
    with caplog.at_level(logging.INFO, "openpi_duquant.kernels"):
        kernels.load("auto", [PROBLEM, wide, PROBLEM], CUDA)
        for problem in (PROBLEM, wide):
            kernels.resolve("auto", problem, CUDA)
    (message,) = caplog.messages
    head, *table = message.splitlines()
    assert head == "backend auto on pretended, 2 of 2 measured now, the rest before:"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["layer", "tokens x calls", "triton, us", "bitblas, us", "chosen"]
    assert cells[2:] == [
        ["W4A8 64x128", "10 x10, 968 x1", "4, 60", "3, 100", "triton"],
        ["W4A8 64x256", "10 x1", "4", "3", "bitblas"],
    ]
    assert len(stopwatch.asked) == 4


@pytest.mark.parametrize(("name", "device"), [("auto", CPU), ("bitblas", CUDA), ("bitblas", CPU)])
def test_nothing_is_measured_without_a_choice(name: str, device: torch.device, stopwatch: Stopwatch) -> None:
    kernels.load(name, [PROBLEM], device)
    assert kernels.resolve(name, PROBLEM, device) == {"auto": "triton"}.get(name, name)
    assert not stopwatch.asked


def test_one_that_runs_is_taken_unmeasured(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BACKENDS, "triton", Backend(lambda *_: None, can_run=lambda *_: (False, ["no"])))
    kernels.load("auto", [PROBLEM], CUDA)
    assert kernels.resolve("auto", PROBLEM, CUDA) == "bitblas"
    assert not stopwatch.asked


@pytest.mark.parametrize("kind", ["none", "hadamard", "matrix"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_measured_is_the_layer(bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dataclasses.replace(PROBLEM, weight_bits=bits, output_rotation=kind, output_block=16)
    shapes, weights = [], set()

    def matmul(a: Tensor, act_scale: Tensor, weight: Tensor, *operands: object) -> Tensor:
        weights.add(weight.data_ptr())
        row_sum = operands[-1]
        assert torch.equal(row_sum, a.sum(1, keepdim=True, dtype=torch.int32))
        y = reference.matmul(a, act_scale, weight.flip(0), *operands)
        shapes.append((*a.shape, y.shape[1], packing.unpack(weight).shape[1], operands[2] is None, y.dtype))
        return y

    def microseconds(launch: Callable[[int], Tensor], launches: int) -> float:
        for index in range(3):
            launch(index)
        assert launches == 256  # of a weight that is far smaller than the cache
        return 7.0 if len(shapes) == 3 else 8.0

    monkeypatch.setattr(choice, "microseconds", microseconds)
    mirrored = Backend(matmul, repack=lambda _, weight: weight.flip(0))
    before = torch.get_rng_state()
    with Profile().active() as profile:
        assert choice.measure(mirrored, problem, CPU) == {10: 7.0, 968: 8.0}
        assert not profile.sums
        with span("matmul", torch.ones(1)):
            pass
    assert profile.sums
    assert shapes == [(m, 128, 64, 128, kind == "none", torch.bfloat16) for m in (10, 968) for _ in range(3)]
    assert len(weights) == 3
    assert torch.equal(torch.get_rng_state(), before)  # a policy's noise does not depend on what was measured


def test_the_times_depend_on_what_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(driver, "version", lambda: (13, 0))
    found = choice.environment(CUDA)
    assert len(found.pop("kernels")) == 16
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    assert found == {"gpu": "NVIDIA H200", "driver": "CUDA 13.0"} | versions


@pytest.mark.parametrize("name", ["a.py", "a.cu", "a.cuh", "tiles.json", "bitblas/a.py"])
def test_times_are_of_the_kernels_as_they_were(name: str, tmp_path: pathlib.Path) -> None:
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    source.write_text("1")
    before = choice._digest(tmp_path)
    (tmp_path / "a.pyc").write_text("compiled")
    choice._digest.cache_clear()
    assert choice._digest(tmp_path) == before
    source.write_text("2")
    choice._digest.cache_clear()
    assert choice._digest(tmp_path) != before
