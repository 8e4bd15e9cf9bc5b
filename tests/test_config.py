"""DuQuantConfig, its presets, its JSON and the environment variables."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import pytest

from openpi_duquant.config import PRESETS
from openpi_duquant.config import SWITCHES
from openpi_duquant.config import VARIABLES
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.config import Environment
from openpi_duquant.config import preset
from openpi_duquant.config import read_environment

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

ENVIRONMENT: dict[str, tuple[str, Any]] = {
    "SCOPE": ("expert.", "expert."),
    "INCLUDE": (r"q_proj$", r"q_proj$"),
    "EXCLUDE": (r"v_proj$", r"v_proj$"),
    "LAYERS": ("a.q_proj, a.k_proj,", ("a.q_proj", "a.k_proj")),
    "INCLUDE_ACTION_HEAD": ("1", True),
    "WBITS_DEFAULT": ("8", 8),
    "WBITS": ("a.q_proj:8, b:c:4", {"a.q_proj": 8, "b:c": 4}),
    "ABITS": ("16", 16),
    "PERMUTE": ("0", False),
    "LS": ("0.25", 0.25),
    "ROTATION": ("svd", "svd"),
    "BLOCK": ("32", 32),
    "ROW_ROT": ("restore", "restore"),
    "BLOCK_OUT": ("16", 16),
    "ACT_PCT": ("99.5", 99.5),
    "CALIB_STEPS": ("0", 0),
}

SWITCHED: dict[str, tuple[str, Any]] = {
    "PACKDIR": ("/data/packs", pathlib.Path("/data/packs")),
    "CALIBRATION": ("/data/recorded", pathlib.Path("/data/recorded")),
    "DRYRUN": ("yes", True),
    "RUNTIME": ("module", "module"),
    "BACKEND": ("fake", "fake"),
    "AUTO": ("0", False),
    "DEBUG": ("1", True),
    "PROFILE": ("/data/profile", pathlib.Path("/data/profile")),
    "PROFILE_SYNC": ("1", True),
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


@pytest.mark.parametrize("key", VARIABLES)
def test_a_variable_fills_its_field(key: str) -> None:
    text, value = ENVIRONMENT[key]
    environment = read_environment({"OPENPI_DUQUANT_" + key: text, "OTHER": "x"})
    assert environment == Environment({VARIABLES[key][0]: value})
    assert type(environment.fields[VARIABLES[key][0]]) is type(value)


@pytest.mark.parametrize("key", SWITCHES)
def test_a_variable_sets_its_switch(key: str) -> None:
    text, value = SWITCHED[key]
    environment = read_environment({"OPENPI_DUQUANT_" + key: text})
    assert environment == dataclasses.replace(Environment(), **{SWITCHES[key][0]: value})
    assert environment != Environment()


@pytest.mark.parametrize(("text", "folder"), [("1", pathlib.Path("duquant_profile")), ("0", None), ("no", None)])
def test_profile_is_a_flag_or_a_folder(text: str, folder: pathlib.Path | None) -> None:
    assert read_environment({"OPENPI_DUQUANT_PROFILE": text}).profile == folder


@pytest.mark.parametrize(("text", "allowed"), [("1", False), ("0", True)])
def test_openpis_own_switch_turns_compilation_off(text: str, *, allowed: bool) -> None:
    assert read_environment({"OPENPI_DISABLE_TORCH_COMPILE": text}).compile is allowed


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("no", False)])
def test_a_flag_reads_either_word(text: str, *, value: bool) -> None:
    assert read_environment({"OPENPI_DUQUANT_PERMUTE": text}).fields["permute"] is value


def test_variables_together_make_a_config() -> None:
    environment = read_environment({"OPENPI_DUQUANT_" + key: text for key, (text, _) in ENVIRONMENT.items()})
    config = DuQuantConfig(**environment.fields)
    assert (config.weight_bits, config.rotation_block, config.output_block, config.smoothing) == (8, 32, 16, 0.25)


@pytest.mark.parametrize(("name", "hint"), [("ROTATOIN", "OPENPI_DUQUANT_ROTATION"), ("wbits", None), ("QQQQ", None)])
def test_an_unknown_variable_is_named_with_a_hint(name: str, hint: str | None) -> None:
    with pytest.raises(DuQuantError, match=f"OPENPI_DUQUANT_{name}") as caught:
        read_environment({"OPENPI_DUQUANT_" + name: "1"})
    assert ("did you mean" in str(caught.value)) == (hint is not None)
    assert hint is None or hint in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("LS", "", ""),
        ("PERMUTE", "on", "0 or 1"),
        ("WBITS", "a", "name:bits"),
        ("ABITS", "4", "8, 16"),
        ("RUNTIME", "graph", "engine, module"),
        ("BACKEND", "cutlass", "auto, bitblas, .*fake"),
        ("AUTO", "off", "0 or 1"),
    ],
)
def test_a_malformed_value_names_its_variable(key: str, text: str, reason: str) -> None:
    with pytest.raises(DuQuantError, match=f"OPENPI_DUQUANT_{key}='{text}': .*{reason}"):
        read_environment({"OPENPI_DUQUANT_" + key: text})


def test_the_process_environment_is_read_without_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENPI_DUQUANT_BLOCK", "128")
    assert read_environment().fields["rotation_block"] == 128


def test_configs_share_nothing() -> None:
    copy = dataclasses.replace(PRESETS["optimized"], scope="")
    copy.layer_bits["a"] = 8
    assert not any(config.layer_bits for config in PRESETS.values())
