"""A conversion that cannot be says why in one line, writes nothing and exits with status 1."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import shutil
import sys

import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from openpi_duquant import PRESETS
from openpi_duquant import convert
from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.commands import main

UP = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"
NORM = "paligemma_with_expert.paligemma.model.language_model.layers.0.input_layernorm.weight"
Damage = Callable[[pathlib.Path], object]


def state_of(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: names, times of change, contents."""
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else (0, b"") for p in paths}


@pytest.fixture
def failure(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Callable[..., str]:
    """Runs convert-checkpoint, which must fail and leave the test's folder as it was; returns what it says."""

    def run(*arguments: str | pathlib.Path) -> str:
        before = state_of(tmp_path)
        monkeypatch.setattr(sys, "argv", ["openpi-duquant", "convert-checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        message = caught.value.code
        assert isinstance(message, str)  # to stderr, with exit status 1
        assert message.startswith("error: ")
        assert len(message.splitlines()) == 1
        assert state_of(tmp_path) == before
        return message

    return run


def put(name: str, change: Callable[[Tensor], Tensor | None]) -> Damage:
    """Replaces a tensor of a checkpoint."""

    def damage(folder: pathlib.Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors.get(name, torch.zeros(1)))
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors"
        )

    return damage


def set_last(value: float) -> Callable[[Tensor], Tensor]:
    """Puts a value into the last element."""
    return lambda old: torch.cat((old.flatten()[:-1], torch.full((1,), value, dtype=old.dtype))).reshape(old.shape)


def cut(folder: pathlib.Path) -> None:
    """Cuts the weights in the middle."""
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def nothing(_: pathlib.Path) -> None:
    """Does no damage."""


CASES: dict[str, tuple[Damage, tuple[str, ...], str]] = {
    "no folder": (shutil.rmtree, (), "own: no such folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), (), "holds no model.safetensors"),
    "cut": (cut, (), "model.safetensors: not a readable"),
    "foreign": (lambda folder: (folder / "model.safetensors").write_text("<html>"), (), "not a readable safetensors"),
    "nan": (put(UP, set_last(float("nan"))), (), f"{UP}: the weight holds NaN or Inf"),
    "infinity": (put(NORM, set_last(-float("inf"))), (), f"{NORM}: the weight holds NaN or Inf"),
    "overflow": (put(UP, lambda old: torch.full(old.shape, 1e300, dtype=torch.float64)), (), UP),
    "integers": (put(UP, lambda old: old.to(torch.int8)), (), UP),
    "wrong shape": (put(UP, lambda old: old[1:].contiguous()), (), UP),
    "wrong rank": (put(UP.replace("1.mlp.up", "0.mlp.gate"), torch.flatten), (), UP.replace("1.mlp.up", "0.mlp.gate")),
    "no rows": (put(UP.replace("1.mlp.up", "0.self_attn.k"), lambda old: old[:0]), (), "k_proj"),
    "a scalar": (put("action_out_proj.weight", lambda _: torch.zeros(())), (), "action_out_proj.weight"),
    "missing tensor": (put(UP, lambda _: None), (), UP),
    "foreign tensor": (put("unknown", lambda _: torch.zeros(1)), (), "unknown"),
    "unknown preset": (nothing, ("--preset", "best"), "unknown preset 'best': choose from default, simple"),
    "nothing selected": (nothing, ("--scope", "gemma_exprt"), "near misses: paligemma_with_expert.gemma_expert"),
    "no such layer": (nothing, ("--layers", UP.removesuffix("_proj.weight")), UP.removesuffix(".weight")),
    "group size": (nothing, ("--group-size", "48"), "is not a multiple of group_size 48"),
    "not a power of two": (nothing, ("--rotation-block", "48"), "rotation_block: 48"),
    "no calibration": (nothing, ("--calibration-steps", "4"), "calibration_steps: 4"),
    "bad regex": (nothing, ("--include", "("), "include: '('"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_that_cannot_be_says_why(
    own_source: pathlib.Path, tmp_path: pathlib.Path, failure: Callable[..., str], case: str
) -> None:
    damage, options, expected = CASES[case]
    damage(own_source)
    assert expected in failure(own_source, tmp_path / "target", *options)


@pytest.mark.parametrize(
    ("name", "value"), [("WBITZ", "4"), ("WBITS_DEFAULT", "four"), ("WBITS_DEFAULT", "5"), ("PERMUTE", "2"), ("", "")]
)
def test_a_variable_that_is_unknown_or_malformed_is_named(
    own_source: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., str], name: str, value: str
) -> None:
    monkeypatch.setenv(f"OPENPI_DUQUANT_{name}", value)
    assert f"OPENPI_DUQUANT_{name}" in failure(own_source)


def test_nothing_is_converted_onto_what_is_there(
    own_source: pathlib.Path, tmp_path: pathlib.Path, failure: Callable[..., str]
) -> None:
    convert(own_source, tmp_path / "own-default", PRESETS["default"])
    assert "own-default: exists already" in failure(own_source)
    assert "own: exists already" in failure(own_source, own_source)
    assert "config.json: exists already" in failure(own_source, own_source / "config.json")
    assert "is converted already" in failure(tmp_path / "own-default")
    assert "assets: holds no model.safetensors" in failure(own_source / "assets")


def test_an_odd_width_is_refused_by_name(
    tmp_path: pathlib.Path, tiny: Architecture, failure: Callable[..., str]
) -> None:
    odd = dataclasses.replace(tiny, language=TransformerSize(65, 2, 320, 6, 32))
    synthetic.make_checkpoint(tmp_path / "odd", odd)
    message = failure(tmp_path / "odd")
    assert "language_model.layers.0." in message
    assert "in_features 65 is odd" in message


def test_a_jax_checkpoint_is_told_how_to_become_a_pytorch_one(
    tmp_path: pathlib.Path, failure: Callable[..., str]
) -> None:
    (tmp_path / "jax" / "params").mkdir(parents=True)
    assert "convert_jax_model_to_pytorch.py --checkpoint_dir" in failure(tmp_path / "jax")


def test_a_nan_in_a_tensor_that_nothing_reads_is_no_fault(own_source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    put("paligemma_with_expert.gemma_expert.lm_head.weight", set_last(float("nan")))(own_source)
    assert convert(own_source, tmp_path / "target", PRESETS["default"]).counts["layers"] == 28
