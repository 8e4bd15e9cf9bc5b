"""Which configs get a quantized twin, what the twins are, and what the variables change in them."""

from collections.abc import Callable
import dataclasses
import pathlib
import sys
import types
from typing import Any

from openpi_host import import_openpi
import pytest

import openpi_duquant
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError

pytestmark = pytest.mark.openpi

WITHOUT = {
    "pi0_fast_libero": "its model is Pi0FASTConfig; pi0 and pi0.5 can be quantized",
    "pi0_libero_low_mem_finetune": "its paligemma_variant is 'gemma_2b_lora'",
    "debug_pi05": "its paligemma_variant is 'dummy'",
}


@pytest.fixture
def configs(plugin: types.ModuleType) -> dict[str, Any]:
    """All configs, by name."""
    del plugin
    from openpi.training import config

    return config._CONFIGS_DICT


def test_every_pi0_and_pi05_config_that_pytorch_runs_has_a_twin(configs: dict[str, Any]) -> None:
    twins = {name.removesuffix("_duquant") for name in configs if name.endswith("_duquant")}
    assert twins == {
        name
        for name, config in configs.items()
        if "pi0_config" in type(config.model).__module__
        and (config.model.paligemma_variant, config.model.action_expert_variant) == ("gemma_2b", "gemma_300m")
    }
    assert {"pi05_libero", "pi0_libero", "pi05_droid", "pi0_droid", "pi05_aloha", "pi0_aloha_sim"} <= twins
    assert not twins & set(WITHOUT)


def test_a_twin_differs_from_its_original_in_name_and_model_only(configs: dict[str, Any]) -> None:
    from openpi.models.pi0_config import Pi0Config

    for name in ("pi05_libero", "pi0_aloha_sim", "pi05_droid"):
        original, twin = configs[name], configs[f"{name}_duquant"]
        assert dataclasses.replace(twin, name=name, model=original.model) == original
        assert isinstance(twin.model, Pi0Config)
        for field in dataclasses.fields(Pi0Config):
            same = getattr(twin.model, field.name) == getattr(original.model, field.name)
            assert same == (field.name != "pytorch_compile_mode"), field.name  # off in these tests, by the variable
        assert twin.model.quantization.config == DuQuantConfig()
        assert twin.model.quantization.asked == ()


@pytest.mark.parametrize("name", WITHOUT)
def test_configs_without_a_twin_say_why(plugin: types.ModuleType, configs: dict[str, Any], name: str) -> None:
    assert f"{name}_duquant" not in configs
    with pytest.raises(DuQuantError) as caught:
        plugin.register(name)
    assert str(caught.value).startswith(f"{name}: {WITHOUT[name]}")
    with pytest.raises(DuQuantError, match=name):
        plugin.create_trained_policy(configs[name], pathlib.Path(__file__).parents[1])


def test_an_unknown_name_gets_openpis_hint(plugin: types.ModuleType) -> None:
    with pytest.raises(DuQuantError, match=r"'pi05_libro' not found\. Did you mean 'pi05_libero'"):
        plugin.register("pi05_libro")


def test_registering_again_replaces(plugin: types.ModuleType) -> None:
    for block in (32, 16):
        twin = openpi_duquant.register("pi05_libero", DuQuantConfig(rotation_block=block), runtime="module")
        assert plugin.get_config("pi05_libero_duquant") is twin
        assert (twin.model.quantization.config.rotation_block, twin.name) == (block, "pi05_libero_duquant")
        assert twin.model.quantization.environment.runtime == "module"
        assert len(twin.model.quantization.asked) == len(dataclasses.fields(DuQuantConfig))
    plugin.configs.register_all()
    assert plugin.get_config("pi05_libero_duquant") is twin


def test_a_twin_may_have_a_name_of_its_own(plugin: types.ModuleType) -> None:
    before = plugin.get_config("pi05_libero_duquant")
    twin = plugin.register("pi05_libero", name="w8", backend="fake")
    assert plugin.get_config("w8") is twin
    assert (twin.name, twin.model.quantization.environment.backend) == ("w8", "fake")
    assert plugin.get_config("pi05_libero_duquant") is before


def test_an_unknown_runtime_is_refused(plugin: types.ModuleType) -> None:
    with pytest.raises(DuQuantError, match="unknown runtime 'graph': choose from engine, module"):
        plugin.register("pi05_libero", runtime="graph")


def test_openpis_command_line_overrides_a_twin(plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from openpi.training import config

    arguments = ["pi05_libero_duquant", "--exp-name=x", "--batch-size=4", "--model.action-horizon=5"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    parsed = config.cli()
    assert (parsed.name, parsed.model.action_horizon, parsed.batch_size) == ("pi05_libero_duquant", 5, 4)
    assert type(parsed.model) is plugin.configs.DuQuantPi0Config
    assert parsed.model.quantization == plugin.get_config("pi05_libero_duquant").model.quantization


def test_openpis_help_does_not_show_what_is_ours(
    plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openpi.training import config

    del plugin
    monkeypatch.setattr(sys, "argv", ["train.py", "pi05_libero_duquant", "--help"])
    with pytest.raises(SystemExit) as caught:
        config.cli()
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "--model.action-horizon" in printed
    assert "quantization" not in printed


def test_variables_reach_the_twin(
    plugin: types.ModuleType, variables: Callable[..., None], tmp_path: pathlib.Path
) -> None:
    variables(RUNTIME="module", BACKEND="fake", BLOCK="32", ABITS="16", DEBUG="1", PACKDIR=tmp_path)
    asked = plugin.register("pi05_libero").model.quantization
    assert asked.config == DuQuantConfig(rotation_block=32, activation_bits=16)
    assert asked.asked == ("activation_bits", "rotation_block")
    environment = asked.environment
    assert (environment.runtime, environment.backend, environment.debug) == ("module", "fake", True)
    assert environment.packdir == tmp_path
    given = plugin.register("pi05_libero", runtime="engine", backend="reference").model.quantization
    assert (given.environment.runtime, given.environment.backend) == ("engine", "reference")
    assert given.config == asked.config


def test_a_malformed_variable_stops_registration(plugin: types.ModuleType, variables: Callable[..., None]) -> None:
    variables(BLOKC="32")
    with pytest.raises(DuQuantError, match="OPENPI_DUQUANT_BLOKC; did you mean OPENPI_DUQUANT_BLOCK"):
        plugin.register("pi05_libero")


@pytest.mark.parametrize(
    ("disabled", "profile", "mode"), [("0", "0", "max-autotune"), ("1", "0", None), ("0", "1", None)]
)
def test_compilation_is_openpis_unless_it_is_disabled_or_profiled(
    plugin: types.ModuleType,
    variables: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    disabled: str,
    profile: str,
    mode: str | None,
) -> None:
    monkeypatch.setenv("OPENPI_DISABLE_TORCH_COMPILE", disabled)
    variables(PROFILE=profile)
    assert plugin.get_config("pi05_libero").model.pytorch_compile_mode == "max-autotune"
    assert plugin.register("pi05_libero").model.pytorch_compile_mode == mode


def test_the_checkout_under_test_is_the_one_named() -> None:
    import openpi

    import_openpi(pathlib.Path(openpi.__file__).parents[2])  # again: nothing happens, nothing is refused
