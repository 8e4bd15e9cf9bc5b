"""A random checkpoint of a few hundred kilobytes, and what conversions make of it; nothing here may be written to."""

from collections.abc import Callable, Iterator
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # noqa: TID251  matrices this small lose time on several; so in subprocesses

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # noqa: TID251  read when a kernel is defined

from openpi_duquant import PRESETS
from openpi_duquant import convert
from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.environment import ENVIRONMENT_PREFIX


def pytest_configure() -> None:
    """Lets tests be interrupted, and the processes they start, in the background of a shell too, which ignores that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of Triton kernels where Triton is not installed; what its older interpreters warn of is theirs."""
    missing = importlib.util.find_spec("triton") is None
    for item in items:
        if item.get_closest_marker("triton"):
            item.add_marker(pytest.mark.skipif(missing, reason="Triton is not installed"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))


@pytest.fixture(autouse=True)
def no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every variable of ours out of the environment, of subprocesses too."""
    for name in list(os.environ):  # noqa: TID251
        if name.startswith(ENVIRONMENT_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny() -> Architecture:
    """A pi0.5 of two layers; all widths differ, and 192 and 320 are no powers of two."""
    return Architecture(
        vision=TransformerSize(72, 1, 48, 1, 72),
        language=TransformerSize(128, 2, 320, 6, 32),
        expert=TransformerSize(64, 2, 256, 6, 32),
        vocab_size=64,
        action_dim=32,
    )


@pytest.fixture(scope="session")
def checkpoints(tiny: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A folder with `bfloat16` and `float32`, pi0.5, of the same seed; and `pi0`, in bf16."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for dtype in (torch.bfloat16, torch.float32):
        synthetic.make_checkpoint(folder / str(dtype).removeprefix("torch."), tiny, seed=3, dtype=dtype)
    synthetic.make_checkpoint(folder / "pi0", dataclasses.replace(tiny, pi05=False), seed=4)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def source(checkpoints: pathlib.Path) -> pathlib.Path:
    """The pi0.5 checkpoint in bf16."""
    return checkpoints / "bfloat16"


@pytest.fixture(scope="session")
def converted(
    source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], pathlib.Path]]:
    """The folder that a preset makes of `source`."""
    folder = tmp_path_factory.mktemp("converted")

    def conversion(preset: str) -> pathlib.Path:
        if not (folder / preset).exists():
            convert(source, folder / preset, PRESETS[preset])
        return folder / preset

    yield conversion
    shutil.rmtree(folder)


@pytest.fixture
def own_source(source: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of `source` that a test may damage, alone in the test's folder."""
    return shutil.copytree(source, tmp_path / "own")
