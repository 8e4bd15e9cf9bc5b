"""The choice of a backend: by name or not at all; `auto` moves on, and says so once."""

import dataclasses
import logging

import pytest
import torch

from openpi_duquant import kernels
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import Backend
from openpi_duquant.kernels import Problem

CPU = torch.device("cpu")
PROBLEM = Problem(64, 128, 4, 8, 1, "none", 0, torch.bfloat16)


def unusable(*reasons: str) -> Backend:
    return Backend(lambda *_: None, can_run=lambda *_: (False, list(reasons)))


def broken(message: str) -> Backend:
    def load(*_: object) -> None:
        raise DuQuantError(message)

    return Backend(lambda *_: None, load=load)


@pytest.fixture(autouse=True)
def no_choice_logged_yet() -> None:
    kernels._log_choice.cache_clear()


@pytest.mark.parametrize("name", ["reference", "fake"])
def test_a_named_backend_is_itself(name: str) -> None:
    assert kernels.resolve(name, PROBLEM, CPU) == name


@pytest.mark.parametrize("check", [kernels.check_name, lambda name: kernels.resolve(name, PROBLEM, CPU)])
def test_an_unknown_backend_lists_those_there_are(check: object) -> None:
    with pytest.raises(DuQuantError, match=r"'cutlass'.*auto.*bitblas.*reference.*fake"):
        check("cutlass")


def test_a_named_backend_that_cannot_run_stops_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", unusable("no hands", "no feet"))
    with pytest.raises(DuQuantError, match=r"bitblas cannot run: no hands; no feet \(W4A8 64x128 on cpu\)"):
        kernels.resolve("bitblas", PROBLEM, CPU)


def test_a_named_backend_that_fails_its_test_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", broken("3 of 7 sums are wrong"))
    with pytest.raises(DuQuantError, match="3 of 7 sums are wrong"):
        kernels.resolve("bitblas", PROBLEM, CPU)


@pytest.mark.parametrize("first", [unusable("no hands"), broken("no hands")], ids=["cannot run", "fails its test"])
def test_auto_moves_on_and_says_why_once(
    first: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", first)
    monkeypatch.setattr(kernels, "AUTO", ("bitblas", "reference"))
    with caplog.at_level(logging.INFO, "openpi_duquant.kernels"):
        for width in range(64, 6400, 64):
            assert kernels.resolve("auto", dataclasses.replace(PROBLEM, in_features=width), CPU) == "reference"
    (message,) = caplog.messages
    assert message == "backend auto: W4A8 on cpu runs on reference; bitblas cannot run: no hands"


def test_auto_takes_the_first_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", Backend(lambda *_: None))
    assert kernels.resolve("auto", PROBLEM, CPU) == "bitblas"


def test_what_can_run_is_loaded_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    backend = Backend(
        lambda *_: None,
        can_run=lambda problem, _: (problem.weight_bits == 4, []),
        load=lambda problems, _: loaded.append(set(problems)),
    )
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", backend)
    wide = dataclasses.replace(PROBLEM, in_features=256)
    kernels.load("auto", [PROBLEM, wide, PROBLEM, dataclasses.replace(PROBLEM, weight_bits=8)], CPU)
    assert loaded == [{PROBLEM, wide}]
