"""accuracy-report, run as the command line runs it."""

from collections.abc import Callable
import dataclasses
import html.parser
import json
import pathlib
import re
import shutil
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch

from openpi_duquant import PRESETS
from openpi_duquant import Manifest
from openpi_duquant import convert
from openpi_duquant import load_policy
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.commands import main
from openpi_duquant.recording import load_recording
from openpi_duquant.recording import save_recording

STEPS = 3
PAGES = {"report.html", "report.md", "report.json"}
PICTURES = {"actions.png", "steps.png", "layers.png"}


def run(command: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["openpi-duquant", command, *map(str, arguments)])
        main()


def report(
    original: pathlib.Path, *converted: pathlib.Path, recording: pathlib.Path, output: pathlib.Path, **options: object
) -> dict[str, Any]:
    given = {"steps": STEPS, "dtype": "float32", "method_groups": 0} | options
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    run("accuracy-report", original, *converted, "--observations", recording, "--output", output, *flags)
    return json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def recordings(checkpoints: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Four synthetic observations for pi0.5 and pi0."""
    folder = tmp_path_factory.mktemp("recordings")
    for name in ("bfloat16", "pi0"):
        run("record-observations", "synthetic", folder / name, "--checkpoint", checkpoints / name, "--limit", 4)
    return {name: folder / name for name in ("bfloat16", "pi0")}


@pytest.fixture(scope="module")
def whole(
    source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    recordings: dict[str, pathlib.Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """A report with everything, of two checkpoints: its folder and its figures."""
    output = tmp_path_factory.mktemp("report")
    both = converted("default"), converted("simple")
    return output, report(source, *both, recording=recordings["bfloat16"], output=output, method_groups=3)


def test_actions_and_steps_are_those_of_the_policies(
    whole: tuple[pathlib.Path, dict[str, Any]],
    source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    recordings: dict[str, pathlib.Path],
) -> None:
    _, results = whole
    assert (results["calibrated_on"], results["judged_by"]) == (2, 2)
    actions = {}
    for folder in (source, converted("default"), converted("simple")):
        policy = load_policy(folder, dtype=torch.float32, optimize=False)
        held_out = load_recording(recordings["bfloat16"]).examples[2:]
        actions[folder.name] = torch.cat(
            [policy.sample_actions(x.observation, x.noise, num_steps=STEPS) for x in held_out]
        ).double()
    stats = json.loads(next(source.glob("assets/**/norm_stats.json")).read_text())["norm_stats"]["actions"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    in_units = {n: (a[..., : len(low)].numpy() + 1) / 2 * (high - low + 1e-6) + low for n, a in actions.items()}
    for row in results["checkpoints"]:
        error = in_units[row["checkpoint"]] - in_units[source.name]
        relative = np.linalg.norm(error) / np.linalg.norm(in_units[source.name])
        assert row["actions"]["relative_l2"] == pytest.approx(relative, rel=1e-4)
        assert row["actions"]["rms_error"] == pytest.approx(np.sqrt((error**2).mean((0, 1))), rel=1e-3)
        assert np.allclose(row["trace"], in_units[row["checkpoint"]][0], atol=1e-5)
        expected = (actions[row["checkpoint"]] - actions[source.name]).norm() / actions[source.name].norm()
        assert row["steps"]["x"][-1] == pytest.approx(expected.item(), rel=1e-4)
        assert len(row["steps"]["velocity"]) == len(row["steps"]["expert_layers"]) == STEPS
    assert np.allclose(results["trace"], in_units[source.name][0], atol=1e-5)


def test_every_quantized_layer_that_runs_is_judged(whole: tuple[pathlib.Path, dict[str, Any]]) -> None:
    _, results = whole
    default, simple = results["checkpoints"]
    assert (len(default["layers"]), len(simple["layers"])) == (23, 14)
    assert sum(part["layers"] for part in default["components"]) == 23
    for row in (default, simple):
        assert row["mean_layer_error"] == pytest.approx(np.mean([v["error"] for v in row["layers"].values()]))
        for name, values in row["layers"].items():
            steps = STEPS if "gemma_expert" in name else 1
            assert len(values["by_step"]) == steps
            assert 0 < values["activation_error"] < values["error"] < 0.3
            assert values["sqnr_db"] == pytest.approx(-20 * np.log10(values["error"]))
        worst = [layer["error"] for layer in row["worst_layers"]]
        assert worst == sorted((v["error"] for v in row["layers"].values()), reverse=True)[:10]
    assert default["median_activations_over_ideal"] == pytest.approx(
        np.median([v["activation_error"] / v["ideal_error"] for v in default["layers"].values()])
    )


def test_all_methods_are_in_one_table(whole: tuple[pathlib.Path, dict[str, Any]]) -> None:
    _, results = whole
    errors = {row["method"]: row["error"] for row in results["methods"]}
    assert {
        "rtn", "simple", "hadamard", "quarot-style", "duquant, as released", "textbook gptq", "default, calibrated",
        "default, not calibrated", "checkpoint default, W4A8", "checkpoint simple, W4A8",
    } == set(errors)  # fmt: skip
    assert max(errors, key=errors.__getitem__) in ("rtn", "checkpoint simple, W4A8")
    assert errors["default, calibrated"] < errors["default, not calibrated"] < errors["rtn"]
    assert 0 < len(results["method_layers"]) < 10


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, its headings and its rows; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_holds_everything_within_itself(whole: tuple[pathlib.Path, dict[str, Any]]) -> None:
    folder, results = whole
    assert {path.name for path in folder.iterdir()} == PAGES | PICTURES
    page, text = Page(), (folder / "report.md").read_text()
    page.feed((folder / "report.html").read_text())
    assert not page.open
    assert len(page.references) == 3
    assert all(reference.startswith("data:image/png;base64,iVBOR") for reference in page.references)
    assert page.headings == re.findall("^## (.*)$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert page.rows == sum(not line.startswith("| -") for line in lines) > 50
    for name in PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert "synthetic" in text
    assert results["stamp"]["date"] in text
    assert f"{results['checkpoints'][0]['actions']['relative_l2']:.4f}" in text


def test_a_checkpoint_against_itself_has_no_error(
    source: pathlib.Path, recordings: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    results = report(source, source, recording=recordings["bfloat16"], output=tmp_path, fail_above=0)
    (row,) = results["checkpoints"]
    assert row["actions"]["relative_l2"] == 0
    assert row["steps"] == {"velocity": [0] * STEPS, "x": [0] * STEPS, "expert_layers": []}
    assert row["layers"] == {}
    assert {path.name for path in tmp_path.iterdir()} == PAGES | PICTURES - {"layers.png"}


@pytest.mark.parametrize("name", ["pi0", "bfloat16"])
def test_a_damaged_layer_is_named_as_the_worst(
    name: str, checkpoints: pathlib.Path, recordings: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    convert(checkpoints / name, tmp_path / "converted", dataclasses.replace(PRESETS["default"], weight_bits=8))
    layer = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj"
    path = tmp_path / "converted" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{layer}.weight_scale"] *= 1.5
    save_file(tensors, path)
    with SafetensorsReader(path.parent) as reader:
        digest = reader.digest()
    dataclasses.replace(Manifest.load(path.parent), sha256=digest).save(path.parent)
    results = report(checkpoints / name, path.parent, recording=recordings[name], output=tmp_path / "out")
    (row,) = results["checkpoints"]
    first, second, *_ = row["worst_layers"]
    assert (first["layer"], first["suggestion"]) == (layer, "leave it out")
    assert first["error"] == pytest.approx(0.5, rel=0.01)
    assert second["error"] < 0.02
    assert row["layers"][layer]["activation_error"] < 0.02
    (worst,) = (part for part in row["components"] if part["error"] > 0.1)
    assert (worst["part"], worst["projection"], worst["worst_layer"]) == ("expert", "up", layer)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| {layer} " in text  # as --layer-bits takes it
    assert layer.replace("paligemma_with_expert.", "").replace(".model.", ".") in text


def test_it_fails_above_what_is_allowed_and_leaves_the_report(
    source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    recordings: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    given = {"recording": recordings["bfloat16"], "output": tmp_path, "limit": 1}
    with pytest.raises(SystemExit, match=r"^error: default: relative L2 error of the actions \S+ is above .* 0\.0001$"):
        report(source, converted("default"), **given, fail_above=1e-4)
    assert (tmp_path / "report.html").exists()
    assert report(source, converted("default"), **given, fail_above=0.9)["judged_by"] == 1


def test_a_checkpoint_with_some_layers_of_8_bits_says_so(
    source: pathlib.Path, recordings: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    layer = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj"
    config = dataclasses.replace(PRESETS["simple"], layer_bits={layer: 8}, activation_bits=16)
    convert(source, tmp_path / "converted", config)
    given = {"recording": recordings["bfloat16"], "output": tmp_path / "out", "method_groups": 14}
    results = report(source, tmp_path / "converted", **given)
    assert results["checkpoints"][0]["bits"] == "W4/8A16"
    assert "checkpoint converted, W4/8A16" in {row["method"] for row in results["methods"]}
    assert "| W4/8A16 |" in (tmp_path / "out" / "report.md").read_text()


def test_observations_of_the_calibration_are_pointed_out(
    source: pathlib.Path, recordings: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    recording = load_recording(recordings["bfloat16"])
    convert(source, tmp_path / "converted", PRESETS["default"], calibration=recording)
    results = report(source, tmp_path / "converted", recording=recordings["bfloat16"], output=tmp_path / "out")
    assert results["checkpoints"][0]["judged_by_its_calibration_data"]
    assert "they are not held out" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("converted_to", "options", "message"),
    [
        ("other", {}, r"was not converted from .*pi0, whose bytes are others"),
        ("float", {}, r"bfloat16: has other sizes than|not a pi0"),
        ("none", {}, r"name at least one|converted"),
        ("default", {"limit": 0}, r"limit: 0 is less than 1"),
        ("default", {"method_groups": -1}, r"method_groups: -1 is less than 0"),
        ("default", {"method_rows": 0}, r"method_rows: 0 is less than 1"),
        ("default", {"calibration": 4}, r"4 observations, 4 of them to calibrate on"),
        ("default", {"asset": "x"}, r"has no norm stats of 'x'"),
        ("default", {"observations": "missing"}, r"observations\.json: is not there"),
        ("default", {"steps": 0}, r"steps: 0 is less than 1"),
    ],
)
def test_mistakes_are_one_line(
    converted_to: str,
    options: dict[str, object],
    message: str,
    checkpoints: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    recordings: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    original = checkpoints / ("pi0" if converted_to in ("other", "float") else "bfloat16")
    folders = {"other": [converted("default")], "float": [checkpoints / "bfloat16"], "none": []}
    given = folders.get(converted_to, [converted("default")])
    with pytest.raises(SystemExit, match=rf"^(error: .*({message})[^\n]*|2)$"):
        report(original, *given, recording=recordings[original.name], output=tmp_path, **options)


@pytest.mark.parametrize("fault", ["token", "nan"])
def test_observations_that_the_original_cannot_use_are_refused(
    fault: str, source: pathlib.Path, converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path,
    recordings: dict[str, pathlib.Path],
) -> None:  # fmt: skip
    examples = load_recording(recordings["bfloat16"]).examples
    if fault == "token":
        examples[3].observation.tokenized_prompt[0, 0] = 257_000
    else:
        examples[3].noise[0, 0, 0] = torch.nan
    save_recording(tmp_path / "own", examples, {})
    message = {"token": "observation 3: has token 257000", "nan": "bfloat16: NaN or Inf on observation 3"}[fault]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        report(source, converted("simple"), recording=tmp_path / "own", output=tmp_path / "out")


def test_folders_of_one_name_are_told_apart(
    source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    recordings: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    copy = shutil.copytree(converted("simple"), tmp_path / "again" / "simple")
    results = report(
        source, converted("simple"), copy, recording=recordings["bfloat16"], output=tmp_path / "out", limit=1
    )
    first, second = results["checkpoints"]
    assert [first["checkpoint"], second["checkpoint"]] == [f"{converted('simple').parent.name}/simple", "again/simple"]
    assert first["actions"] == second["actions"]
    with pytest.raises(SystemExit, match="given twice"):
        report(source, copy, copy, recording=recordings["bfloat16"], output=tmp_path / "out", limit=1)
