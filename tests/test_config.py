"""DuQuantConfig, its presets and its JSON."""

import dataclasses
import json
from typing import Any, Literal

import pytest

from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.config import preset

UNUSUAL = DuQuantConfig(
    scope="a.",
    include="b",
    exclude="c",
    layers=("a.b", "a.d"),
    include_action_head=True,
    weight_bits=8,
    layer_bits={"a.b": 4},
    activation_bits=16,
    group_size=32,
    weight_rounding="nearest",
    gptq_dampening=0.5,
    keep_error_below=0.1,
    attention_temperature=True,
    output_energy=True,
    scale_search="max",
    permute=False,
    smoothing=0.5,
    rotation="svd",
    rotation_block=16,
    row_rotation="restore",
    output_rotation_block=8,
    activation_percentile=99.0,
)

BAD: dict[str, list[Any]] = {
    "permute": ["no", 1],
    "include_action_head": [None],
    "layers": [["a"], (1,)],
    "weight_bits": [3, True, 4.0],
    "activation_bits": [4],
    "weight_rounding": ["gtpq", None],
    "keep_error_below": [0, -0.1, True, "x", float("nan")],
    "gptq_dampening": [0, -0.1, True, "x", float("inf"), float("nan")],
    "scale_search": ["best"],
    "rotation": ["hadamrad"],
    "row_rotation": ["undo", 0],
    "rotation_block": [48, 1, 0, -16, 16.0],
    "output_rotation_block": [24, 0],
    "group_size": [0, 33, -32, "x"],
    "smoothing": [-0.1, 1.5, float("nan")],
    "activation_percentile": [0.0, 100.5],
    "calibration_steps": [1, -1],
    "layer_bits": [{"a": 5}],
    "scope": [3],
    "include": ["("],
    "exclude": ["*"],
}


@pytest.mark.parametrize("config", [*PRESETS.values(), UNUSUAL], ids=[*PRESETS, "unusual"])
def test_json_returns_the_config(config: DuQuantConfig) -> None:
    assert json.loads(json.dumps(config.to_json())) == config.to_json()
    assert DuQuantConfig.from_json(config.to_json()) == config


def test_the_unusual_config_differs_from_the_default_in_every_field() -> None:
    fixed = {"calibration_steps"}
    for field in dataclasses.fields(DuQuantConfig):
        same = getattr(UNUSUAL, field.name) == getattr(DuQuantConfig(), field.name)
        assert same == (field.name in fixed), field.name


@pytest.mark.parametrize(
    ("name", "permute", "rotation", "block", "row_rotation"),
    [
        ("default", True, "hadamard", 64, "0"),
        ("simple", False, "none", None, "0"),
        ("optimized", True, "svd", 16, "restore"),
        ("dit_qkvo", True, "svd", 16, "restore"),
        ("llm", True, "svd", 16, "restore"),
        ("full_llm_dit", True, "svd", 64, "restore"),
        ("quantvla", True, "svd", 64, "restore"),
    ],
)
def test_a_preset_transforms_as_published(
    name: str, *, permute: bool, rotation: str, block: int | None, row_rotation: str
) -> None:
    config = preset(name)
    assert (config.permute, config.rotation, config.row_rotation) == (permute, rotation, row_rotation)
    assert block is None or config.rotation_block == block
    assert (config.weight_bits, config.activation_bits, config.group_size) == (4, 8, None)
    assert (config.scale_search, config.smoothing, config.calibration_steps) == ("mse", 0.15, 0)


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(DuQuantError, match=r"'defualt'.*default.*quantvla"):
        preset("defualt")


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(DuQuantError, match=rf"^{field}: "):
        DuQuantConfig(**{field: value})


@pytest.mark.parametrize("row_rotation", ["restore", "propagate"])
def test_rotated_rows_need_a_rotation(row_rotation: Literal["restore", "propagate"]) -> None:
    with pytest.raises(DuQuantError, match=rf"^row_rotation: .*{row_rotation}"):
        DuQuantConfig(row_rotation=row_rotation, rotation="none")


@pytest.mark.parametrize(
    ("row_rotation", "own", "block"), [("0", 8, 0), ("restore", 8, 8), ("restore", None, 32), ("propagate", 8, 0)]
)
def test_output_block_falls_back_on_the_rotation_block(
    row_rotation: Literal["0", "restore", "propagate"], own: int | None, block: int
) -> None:
    config = DuQuantConfig(rotation_block=32, row_rotation=row_rotation, output_rotation_block=own)
    assert config.output_block == block


@pytest.mark.parametrize(("added", "removed"), [({"colour": 1}, ()), ({}, ("permute",))])
def test_json_with_other_fields_names_them(added: dict[str, int], removed: tuple[str, ...]) -> None:
    values = {name: value for name, value in DuQuantConfig().to_json().items() if name not in removed} | added
    with pytest.raises(DuQuantError, match=[*added, *removed][0]):
        DuQuantConfig.from_json(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [("smoothing", "a"), ("include", 5), ("layer_bits", None), ("layers", None), ("layers", "abc"), ("scope", 3)],
)
def test_json_of_a_wrong_type_names_the_field(field: str, value: object) -> None:
    with pytest.raises(DuQuantError, match=field):
        DuQuantConfig.from_json(DuQuantConfig().to_json() | {field: value})


def test_configs_share_nothing() -> None:
    copy = dataclasses.replace(PRESETS["optimized"], scope="")
    copy.layer_bits["a"] = 8
    assert not any(config.layer_bits for config in PRESETS.values())
