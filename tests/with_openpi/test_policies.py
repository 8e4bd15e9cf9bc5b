"""Policies that openpi creates from quantized configs, in both runtimes, against independent computation."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import shutil
import types
from typing import Any

import numpy as np
from openpi_host import TinyPi0
from openpi_host import save_openpi_checkpoint
from openpi_host import tiny_openpi_model
import pytest
from safetensors.torch import load_file
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openpi_duquant import Manifest
from openpi_duquant import Observation
from openpi_duquant import QuantLinear
from openpi_duquant import load_policy
from openpi_duquant.accuracy import relative_error
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.conversion import convert

pytestmark = pytest.mark.openpi

LAYERS, UNREAD = 42, 5  # q k v o gate up down of three blocks of two Gemmas; the last of the language model: k and v
NOISE = np.random.default_rng(1).standard_normal((10, 32)).astype(np.float32)
RUNTIMES = pytest.mark.parametrize("runtime", ["engine", "module"])
Stock = Callable[..., Any]
Example = Callable[..., dict[str, Any]]


def actions(policy: Any, observation: dict[str, Any], noise: np.ndarray = NOISE) -> Tensor:
    """What the policy answers to this observation from this noise."""
    return torch.from_numpy(np.array(policy.infer(observation, noise=noise)["actions"]))


def quant_linears(policy: Any) -> dict[str, QuantLinear]:
    """The quantized layers of a policy, by name."""
    return {name: layer for name, layer in policy._model.named_modules() if isinstance(layer, QuantLinear)}


def libero_actions_by_hand(folder: pathlib.Path, observation: dict[str, Any], data_home: pathlib.Path) -> np.ndarray:
    """As pi05_libero: the engine alone, with the transforms written out."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{data_home}/big_vision/paligemma_tokenizer.model")
    tokens = torch.tensor([tokenizer.encode(observation["prompt"], add_bos=True) + tokenizer.encode("\n")])
    images = {"base_0_rgb": "observation/image", "left_wrist_0_rgb": "observation/wrist_image"}
    seen = Observation(
        images={camera: torch.from_numpy(observation[key])[None] for camera, key in images.items()},
        image_masks={"right_wrist_0_rgb": torch.tensor([False])},
        tokenized_prompt=tokens,
        tokenized_prompt_mask=torch.ones_like(tokens, dtype=torch.bool),
    )
    normalised = load_policy(folder).sample_actions(seen, torch.from_numpy(NOISE)[None])[0, :, :7].double().numpy()
    stats = json.loads((folder / "assets/physical-intelligence/libero/norm_stats.json").read_text())
    low, high = (np.array(stats["norm_stats"]["actions"][key]) for key in ("q01", "q99"))
    return (normalised + 1) / 2 * (high - low + 1e-6) + low


def test_actions_are_the_engines_under_openpis_transforms(
    stock: Stock, hosts: Any, example: Example, openpi: pathlib.Path
) -> None:
    folder = hosts.converted / "pi05"
    policy = stock("pi05_libero_duquant", folder)
    by_hand = libero_actions_by_hand(folder, example("libero"), openpi)
    assert by_hand.shape == (10, 7)
    np.testing.assert_allclose(actions(policy, example("libero")).numpy(), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", [False, True], ids=["converted", "original"])
@RUNTIMES
def test_both_functions_create_the_same_policy(
    plugin: types.ModuleType,
    stock: Stock,
    hosts: Any,
    example: Example,
    variables: Callable[..., None],
    tmp_path: pathlib.Path,
    runtime: str,
    *,
    original: bool,
) -> None:
    variables(PACKDIR=tmp_path, RUNTIME=runtime)
    folder = (hosts.original if original else hosts.converted) / "pi05"
    first = stock("pi05_libero_duquant", folder, backend="reference")
    second = plugin.create_trained_policy(plugin.get_config("pi05_libero"), folder)
    expected = stock("pi05_libero_duquant", hosts.converted / "pi05", runtime=runtime)
    for policy in (first, second):
        assert torch.equal(actions(policy, example("libero")), actions(expected, example("libero")))
        assert policy.metadata == expected.metadata
    assert len(list(tmp_path.iterdir())) == original


@RUNTIMES
def test_every_layer_of_the_manifest_is_quantized(stock: Stock, hosts: Any, runtime: str) -> None:
    manifest = Manifest.load(hosts.converted / "pi05")
    policy = stock("pi05_libero_duquant", hosts.converted / "pi05", runtime=runtime)
    found = quant_linears(policy)
    assert len(manifest.layers) == LAYERS
    if runtime == "module":
        assert set(found) == set(manifest.layers)
    else:  # q, k and v are one layer there, gate and up another, and five layers of the last block are not read
        rows = {name: spec.out_features for name, spec in manifest.layers.items()}
        unread = [name for name in rows if "language_model.layers.2." in name and name[-6:-5] not in "kv"]
        assert len(unread) == UNREAD
        assert sum(layer.out_features for layer in found.values()) == sum(rows.values()) - sum(map(rows.get, unread))
    facts = policy.metadata["duquant"]
    assert (facts["layers"], facts["runtime"]) == (LAYERS, runtime)
    assert facts["backends"] == ["reference"]
    assert facts["sha256"] == manifest.sha256
    assert facts["config"] == DuQuantConfig().to_json()
    assert facts["versions"]["torch"] == torch.__version__


@RUNTIMES
def test_after_creation_scales_are_float32_and_weights_are_packed(stock: Stock, hosts: Any, runtime: str) -> None:
    folder = hosts.converted / "pi05"
    policy = stock("pi05_libero_duquant", folder, runtime=runtime)
    manifest = Manifest.load(folder)
    storages = {}
    for name, layer in quant_linears(policy).items():
        tensors = dict(layer.named_buffers())
        spec = manifest.layers[name].tensors() if runtime == "module" else layer.spec.tensors()
        assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == spec
        assert (tensors["weight_packed"].dtype, tensors["weight_scale"].dtype) == (torch.uint8, torch.float32)
        assert not list(layer.parameters())
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.is_meta
        storages |= {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors.values()}
    if runtime == "module":
        assert sum(storages.values()) == manifest.counts["quantized_bytes"]


def unquantized_policy(name: str, folder: pathlib.Path) -> Any:
    """openpi's policy as if this package were not there, uncompiled."""
    from openpi.policies import policy_config
    from openpi.training.config import get_config

    config = get_config(name)
    model = dataclasses.replace(config.model, pytorch_compile_mode=None)
    return policy_config.create_trained_policy(dataclasses.replace(config, model=model), folder)


@RUNTIMES
def test_what_openpi_computes_in_float32_is_loaded_so(stock: Stock, tmp_path: pathlib.Path, runtime: str) -> None:
    save_openpi_checkpoint(tiny_openpi_model(TinyPi0(), seed=0, dtype="float32"), tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "converted", DuQuantConfig())
    state = stock("pi05_libero_duquant", tmp_path / "converted", runtime=runtime)._model.state_dict()
    expected = load_file(tmp_path / "original" / "model.safetensors")
    if runtime == "module":  # openpi's own cast rounds these, then makes them float32 again
        expected = unquantized_policy("pi05_libero", tmp_path / "original")._model.state_dict()
    expert = "paligemma_with_expert.gemma_expert.model."
    for name in (f"{expert}layers.1.input_layernorm.dense.weight", f"{expert}norm.dense.bias", "action_in_proj.weight"):
        loaded = state["policy." + name if runtime == "engine" else name]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, expected[name])
    assert not torch.equal(loaded, loaded.bfloat16().float())


class FloatShapes(TorchDispatchMode):
    """Records the shapes of all floating-point tensors that are made, off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return made


@RUNTIMES
def test_no_weight_of_a_quantized_layer_is_ever_in_floating_point(stock: Stock, hosts: Any, runtime: str) -> None:
    manifest = Manifest.load(hosts.converted / "pi05")
    kept = {shape for dtype, shape in manifest.types().values() if dtype.is_floating_point}
    weights = {(layer.out_features, layer.in_features) for layer in manifest.layers.values()} - kept
    assert len(weights) > 3
    with FloatShapes() as made:
        policy = stock("pi05_libero_duquant", hosts.converted / "pi05", runtime=runtime)
    assert made.shapes & kept
    assert not made.shapes & weights
    assert not {tuple(parameter.shape) for parameter in policy._model.parameters()} & weights


@pytest.mark.parametrize(("config", "robot", "checkpoint", "horizon", "joints"), [
    ("pi05_libero_duquant", "libero", "pi05", 10, 7),
    ("pi05_droid_duquant", "droid", "pi05", 15, 8),
    ("pi0_aloha_sim_duquant", "aloha", "pi0", 50, 14),
])  # fmt: skip
def test_the_runtimes_agree_on_example_observations(
    stock: Stock, hosts: Any, example: Example, config: str, robot: str, checkpoint: str, horizon: int, joints: int
) -> None:
    folder, original = hosts.converted / checkpoint, hosts.original / checkpoint
    noise = np.random.default_rng(2).standard_normal((horizon, 32)).astype(np.float32)
    engine, module = (stock(config, folder, runtime=runtime) for runtime in ("engine", "module"))
    plain = unquantized_policy(config.removesuffix("_duquant"), original)
    observation = example(robot)
    by_engine, by_module, in_float = (actions(policy, observation, noise) for policy in (engine, module, plain))
    assert by_engine.shape == by_module.shape == (horizon, joints)
    other = actions(engine, example(robot, seed=5), noise)
    error = relative_error(by_engine, by_module)
    assert error < 0.01
    assert 10 * error < relative_error(by_engine, in_float) < 0.3
    assert relative_error(other, by_engine) > 10 * error


@pytest.mark.parametrize(("activation_bits", "bound"), [(16, 1e-5), (8, 2e-2)])
@pytest.mark.parametrize("checkpoint", ["pi05", "pi0"])
def test_in_float32_the_runtimes_agree_closely(
    plugin: types.ModuleType, hosts: Any, tmp_path: pathlib.Path, checkpoint: str, activation_bits: int, bound: float
) -> None:
    from openpi.models.model import Observation as OpenpiObservation

    from openpi_duquant.plugin.loading import load_model

    convert(hosts.original / checkpoint, tmp_path / "converted", DuQuantConfig(activation_bits=activation_bits))
    twin = plugin.get_config({"pi05": "pi05_libero_duquant", "pi0": "pi0_libero_duquant"}[checkpoint])
    config = dataclasses.replace(twin.model, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    seen = OpenpiObservation.from_dict({
        "image": {camera: torch.randint(256, (2, 224, 224, 3), generator=generator, dtype=torch.uint8)
                  for camera in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")},
        "image_mask": {"base_0_rgb": torch.tensor([True, True]), "left_wrist_0_rgb": torch.tensor([True, False]),
                       "right_wrist_0_rgb": torch.tensor([False, False])},
        "state": torch.randn(2, 32, generator=generator),
        "tokenized_prompt": torch.randint(400, (2, config.max_token_len), generator=generator),
        "tokenized_prompt_mask": torch.arange(config.max_token_len)[None] < torch.tensor([[12], [30]]),
    })  # fmt: skip
    noise = torch.randn(2, config.action_horizon, 32, generator=generator)
    sampled = []
    for runtime in ("engine", "module"):
        model = load_model(tmp_path / "converted", config, twin.model.quantization.but(None, runtime, None))
        sampled.append(model.sample_actions("cpu", seen, noise=noise, num_steps=5) - noise)
    assert relative_error(*sampled) < bound


@RUNTIMES
def test_the_same_seed_draws_the_same_noise_as_openpi(stock: Stock, hosts: Any, example: Example, runtime: str) -> None:
    policy = stock("pi05_libero_duquant", hosts.converted / "pi05", runtime=runtime)
    torch.manual_seed(11)
    noise = torch.normal(mean=0.0, std=1.0, size=(1, 10, 32), dtype=torch.float32)  # PI0Pytorch.sample_noise
    expected = actions(policy, example("libero"), noise[0].numpy())
    torch.manual_seed(11)
    first = policy.infer(example("libero"))["actions"]
    second = policy.infer(example("libero"))["actions"]
    np.testing.assert_array_equal(first, expected.numpy())
    assert not np.array_equal(first, second)


@RUNTIMES
def test_sampling_arguments_and_the_default_prompt_arrive(
    plugin: types.ModuleType, hosts: Any, example: Example, runtime: str
) -> None:
    arguments = {"runtime": runtime, "sample_kwargs": {"num_steps": 2}, "default_prompt": "do something"}
    twin, folder = plugin.get_config("pi05_libero_duquant"), hosts.converted / "pi05"
    policy = plugin.create_trained_policy(twin, folder, **arguments)
    observation = example("libero")
    expected = actions(policy, observation)
    del observation["prompt"]
    assert torch.equal(actions(policy, observation), expected)
    ten_steps = plugin.create_trained_policy(twin, str(folder), runtime=runtime, default_prompt="do something")
    assert not torch.equal(actions(ten_steps, observation), expected)


def test_policies_of_one_config_keep_their_own_metadata(stock: Stock, plugin: types.ModuleType, hosts: Any) -> None:
    twin = plugin.get_config("pi0_aloha_sim_duquant")
    first = stock(twin.name, hosts.converted / "pi0")
    changed = dict(first.metadata)
    plugin.create_trained_policy(twin, hosts.converted / "pi0", runtime="module")
    assert first.metadata == changed
    assert stock(twin.name, hosts.converted / "pi0").metadata is not first.metadata
    aloha = plugin.get_config("pi0_aloha_duquant")
    assert (
        aloha.policy_metadata
        == plugin.get_config("pi0_aloha").policy_metadata
        == {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
    )


def test_what_the_host_says_of_its_own_comes_through_beside_ours(
    plugin: types.ModuleType, hosts: Any, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(hosts.converted / "pi0", tmp_path / "pi0")
    shutil.copytree(folder / "assets/lerobot/aloha_sim_transfer_cube_human", folder / "assets/trossen")
    policy = plugin.create_trained_policy(plugin.get_config("pi0_aloha"), folder)
    assert policy.metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    assert policy.metadata["duquant"]["layers"] == LAYERS


@pytest.mark.filterwarnings("default")  # of torch's compiler, about itself
def test_a_compiled_module_gives_the_same_actions(
    plugin: types.ModuleType, stock: Stock, hosts: Any, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real = torch.compile

    def compile_eagerly(function: Any, *, mode: str) -> Any:
        modes.append(mode)
        return real(function, backend="eager")  # traced and run without a code generator

    twin = plugin.register("pi05_libero", runtime="module")
    model = dataclasses.replace(twin.model, pytorch_compile_mode="reduce-overhead")
    folder = hosts.converted / "pi05"
    expected = actions(stock(twin.name, folder), example("libero"))
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    quantization = dataclasses.replace(model.quantization.environment, compile=True)
    model = dataclasses.replace(model, quantization=dataclasses.replace(model.quantization, environment=quantization))
    policy = plugin.create_trained_policy(dataclasses.replace(twin, model=model), folder)
    assert modes == ["reduce-overhead"]
    assert relative_error(actions(policy, example("libero")), expected) < 1e-3
