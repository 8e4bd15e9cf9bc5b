"""What inspect-checkpoint shows, against the files and against errors computed by hand."""

from collections.abc import Callable
import json
import math
import pathlib
import shutil
import sys
from typing import Any

from by_hand import EXPERT
from by_hand import GROUPS
from by_hand import LANGUAGE
from by_hand import arrays
from by_hand import decoded
from by_hand import folded
from by_hand import transformed
import numpy as np
import pytest
from safetensors.torch import load_file

from openpi_duquant import PRESETS
from openpi_duquant.commands import main


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs inspect-checkpoint; returns what it prints."""

    def run(*arguments: str | pathlib.Path) -> str:
        monkeypatch.setattr(sys, "argv", ["openpi-duquant", "inspect-checkpoint", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def inspected(
    inspect: Callable[..., str], folder: pathlib.Path, source: pathlib.Path, tmp_path: pathlib.Path
) -> dict[str, Any]:
    """The figures that inspect-checkpoint writes; the page is what it prints."""
    shown = inspect(folder, "--source", source, "--output", tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out" / "inspection.md").read_text() == shown
    return json.loads((tmp_path / "new" / "out" / "inspection.json").read_text())


@pytest.mark.parametrize("preset", ["simple", "default", "optimized"])
def test_weight_errors_are_those_of_the_stored_codes(
    inspect: Callable[..., str],
    converted: Callable[[str], pathlib.Path],
    source: pathlib.Path,
    tmp_path: pathlib.Path,
    preset: str,
) -> None:
    figures = inspected(inspect, converted(preset), source, tmp_path)
    config, tensors, originals = PRESETS[preset], arrays(converted(preset)), arrays(source)
    errors = {}
    for prefix in (f"{model}layers.{index}." for model in (LANGUAGE, EXPERT) for index in (0, 1)):
        for members in (*GROUPS, ("self_attn.o_proj",), ("mlp.down_proj",)) if prefix.startswith(config.scope) else ():
            layers = [prefix + member for member in members]
            exact = transformed(tensors, folded(originals, config, int(prefix[-2])), layers, config)
            for layer, weight in exact.items():
                codes, scale = decoded(tensors, layer)
                errors[layer] = np.linalg.norm(codes * scale - weight) / np.linalg.norm(weight)
    shown = {name: layer["weight_error"] for name, layer in figures["layers"].items()}
    assert shown == pytest.approx(errors, rel=1e-3)


@pytest.mark.parametrize("preset", ["simple", "default", "optimized"])
def test_bytes_and_layers_add_up_to_the_file(
    inspect: Callable[..., str],
    converted: Callable[[str], pathlib.Path],
    source: pathlib.Path,
    tmp_path: pathlib.Path,
    preset: str,
) -> None:
    figures = inspected(inspect, converted(preset), source, tmp_path)
    tensors = load_file(converted(preset) / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    quantized = {name: size for name, size in sizes.items() if not name.endswith((".weight", ".bias"))}
    assert sum(component["bytes"] for component in figures["components"].values()) == sum(sizes.values())
    assert sum(component["quantized_bytes"] for component in figures["components"].values()) == sum(quantized.values())
    assert sum(layer["bytes"] for layer in figures["layers"].values()) == sum(quantized.values())
    expert = sum(size for name, size in sizes.items() if name.startswith(EXPERT))
    assert figures["components"]["action expert"]["bytes"] == expert
    for name, layer in figures["layers"].items():
        assert math.prod(layer["shape"]) == 2 * tensors[name + ".weight_packed"].numel()
        assert ("permute" in layer["run_time"]) == (preset != "simple" and not name.endswith(("o_proj", "down_proj")))
        value_head = preset != "simple" and name.endswith(("v_proj", "o_proj"))
        assert ("value_head" in layer["folded"]) == value_head, name


def test_without_its_source_no_error_is_shown(
    inspect: Callable[..., str], converted: Callable[[str], pathlib.Path]
) -> None:
    shown = inspect(converted("simple"))
    assert sum(line.startswith(f"| {EXPERT}") for line in shown.splitlines()) == 14
    assert "error" not in shown


def test_what_is_damaged_unconverted_or_of_another_source_is_refused(
    inspect: Callable[..., str],
    converted: Callable[[str], pathlib.Path],
    checkpoints: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*float32: is not the checkpoint"):
        inspect(converted("simple"), "--source", checkpoints / "float32")
    with pytest.raises(SystemExit, match=r"^error: .*duquant\.json"):
        inspect(checkpoints / "float32")
    damaged = shutil.copytree(converted("simple"), tmp_path / "damaged")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    with pytest.raises(SystemExit, match=r"^error: .*sha256"):
        inspect(damaged)
