"""The commands, run as the command line runs them."""

from collections.abc import Callable
import dataclasses
import importlib.metadata
import inspect
import json
import math
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import openpi_duquant
from openpi_duquant import PRESETS
from openpi_duquant import DuQuantConfig
from openpi_duquant import Manifest
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.commands import COMMANDS
from openpi_duquant.commands import main
from openpi_duquant.recording import Example
from openpi_duquant.recording import save_recording

TOOLS = sorted((pathlib.Path(openpi_duquant.__file__).parents[1] / "tools").glob("*.py"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs openpi-duquant with these arguments; returns what it prints."""

    def run(*arguments: str | pathlib.Path) -> str:
        monkeypatch.setattr(sys, "argv", ["openpi-duquant", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def data_bytes(folder: pathlib.Path) -> int:
    """Bytes of a safetensors file but for its header."""
    content = (folder / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def options_of(name: str) -> set[str]:
    """The options that a command must have: its parameters, those of the configuration where it takes one."""
    parameters = inspect.signature(COMMANDS[name]).parameters.values()
    configs = {p.name for p in parameters if "DuQuantConfig" in str(p.annotation)}
    names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - configs
    if configs:
        names |= {field.name for field in dataclasses.fields(DuQuantConfig)}
    return {"--" + name.replace("_", "-") for name in names}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(
    command: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match=r"^0$"):
        command(name, "--help")
    shown = capsys.readouterr().out
    assert (COMMANDS[name].__doc__ or "").split(".")[0].split(":")[0] in re.sub(r"[\s│]+", " ", shown)
    for option in options_of(name):
        assert re.search(rf"{option}\b", shown), option


def test_every_command_is_a_tool_too() -> None:
    assert {path.stem.replace("_", "-") for path in TOOLS} == set(COMMANDS)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_runs_its_command(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(path), run_name="__main__")
    summary = (COMMANDS[path.stem.replace("_", "-")].__doc__ or "").split()[:4]
    assert " ".join(summary) in capsys.readouterr().out


def test_the_installed_command_is_this_one() -> None:
    (point,) = importlib.metadata.entry_points(group="console_scripts", name="openpi-duquant")
    assert point.load() is main


def test_the_process_ends_with_status_1_and_one_line_on_stderr(tmp_path: pathlib.Path) -> None:
    arguments = [sys.executable, "-m", "openpi_duquant", "convert-checkpoint", str(tmp_path / "gone")]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert re.fullmatch(r"error: .*gone: no such folder.*\n", finished.stderr)


@pytest.mark.parametrize("preset", ["default", "optimized"])
def test_a_dry_run_shows_every_layer_and_the_totals_and_writes_nothing(
    command: Callable[..., str],
    own_source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
    preset: str,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    shown = command("convert-checkpoint", own_source, "--preset", preset, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    manifest = Manifest.load(converted(preset))
    rows = {row.split("|")[1].strip(): row for row in shown.splitlines() if row.startswith("| paligemma")}
    assert rows.keys() == manifest.layers.keys()
    for name, spec in manifest.layers.items():
        assert f"{spec.out_features}x{spec.in_features}" in rows[name]
        assert "W4A8" in rows[name]
        folds = [fold["kind"] for fold in manifest.folds if f"{name}.weight" in fold["tensors"]]
        assert f"| {', '.join(folds) or '-'} " in rows[name]
    assert f"{len(rows)} layers quantized" in shown
    assert f"{data_bytes(own_source):,} bytes before, {data_bytes(converted(preset)):,} after" in shown


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, (), {}),
        ({"WBITS_DEFAULT": "8"}, (), {"weight_bits": 8}),
        ({"WBITS_DEFAULT": "8"}, ("--weight-bits", "4"), {"weight_bits": 4}),
        ({"PERMUTE": "0", "LS": "0.5"}, ("--permute",), {"permute": True, "smoothing": 0.5}),
        ({"ROW_ROT": "0", "BLOCK": "32"}, ("--rotation", "hadamard"), {"row_rotation": "0", "rotation": "hadamard"}),
        ({"DRYRUN": "0"}, ("--group-size", "64"), {"group_size": 64}),
    ],
)
def test_the_command_line_beats_variables_and_variables_the_preset(
    command: Callable[..., str],
    own_source: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    arguments: tuple[str, ...],
    expected: dict[str, object],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"OPENPI_DUQUANT_{name}", value)
    command("convert-checkpoint", own_source, "--preset", "optimized", *arguments)
    if "BLOCK" in environment:
        expected = expected | {"rotation_block": 32}
    config = Manifest.load(own_source.with_name("own-optimized")).config
    assert config == dataclasses.replace(PRESETS["optimized"], **expected)


def test_a_variable_asks_for_a_dry_run(
    command: Callable[..., str], own_source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENPI_DUQUANT_DRYRUN", "1")
    assert "28 layers quantized" in command("convert-checkpoint", own_source)
    assert list(tmp_path.iterdir()) == [own_source]
    assert "wrote" in command("convert-checkpoint", own_source, "--no-dry-run")


def test_the_result_goes_beside_the_source_or_where_it_is_told_to(
    command: Callable[..., str], own_source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> set[str]:
        return {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("duquant.json")}

    monkeypatch.chdir(own_source)
    assert f"wrote {tmp_path / 'own-simple'}" in command("convert-checkpoint", ".", "--preset", "simple")
    assert made() == {"own-simple"}
    command("convert-checkpoint", own_source, tmp_path / "told", "--preset", "simple")
    assert made() == {"own-simple", "told"}
    monkeypatch.setenv("OPENPI_DUQUANT_PACKDIR", str(tmp_path / "packed"))
    command("convert-checkpoint", own_source, "--preset", "simple")
    assert made() == {"own-simple", "told", "packed/own-simple"}
    command("convert-checkpoint", own_source, tmp_path / "again", "--preset", "simple")
    assert made() == {"own-simple", "told", "packed/own-simple", "again"}


def test_a_recording_is_what_weights_are_rounded_for(
    command: Callable[..., str],
    own_source: pathlib.Path,
    tiny: Architecture,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "rounded to nearest" in command("convert-checkpoint", own_source, tmp_path / "nearest")
    examples = [Example(*synthetic.libero_like_observation(tiny, seed=seed)) for seed in range(4)]
    save_recording(tmp_path / "seen", examples, {"num_steps": 2})
    arguments = "convert-checkpoint", own_source
    shown = command(*arguments, tmp_path / "a", "--calibration", tmp_path / "seen", "--keep-error-below", "0.04")
    manifest = Manifest.load(tmp_path / "a")
    errors, bits = manifest.calibration["errors"], [spec.weight_bits for spec in manifest.layers.values()]
    assert f"{sum(errors.values()) / len(errors):.4f} on average, {bits.count(8)} layers raised to 8 bits" in shown
    plain = Manifest.load(tmp_path / "nearest").counts["bytes"]
    assert f"8 bits, {manifest.counts['bytes'] - plain:,} bytes more" in shown
    head = "--calibration", tmp_path / "seen", "--layers", "action_in_proj"
    assert "say nothing of the inputs of these layers" in command(
        "convert-checkpoint", own_source, tmp_path / "head", *head
    )
    assert 0 < bits.count(8) < 28
    assert f"{manifest.counts['bytes']:,} after" in shown
    assert f"{max(errors.values()):.4f} |" in shown
    assert f"{max(errors.values()):.4f} |" in command("inspect-checkpoint", tmp_path / "a", "--source", own_source)
    monkeypatch.setenv("OPENPI_DUQUANT_CALIBRATION", str(tmp_path / "seen"))
    command(*arguments, tmp_path / "b")
    assert Manifest.load(tmp_path / "b").calibration["sha256"] == manifest.calibration["sha256"]
    with pytest.raises(SystemExit, match=r"^error: .*nowhere.*record-observations makes it"):
        command(*arguments, tmp_path / "c", "--calibration", tmp_path / "nowhere")


@pytest.mark.parametrize("model", ["pi05", "pi0"])
def test_a_checkpoint_that_was_made_converts_and_acts(
    command: Callable[..., str], tmp_path: pathlib.Path, model: str
) -> None:
    shown = command("make-checkpoint", tmp_path / "made", "--model", model, "--dtype", "float32", "--seed", "7")
    assert f"{data_bytes(tmp_path / 'made'):,} bytes" in shown
    command("convert-checkpoint", tmp_path / "made", tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["precision"] == "float32"
    policy = load_policy(tmp_path / "converted", optimize=False)
    assert policy.architecture.pi05 == (model == "pi05")
    actions = policy.sample_actions(*synthetic.libero_like_observation(policy.architecture), num_steps=1)
    assert math.isfinite(actions.sum())


@pytest.mark.parametrize("arguments", [("demo",), ("bench-convert", "made")])
def test_an_unknown_variable_stops_every_command_that_converts(
    command: Callable[..., str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENPI_DUQUANT_WBITZ", "4")
    with pytest.raises(SystemExit, match=r"^error: .*OPENPI_DUQUANT_WBITZ"):
        command(*arguments)
    assert not list(tmp_path.iterdir())
