"""doctor: what it says runs, and what it says would mend what does not."""

from collections.abc import Callable
import importlib.metadata
import platform
import re
import sys

import pytest
import torch

from openpi_duquant import kernels
from openpi_duquant.commands import main


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[object, str]]:
    """Runs doctor; returns its exit status and its report."""

    def run() -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["openpi-duquant", "doctor"])
        status: object = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().out

    return run


def test_versions_and_every_backend_are_shown(
    doctor: Callable[[], tuple[object, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, report = doctor()
    assert status == 0
    for version in (torch.__version__, platform.python_version(), importlib.metadata.version("numpy")):
        assert version in report
    for backend in kernels.BACKENDS:
        assert f"backend {backend} " in report
    assert re.search(r"^backend auto +takes reference$", report, re.MULTILINE)
    assert re.search(r"^backend bitblas +cannot run: it needs a CUDA device, not cpu", report, re.MULTILINE)
    assert "broken" not in report


@pytest.mark.parametrize(
    ("refusing", "taken"),
    [
        ((), "the fastest of triton, bitblas, layer by layer"),
        (("triton",), "bitblas"),
        (("bitblas",), "triton"),
        (("triton", "bitblas"), "reference"),
    ],
)
def test_on_a_gpu_auto_is_the_fastest_that_runs(
    doctor: Callable[[], tuple[object, str]], monkeypatch: pytest.MonkeyPatch, refusing: tuple[str, ...], taken: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("triton", "bitblas"):
        answer = name not in refusing, ["no"]
        backend = kernels.Backend(lambda *_: None, can_run=lambda *_, answer=answer: answer)
        monkeypatch.setitem(kernels.BACKENDS, name, backend)
    assert re.search(rf"^backend auto +takes {taken}$", doctor()[1], re.MULTILINE)


@pytest.mark.parametrize("version", ["2.6.1", "2.7.0", "2.14.0", "3.0.0+cpu"])
def test_a_torch_that_does_not_fit_is_broken_with_status_1(
    doctor: Callable[[], tuple[object, str]], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    status, report = doctor()
    assert status == 1
    assert re.search(rf"^torch +broken: {re.escape(version)} .*\n +-> pip install", report, re.MULTILINE)


@pytest.mark.parametrize("version", ["2.7.1", "2.7.1+cu126", "2.13.0", "2.9.0a0+git1234"])
def test_a_torch_that_fits_is_fine(
    doctor: Callable[[], tuple[object, str]], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    status, report = doctor()
    assert status == 0
    assert re.search(rf"^torch +{re.escape(version)}$", report, re.MULTILINE)
