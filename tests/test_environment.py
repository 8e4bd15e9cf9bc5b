"""What the variables say, and what is refused."""

import dataclasses
import pathlib
from typing import Any

import pytest

from openpi_duquant import kernels
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.environment import BACKENDS
from openpi_duquant.environment import SWITCHES
from openpi_duquant.environment import VARIABLES
from openpi_duquant.environment import Environment
from openpi_duquant.environment import read_environment

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
        ("BACKEND", "cutlass", "auto, triton, .*fake"),
        ("AUTO", "off", "0 or 1"),
    ],
)
def test_a_malformed_value_names_its_variable(key: str, text: str, reason: str) -> None:
    with pytest.raises(DuQuantError, match=f"OPENPI_DUQUANT_{key}='{text}': .*{reason}"):
        read_environment({"OPENPI_DUQUANT_" + key: text})


def test_the_process_environment_is_read_without_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENPI_DUQUANT_BLOCK", "128")
    assert read_environment().fields["rotation_block"] == 128


def test_a_variable_names_the_backends_that_there_are() -> None:
    assert set(BACKENDS) == {"auto", *kernels.BACKENDS}
