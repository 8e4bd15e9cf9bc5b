"""bench-convert measures the conversion of the preset it names, and leaves figures only."""

from collections.abc import Callable
import json
import pathlib
import sys

import pytest
from safetensors.torch import load_file

from openpi_duquant.commands import main


def run(*arguments: str | pathlib.Path) -> None:
    """Runs bench-convert."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["openpi-duquant", "bench-convert", *map(str, arguments)])
        main()


def test_a_row_says_what_the_conversion_made_and_took(
    source: pathlib.Path, converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    run(source, "--output", tmp_path / "out", "--presets", "optimized")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"conversion.json", "conversion.md"}
    results = json.loads((tmp_path / "out" / "conversion.json").read_text())
    (row,) = results["presets"]
    assert (row["preset"], row["layers"]) == ("optimized", 14)
    assert row["bytes"] == sum(t.nbytes for t in load_file(converted("optimized") / "model.safetensors").values())
    original = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    assert results["source_bytes"] == row["source_bytes"] == original
    assert 0 < row["seconds"] < 60
    assert row["peak_anonymous_bytes"] > 2**25  # Python with torch
    page = (tmp_path / "out" / "conversion.md").read_text()
    assert f"{row['bytes'] / original:.3f}" in page
    assert results["stamp"]["date"] in page


def test_a_preset_that_is_not_there_is_refused_before_anything_runs(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(SystemExit, match=r"^error: unknown preset 'best'"):
        run(source, "--output", tmp_path / "out", "--presets", "simple", "best")
    assert not list(tmp_path.iterdir())


def test_without_presets_nothing_runs(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: "):
        run(source, "--output", tmp_path / "out", "--presets")


def test_a_conversion_that_fails_fails_the_measurement_and_leaves_nothing(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^error: converting with simple failed"):
        run(tmp_path / "gone", "--output", tmp_path / "out", "--presets", "simple")
    assert "gone: no such folder" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())
