"""An original checkpoint given to a quantized config: converted once, kept, found again, and never mixed up."""

from collections.abc import Callable
import importlib.metadata
import logging
import pathlib
import shutil
import types
from typing import Any

import pytest

from openpi_duquant import Manifest
from openpi_duquant import synthetic
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.recording import Example
from openpi_duquant.recording import save_recording

pytestmark = pytest.mark.openpi
Stock = Callable[..., Any]
NAME = "pi05_libero_duquant"


@pytest.fixture
def packdir(variables: Callable[..., None], tmp_path: pathlib.Path) -> pathlib.Path:
    """The folder that OPENPI_DUQUANT_PACKDIR names."""
    variables(PACKDIR=tmp_path / "packs")
    return tmp_path / "packs"


@pytest.fixture
def conversions(plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The targets of all conversions that are begun."""
    module = plugin.loading.converted_folder.__globals__
    begun = []
    real = module["convert"]

    def convert(source: pathlib.Path, target: pathlib.Path, *arguments: Any, **keywords: Any) -> Manifest:
        begun.append(target)
        return real(source, target, *arguments, **keywords)

    monkeypatch.setitem(module, "convert", convert)
    return begun


def test_a_second_load_converts_nothing(
    stock: Stock, hosts: Any, packdir: pathlib.Path, conversions: list[pathlib.Path], caplog: pytest.LogCaptureFixture
) -> None:
    first = stock(NAME, hosts.original / "pi05", backend="reference")
    (said,) = [record for record in caplog.records if "is not converted" in record.message]
    assert said.levelno == logging.WARNING
    assert str(conversions[0]) in said.message
    second = stock(NAME, hosts.original / "pi05", runtime="module")
    assert list(packdir.iterdir()) == conversions
    assert conversions[0].name.startswith("pi05-")
    assert first.metadata["duquant"]["sha256"] == second.metadata["duquant"]["sha256"]
    assert first.metadata["duquant"]["source_sha256"] == Manifest.load(hosts.converted / "pi05").source["sha256"]


def test_another_config_source_or_version_is_converted_anew(
    stock: Stock,
    hosts: Any,
    packdir: pathlib.Path,
    conversions: list[pathlib.Path],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = shutil.copytree(hosts.original / "pi05", tmp_path / "source" / "pi05")
    stock(NAME, source, backend="reference")
    stock(NAME, source, duquant=DuQuantConfig(rotation_block=32))
    assert [Manifest.load(folder).config.rotation_block for folder in conversions] == [64, 32]
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)  # the low byte of the last bf16 value
        low = file.read(1)[0]
        file.seek(-2, 2)
        file.write(bytes([low ^ 1]))
    stock(NAME, source, duquant=DuQuantConfig(rotation_block=32))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    stock(NAME, source, duquant=DuQuantConfig(rotation_block=32))
    assert len(set(conversions)) == 4
    assert len(list(packdir.iterdir())) == 4


def test_the_same_bytes_elsewhere_are_the_same_source(
    stock: Stock, hosts: Any, packdir: pathlib.Path, conversions: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    source = shutil.copytree(hosts.original / "pi05", tmp_path / "elsewhere" / "pi05")
    for folder in (hosts.original / "pi05", source):
        stock(NAME, folder, backend="reference")
    assert list(packdir.iterdir()) == conversions


def test_without_packdir_conversions_live_in_the_users_cache(
    stock: Stock, hosts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    stock(NAME, hosts.original / "pi05", backend="reference")
    (folder,) = (tmp_path / ".cache" / "openpi-duquant").iterdir()
    assert (folder / "duquant.json").is_file()
    assert (folder / "assets" / "droid" / "norm_stats.json").is_file()


@pytest.mark.parametrize("made_by_another", [True, False])
def test_a_conversion_that_another_process_finished_first_is_taken(
    plugin: types.ModuleType,
    stock: Stock,
    hosts: Any,
    packdir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    made_by_another: bool,
) -> None:
    def convert(_: pathlib.Path, target: pathlib.Path, *__: Any, **___: Any) -> None:
        if made_by_another:
            shutil.copytree(hosts.converted / "pi05", target)
        raise DuQuantError("was made by something else meanwhile")

    monkeypatch.setitem(plugin.loading.converted_folder.__globals__, "convert", convert)
    if made_by_another:
        assert stock(NAME, hosts.original / "pi05", backend="reference").metadata["duquant"]["layers"] == 42
        assert len(list(packdir.iterdir())) == 1
    else:
        with pytest.raises(DuQuantError, match="made by something else"):
            stock(NAME, hosts.original / "pi05", backend="reference")


def test_a_conversion_damaged_since_is_refused(
    stock: Stock, hosts: Any, packdir: pathlib.Path, conversions: list[pathlib.Path]
) -> None:
    stock(NAME, hosts.original / "pi05", backend="reference")
    with (conversions[0] / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert packdir in conversions[0].parents
    with pytest.raises(DuQuantError, match="sha256 differs"):
        stock(NAME, hosts.original / "pi05", backend="reference")


def test_a_recording_calibrates_it_and_is_part_of_its_key(
    stock: Stock,
    hosts: Any,
    packdir: pathlib.Path,
    variables: Callable[..., None],
    conversions: list[pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    stock(NAME, hosts.original / "pi05", backend="reference")
    architecture = Manifest.load(conversions[0]).architecture
    for seed in (0, 1):
        example = Example(*synthetic.libero_like_observation(architecture, seed=seed, action_horizon=10))
        save_recording(tmp_path / str(seed), [example, example], {"num_steps": 2})
        variables(PACKDIR=packdir, CALIBRATION=tmp_path / str(seed))
        stock(NAME, hosts.original / "pi05", backend="reference")
    calibrations = [Manifest.load(folder).calibration for folder in conversions]
    assert [found and found["count"] for found in calibrations] == [None, 2, 2]
    assert len(set(conversions)) == 3
