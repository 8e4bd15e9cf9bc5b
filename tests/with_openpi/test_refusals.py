"""Whatever cannot be quantized as asked stops the creation of the policy: there is never one in floating point."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import re
import shutil
import types
from typing import Any

from openpi_host import TinyPi0
from openpi_host import shrunken_openpi
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch

from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError

pytestmark = pytest.mark.openpi
NAME = "pi05_libero_duquant"
RUNTIMES = pytest.mark.parametrize("runtime", ["engine", "module"])
LAYER = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj"
Refused = Callable[..., str]


@pytest.fixture
def refused(stock: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Asks openpi for a policy, which must be refused in one line; openpi's own loading must never be reached."""
    from openpi.models.model import BaseModelConfig
    from openpi.policies import policy

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("a policy was made, or openpi's own loading was reached")

    monkeypatch.setattr(BaseModelConfig, "load_pytorch", reached)
    monkeypatch.setattr(policy.Policy, "__init__", reached)

    def ask(folder: pathlib.Path, name: str = NAME, **asked: Any) -> str:
        with pytest.raises(DuQuantError) as caught:
            stock(name, folder, **{"runtime": "engine", **asked})
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message

    return ask


@pytest.fixture
def own(hosts: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    """A converted pi0.5 checkpoint that a test may damage."""
    return shutil.copytree(hosts.converted / "pi05", tmp_path / "own")


@RUNTIMES
def test_a_conversion_other_than_the_variables_ask_for(
    refused: Refused, variables: Callable[..., None], hosts: Any, runtime: str
) -> None:
    variables(BLOCK="32")
    message = refused(hosts.converted / "pi05", runtime=runtime)
    assert "was converted with rotation_block=64, and 32 is asked for" in message
    assert str(hosts.converted / "pi05") in message


@pytest.mark.parametrize("field", ["weight_bits", "exclude", "scale_search"])
def test_a_conversion_other_than_the_config_asks_for(refused: Refused, hosts: Any, field: str) -> None:
    values = {"weight_bits": 8, "exclude": "vision_tower", "scale_search": "max"}
    asked = DuQuantConfig(**{field: values[field]})
    assert f"was converted with {field}=" in refused(hosts.converted / "pi05", duquant=asked)


def test_a_conversion_as_asked_for_is_not_refused(
    stock: Callable[..., Any], variables: Callable[..., None], hosts: Any
) -> None:
    variables(BLOCK="64", LS="0.15")
    assert stock(NAME, hosts.converted / "pi05", duquant=DuQuantConfig()).metadata["duquant"]["layers"] == 42


@RUNTIMES
@pytest.mark.parametrize("kind", ["original", "converted"])
def test_the_checkpoint_of_another_model(
    refused: Refused, variables: Callable[..., None], hosts: Any, tmp_path: pathlib.Path, runtime: str, kind: str
) -> None:
    variables(PACKDIR=tmp_path)
    folder = getattr(hosts, kind)
    assert "pi05=False, the config True" in refused(folder / "pi0", NAME, runtime=runtime)
    assert "pi05=True, the config False" in refused(folder / "pi05", "pi0_libero_duquant", runtime=runtime)


@RUNTIMES
def test_another_number_of_action_dimensions(
    plugin: types.ModuleType, refused: Refused, hosts: Any, runtime: str
) -> None:
    from openpi.training import config

    other = plugin.get_config("pi05_libero")
    other = dataclasses.replace(other, name="seven", model=dataclasses.replace(other.model, action_dim=7))
    config._CONFIGS_DICT["seven"] = other
    message = refused(hosts.converted / "pi05", "seven_duquant", runtime=runtime)
    assert "action_dim=32, the config 7" in message


def truncate(folder: pathlib.Path) -> None:
    """Cuts the last bytes off."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 10)


def flip(folder: pathlib.Path) -> None:
    """Changes one bit of a weight."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def drop(folder: pathlib.Path) -> None:
    """Takes one layer's weight away."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}.weight_packed"]
    save_file(tensors, folder / "model.safetensors")


def widen(folder: pathlib.Path) -> None:
    """Gives one layer's weight another shape."""
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight_packed"] = torch.zeros(8, 8, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")


def edit(folder: pathlib.Path) -> None:
    """Writes another number of bits into the manifest."""
    values = json.loads((folder / "duquant.json").read_text())
    values["config"]["weight_bits"] = 8
    (folder / "duquant.json").write_text(json.dumps(values))


@RUNTIMES
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "not a readable safetensors file"),
        (flip, "sha256 differs"),
        (drop, f"tensor {LAYER}.weight_packed is missing"),
        (widen, f"tensor {LAYER}.weight_packed is"),
        (edit, "duquant.json: is not as it was written"),
    ],
)
def test_a_damaged_checkpoint(
    refused: Refused, own: pathlib.Path, damage: Callable[[pathlib.Path], None], said: str, runtime: str
) -> None:
    damage(own)
    message = refused(own, runtime=runtime)
    assert said in message
    assert str(own) in message


@RUNTIMES
def test_unknown_backends(
    refused: Refused, variables: Callable[..., None], hosts: Any, tmp_path: pathlib.Path, runtime: str
) -> None:
    assert "unknown backend 'cutlass'" in refused(hosts.converted / "pi05", runtime=runtime, backend="cutlass")
    assert "unknown backend 'humming'" in refused(hosts.original / "pi05", runtime=runtime, backend="humming")
    if not torch.cuda.is_available():
        variables(BACKEND="bitblas", PACKDIR=tmp_path)
        assert "backend bitblas cannot run: it needs a CUDA device, not cpu" in refused(
            hosts.original / "pi05", runtime=runtime
        )
    assert not list(tmp_path.iterdir())  # refused before a conversion that takes minutes


def test_unknown_runtimes(plugin: types.ModuleType, hosts: Any) -> None:
    with pytest.raises(DuQuantError, match="unknown runtime 'jax'"):
        plugin.create_trained_policy(plugin.get_config(NAME), hosts.converted / "pi05", runtime="jax")


@RUNTIMES
def test_a_dry_run(refused: Refused, variables: Callable[..., None], hosts: Any, runtime: str) -> None:
    variables(DRYRUN="1")
    assert "OPENPI_DUQUANT_DRYRUN is set" in refused(hosts.converted / "pi05", runtime=runtime)


def test_a_model_without_one_of_the_layers(
    plugin: types.ModuleType, refused: Refused, hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = plugin.loading.load_module.__globals__
    real = loader["PI0Pytorch"]

    def without_a_layer(config: Any) -> torch.nn.Module:
        model = real(config)
        model.paligemma_with_expert.gemma_expert.model.layers[1].mlp.up_proj = torch.nn.Identity()
        del model.paligemma_with_expert.gemma_expert.model.layers[1].mlp.up_proj
        return model

    monkeypatch.setitem(loader, "PI0Pytorch", without_a_layer)
    assert f"has no layer {LAYER} (1 missing)" in refused(hosts.converted / "pi05", runtime="module")


def test_a_model_of_other_sizes(refused: Refused, hosts: Any) -> None:
    with shrunken_openpi(TinyPi0(expert_mlp_dim=512)):
        message = refused(hosts.converted / "pi05", runtime="module")
    assert re.search(r"gemma_expert.*is \(256, 128\) in the checkpoint and \(512, 128\) in the model", message)


def test_a_model_that_does_not_fit_the_checkpoint(
    plugin: types.ModuleType, refused: Refused, hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = plugin.loading.load_module.__globals__
    real = loader["PI0Pytorch"]

    def changed(config: Any, *, persistent: bool) -> torch.nn.Module:
        model = real(config)
        model.register_buffer("novelty", torch.zeros(3), persistent=persistent)
        return model

    def narrowed(config: Any) -> torch.nn.Module:
        model = real(config)
        model.action_out_proj = torch.nn.Linear(16, 32)
        return model

    monkeypatch.setitem(loader, "PI0Pytorch", lambda config: changed(config, persistent=True))
    assert "has no novelty, which openpi's model needs" in refused(hosts.converted / "pi05", runtime="module")
    monkeypatch.setitem(loader, "PI0Pytorch", lambda config: changed(config, persistent=False))
    assert "nothing fills novelty" in refused(hosts.converted / "pi05", runtime="module")
    monkeypatch.setitem(loader, "PI0Pytorch", narrowed)
    message = refused(hosts.converted / "pi05", runtime="module")
    assert re.search(r"does not fit openpi's model: .*action_out_proj", message)


@RUNTIMES
def test_layers_that_are_not_placed(
    plugin: types.ModuleType, refused: Refused, hosts: Any, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    engine = plugin.loading.EngineModel.load.__func__.__globals__["load_policy"].__globals__["assemble"].__globals__
    module = plugin.loading.load_module.__globals__["fill_openpi_model"].__globals__
    for loader in (module, engine):
        monkeypatch.setitem(loader, "place_quant_linears", lambda *_, **__: [])
    refused(hosts.converted / "pi05", runtime=runtime)


@RUNTIMES
def test_a_weight_that_cannot_be_converted(
    refused: Refused, variables: Callable[..., None], hosts: Any, tmp_path: pathlib.Path, runtime: str
) -> None:
    variables(PACKDIR=tmp_path / "packs")
    source = shutil.copytree(hosts.original / "pi05", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{LAYER}.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    assert f"{LAYER}.weight: the weight holds NaN or Inf" in refused(source, runtime=runtime)
    assert not (tmp_path / "packs").exists()


@pytest.mark.parametrize("stage", ["converted_folder", "Manifest", "facts"])
def test_an_error_nobody_expected_is_no_float_policy_either(
    plugin: types.ModuleType, stock: Callable[..., Any], hosts: Any, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from openpi.models.model import BaseModelConfig

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BaseModelConfig, "load_pytorch", lambda *_: pytest.fail("a float policy"))
    monkeypatch.setattr(plugin.loading, stage, types.SimpleNamespace(load=fail) if stage == "Manifest" else fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        stock(NAME, hosts.converted / "pi05")


def test_a_jax_checkpoint(
    plugin: types.ModuleType, refused: Refused, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openpi.models import model

    (tmp_path / "params").mkdir()
    monkeypatch.setattr(model, "restore_params", lambda *_, **__: {})
    assert "convert_jax_model_to_pytorch.py" in refused(tmp_path)  # openpi's own function
    with pytest.raises(DuQuantError, match=r"convert_jax_model_to_pytorch\.py"):
        plugin.create_trained_policy(plugin.get_config(NAME), tmp_path)


def test_training_with_a_twin(plugin: types.ModuleType) -> None:
    with pytest.raises(DuQuantError, match="train with the config it was made from"):
        plugin.get_config(NAME).model.create(None)
