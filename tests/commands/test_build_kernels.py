"""build-kernels: which operators a checkpoint needs, for which GPU."""

from collections.abc import Callable
import pathlib
import sys

import pytest

from openpi_duquant.commands import main
from openpi_duquant.kernels.bitblas import build
from openpi_duquant.kernels.bitblas.operators import Operator


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[Operator], str]]:
    """What the command asks to be built; nothing is."""
    asked: list[tuple[set[Operator], str]] = []

    def stand_in(operators: list[Operator], architecture: str) -> pathlib.Path:
        asked.append((set(operators), architecture))
        return pathlib.Path("the-cache")

    monkeypatch.setattr(build, "build", stand_in)
    return asked


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["openpi-duquant", "build-kernels", *arguments])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_every_width_of_the_checkpoint_is_built(
    converted: Callable[[str], pathlib.Path],
    built: list[tuple[set[Operator], str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, str(converted("default")), "--arch", "sm_89") == 0
    ((operators, architecture),) = built
    assert architecture == "sm_89"
    language, expert = 128, 64  # the widths of the tiny checkpoint; 192 are 6 heads of 32
    attention = {(192, w) for w in (language, expert)} | {(32, w) for w in (language, expert)}
    output = {(language, 192), (expert, 192)}
    gated = {(320, language), (256, expert), (language, 320), (expert, 256)}
    merged = {(256, language), (256, expert), (64, language), (640, language), (512, expert)}  # the engine's
    assert {(operator.n, operator.k) for operator in operators} == attention | output | gated | merged
    assert {operator.kind for operator in operators} == {"w4a8"}
    assert f"{len(operators)} kernels for sm_89 in the-cache" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["sm_75", "90", "hopper"])
def test_an_architecture_that_cannot_be_is_refused(
    arch: str, converted: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = run(monkeypatch, str(converted("default")), "--arch", arch)
    assert status == f"error: arch: {arch!r} is not sm_80 or later, as sm_90"


def test_without_a_gpu_an_architecture_must_be_named(
    converted: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "name one, as --arch sm_90" in run(monkeypatch, str(converted("default")))


def test_no_checkpoint_is_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(run(monkeypatch, str(tmp_path), "--arch", "sm_90")).startswith("error: ")
