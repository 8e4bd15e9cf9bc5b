"""The demo's figures, against the same figures computed here; and its pages say where weights are random."""

from collections.abc import Callable
import functools
import importlib
import json
import pathlib
import sys
from typing import Any

from by_hand import LANGUAGE
from by_hand import arrays
from by_hand import decoded
from by_hand import hadamard
import numpy as np
import pytest
from safetensors.torch import load_file
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import PRESETS
from openpi_duquant import Policy
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.commands import main

RANDOM = "The weights are random"
STEPS = 2


def run_demo(folder: pathlib.Path, *arguments: str | pathlib.Path) -> str:
    """Runs the demo into `folder/out`; returns its page."""
    with pytest.MonkeyPatch.context() as patch:
        options = ("--output", folder / "out", "--num-steps", STEPS, *arguments)
        patch.setattr(sys, "argv", ["openpi-duquant", "demo", *map(str, options)])
        main()
    return (folder / "out" / "comparison.md").read_text()


@pytest.fixture(scope="module")
def demo(source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str, dict[str, Any]]:
    """The folder that the demo writes for `source`, its page and its figures."""
    folder = tmp_path_factory.mktemp("demo")
    page = run_demo(folder, "--checkpoint", source, "--dtype", "float32")
    return folder / "out", page, json.loads((folder / "out" / "comparison.json").read_text())


def test_it_writes_a_page_figures_and_a_picture_and_leaves_nothing_else(demo: tuple[pathlib.Path, str, Any]) -> None:
    folder, _, _ = demo
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.md", "comparison.png"}
    picture = (folder / "comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert int.from_bytes(picture[16:20]) > 1000


def test_the_page_has_a_row_for_every_preset_and_backend(demo: tuple[pathlib.Path, str, dict[str, Any]]) -> None:
    _, page, results = demo
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in page.splitlines() if line.startswith("|")]
    for preset, layers in (("default", "28"), ("optimized", "14"), ("simple", "14")):
        for backend in ("fake", "reference"):
            assert (preset, backend, layers) in rows
    assert ("original", "float32", "0") in rows
    assert [row["preset"] for row in results["presets"]] == ["default", "optimized", "simple"]
    assert results["stamp"]["date"] in page


def actions(policy: Policy) -> Tensor:
    """What a policy does on the demo's observation."""
    observation, noise = synthetic.libero_like_observation(policy.architecture, seed=0)
    return policy.sample_actions(observation, noise, num_steps=STEPS).double()


@pytest.mark.parametrize("backend", ["fake", "reference"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_action_errors_and_bytes_are_right(
    demo: tuple[pathlib.Path, str, dict[str, Any]],
    source: pathlib.Path,
    converted: Callable[[str], pathlib.Path],
    place: int,
    backend: str,
) -> None:
    row = demo[2]["presets"][place]
    folder = converted(row["preset"])
    load = functools.partial(load_policy, dtype=torch.float32, optimize=False)
    exact = actions(load(source))
    difference = actions(load(folder, backend=backend)) - exact
    figures = row["backends"][backend]
    assert figures["action_error"] == pytest.approx(float(difference.norm() / exact.norm()), rel=1e-5)
    assert figures["largest_action_difference"] == pytest.approx(float(difference.abs().max()), rel=1e-5)
    assert figures["time_relative_to_original"] > 0
    assert row["bytes"] == sum(array.nbytes for array in raw(folder))
    assert demo[2]["original_bytes"] == sum(array.nbytes for array in raw(source))


def raw(folder: pathlib.Path) -> list[Tensor]:
    """The tensors of a checkpoint as they are stored."""
    return list(load_file(folder / "model.safetensors").values())


def test_layer_errors_are_those_on_the_originals_inputs(
    demo: tuple[pathlib.Path, str, dict[str, Any]], source: pathlib.Path, converted: Callable[[str], pathlib.Path]
) -> None:
    row = demo[2]["presets"][2]
    tensors = arrays(converted("simple"))
    squares = {name: np.zeros(2) for name in row["layer_errors"]}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        codes, scale = decoded(tensors, name)

        def compare(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].double().flatten(0, -2).numpy(), output.double().flatten(0, -2).numpy()
            step = abs(x).max(1, keepdims=True) / 127
            squares[name] += ((np.round(x / step) * step @ (codes * scale).T - y) ** 2).sum(), (y**2).sum()

        return compare

    policy = load_policy(source, dtype=torch.float32, optimize=False)
    for name in squares:
        policy.get_submodule(name).register_forward_hook(hook(name))
    actions(policy)
    errors = {name: float(np.sqrt(difference / norm)) for name, (difference, norm) in squares.items()}
    assert len(errors) == 14
    assert row["layer_errors"] == pytest.approx(errors, rel=2e-3)  # an fp32 tie may round the other way
    assert row["median_layer_error"] == pytest.approx(np.median(list(errors.values())), rel=2e-3)
    assert row["worst_layer"] == max(errors, key=errors.__getitem__)


def test_folds_are_taken_into_account(
    demo: tuple[pathlib.Path, str, dict[str, Any]], source: pathlib.Path, converted: Callable[[str], pathlib.Path]
) -> None:
    layer = LANGUAGE + "layers.0.self_attn."
    tensors, norm = arrays(converted("default")), LANGUAGE + "layers.0.input_layernorm.weight"
    gain = (1 + arrays(source)[norm]) / (1 + tensors[norm])
    permutation = next(tensors[name] for m in "kqv" if (name := f"{layer}{m}_proj.permutation") in tensors)
    codes, scale = decoded(tensors, layer + "q_proj")
    errors = []

    def compare(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = (
            (inputs[0][0].double().numpy() / gain)[:, permutation] @ hadamard(len(gain), 64),
            output[0].double().numpy(),
        )
        step = abs(x).max(1, keepdims=True) / 127
        errors.append(np.linalg.norm(np.round(x / step) * step @ (codes * scale).T - y) / np.linalg.norm(y))

    policy = load_policy(source, dtype=torch.float32, optimize=False)
    policy.get_submodule(layer + "q_proj").register_forward_hook(compare)
    actions(policy)
    assert [demo[2]["presets"][0]["layer_errors"][layer + "q_proj"]] == pytest.approx(errors, rel=2e-3)


def test_only_random_weights_are_said_to_be_random(
    demo: tuple[pathlib.Path, str, dict[str, Any]],
    tiny: Architecture,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert RANDOM not in demo[1]
    assert demo[2]["random_weights"] is False
    monkeypatch.setattr(importlib.import_module("openpi_duquant.commands.demo"), "SMALL", tiny)
    assert RANDOM in run_demo(tmp_path, "--presets", "simple")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["random_weights"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--presets", "simple", "best"), "unknown preset 'best'"),
        (("--checkpoint", "gone"), "gone: no such folder"),
        (("--presets",), ""),
    ],
)
def test_a_demo_that_cannot_be_leaves_nothing(
    source: pathlib.Path, tmp_path: pathlib.Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_demo(tmp_path, *(() if "--checkpoint" in arguments else ("--checkpoint", source)), *arguments)
    assert caught.value.code
    assert said in str(caught.value.code)
    assert not list(tmp_path.rglob("*.*"))


def test_every_preset_can_be_compared(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = run_demo(tmp_path, "--checkpoint", source, "--presets", *PRESETS)
    assert all(f"| {preset} " in page for preset in PRESETS)
    assert "| original | bfloat16 " in " ".join(page.split())
