"""Conversion, against the same steps done by hand, and against what the files themselves say."""

from collections.abc import Callable, Iterable
import functools
import json
import math
import pathlib
import random
import re
from typing import Any

from by_hand import EXPERT
from by_hand import GROUPS
from by_hand import LANGUAGE
from by_hand import Array
from by_hand import arrays
from by_hand import decoded
from by_hand import folded
from by_hand import rounded
from by_hand import transformed
import numpy as np
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from openpi_duquant import PRESETS
from openpi_duquant import DuQuantConfig
from openpi_duquant import Policy
from openpi_duquant import convert
from openpi_duquant import load_policy
from openpi_duquant import synthetic

LM_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
IN_FLOAT32 = r"patch_embedding|position_embedding|input_layernorm|post_attention_layernorm|model\.norm"


def assert_nearest(codes: Array, scale: Array, weight: Array) -> None:
    """Each value is the nearest that the scale has, and the scale is no worse than the one that just does not clip."""
    values = codes * scale
    assert (abs(values - weight.clip(-8 * scale, 7 * scale)) <= scale * 0.5001).all()
    widest = abs(weight).max(1, keepdims=True) / 7
    unclipped = np.round(weight / widest) * widest
    assert (((values - weight) ** 2).sum(1) <= ((unclipped - weight) ** 2).sum(1) * 1.001).all()


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("bfloat16", "simple"),
        ("bfloat16", "default"),
        ("bfloat16", "optimized"),
        ("bfloat16", "full_llm_dit"),
        ("float32", "default"),
        ("pi0", "default"),
        ("pi0", "llm"),
    ],
)
def test_the_codes_stand_for_the_folded_permuted_and_rotated_weight(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, name: str, preset: str
) -> None:
    config = PRESETS[preset]
    convert(checkpoints / name, tmp_path / "converted", config)
    source, tensors = arrays(checkpoints / name), arrays(tmp_path / "converted")
    for prefix in (f"{model}layers.{index}." for model in (LANGUAGE, EXPERT) for index in (0, 1)):
        weights = folded(source, config, int(prefix[-2]))
        for members in (*GROUPS, ("self_attn.o_proj",), ("mlp.down_proj",)):
            layers = [prefix + member for member in members]
            if prefix.startswith(config.scope):
                assert not {layer + ".weight" for layer in layers} & tensors.keys()
                for layer, weight in transformed(tensors, weights, layers, config).items():
                    assert_nearest(*decoded(tensors, layer), weight)
            else:
                for layer in layers:
                    assert np.allclose(tensors[layer + ".weight"], weights[layer], rtol=2**-8, atol=1e-6)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert np.array_equal(tensors.get(f"{prefix}{norm}.weight"), weights.get(prefix + norm))


def header(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and offsets of every tensor, from the first bytes of the file."""
    content = (folder / "model.safetensors").read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


@pytest.mark.parametrize(("name", "precision"), [("bfloat16", "BF16"), ("float32", "F32")])
def test_float_tensors_keep_the_precision_that_openpi_computes_in(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, name: str, precision: str
) -> None:
    convert(checkpoints / name, tmp_path / "converted", PRESETS["simple"])
    before, after, kinds = arrays(checkpoints / name), arrays(tmp_path / "converted"), header(tmp_path / "converted")
    quantized = {t for t in before if t.startswith(EXPERT + "layers.") and t.endswith("_proj.weight")}
    assert len(quantized) == 14
    assert {t for t in after if t.endswith((".weight", ".bias"))} == set(before) - quantized - {LM_HEAD}
    for tensor in set(before) & set(after):
        in_float32 = not tensor.startswith("paligemma") or re.search(IN_FLOAT32, tensor)
        assert kinds[tensor]["dtype"] == (precision if in_float32 else "BF16"), tensor
        assert np.array_equal(after[tensor], before[tensor] if in_float32 else rounded(before[tensor])), tensor


def contents(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_source_is_left_as_it_was_and_what_is_no_weight_is_copied(
    own_source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before, done = contents(own_source), []
    convert(own_source, tmp_path / "target", PRESETS["default"], progress=done.append)
    assert contents(own_source) == before
    copied = {name: content for name, (content, _) in contents(tmp_path / "target").items()}
    assert copied.keys() == before.keys() | {"duquant.json"}
    assert all(copied[name] == before[name][0] for name in before if name != "model.safetensors")
    assert "assets/physical-intelligence/libero/norm_stats.json" in copied
    assert sum(done) == sum(len(bytes_of(entry)) for entry in header(own_source).values())


def bytes_of(entry: dict[str, Any]) -> range:
    """Where a tensor's bytes lie."""
    return range(*entry["data_offsets"])


def test_the_manifest_counts_what_the_file_holds(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    manifest = convert(source, tmp_path / "target", PRESETS["default"])
    before, after = header(source), header(tmp_path / "target")
    weights = [math.prod(entry["shape"]) for name, entry in before.items() if name not in {*after, LM_HEAD}]
    parts = ("weight_packed", "weight_scale", "permutation")
    assert manifest.counts == {
        "layers": len(weights),
        "quantized_parameters": sum(weights),
        "bytes": sum(len(bytes_of(entry)) for entry in after.values()),
        "quantized_bytes": sum(len(bytes_of(entry)) for name, entry in after.items() if name.endswith(parts)),
        "quantized_bytes_bf16": 2 * sum(weights),
    }
    assert len(weights) == 2 * 2 * 7
    assert manifest.float_dtypes.keys() == {name for name in after if not name.endswith(parts)}
    assert manifest.source["bytes"] == sum(len(bytes_of(entry)) for entry in before.values())


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_order_and_a_missing_lm_head_change_nothing(
    source: pathlib.Path, converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, shards: int
) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors[LM_HEAD]
    parts = tmp_path / "parts"
    parts.mkdir()
    files = {name: f"{random.Random(name).randrange(shards)}.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in reversed(tensors.items()) if files[name] == file}
        save_file(part, parts / ("model.safetensors" if shards == 1 else file))
    if shards > 1:
        (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    convert(parts, tmp_path / "target", PRESETS["optimized"])
    expected = (converted("optimized") / "model.safetensors").read_bytes()
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == expected


def actions(policy: Policy) -> Tensor:
    """What the policy does on one observation."""
    observation, noise = synthetic.libero_like_observation(policy.architecture, seed=1)
    return policy.sample_actions(observation, noise, num_steps=2).double()


def noisy(policy: Policy, layers: Iterable[str], config: DuQuantConfig, seed: int) -> Policy:
    """The policy with the noise of plain rounding, nothing transformed, on the weights and inputs of these layers."""
    generator = torch.Generator().manual_seed(seed)

    def noise(values: Tensor, bits: int) -> Tensor:
        step = values.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return values + step * (torch.rand(values.shape, generator=generator) - 0.5)

    modules = dict(policy.named_modules())
    for layer in (modules[name] for name in layers if name in modules):
        layer.weight.copy_(noise(layer.weight, config.weight_bits))
        layer.register_forward_pre_hook(lambda _, inputs: noise(inputs[0], config.activation_bits))
    return policy


@pytest.mark.parametrize("name", ["bfloat16", "pi0"])
@pytest.mark.parametrize(
    "config",
    [
        DuQuantConfig(),
        DuQuantConfig(group_size=64),
        DuQuantConfig(weight_bits=8),
        DuQuantConfig(weight_bits=8, activation_bits=16),
        DuQuantConfig(weight_bits=8, rotation="svd", rotation_block=16, row_rotation="restore"),
        DuQuantConfig(weight_bits=8, rotation="duquant", rotation_block=16, row_rotation="propagate"),
        DuQuantConfig(weight_bits=8, include_action_head=True),  # 32 wide: takes a smaller block
    ],
    ids=lambda config: f"{config.rotation}{config.rotation_block} W{config.weight_bits}A{config.activation_bits}",
)
def test_actions_err_no_more_than_twice_what_plain_rounding_does(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, name: str, config: DuQuantConfig
) -> None:
    manifest = convert(checkpoints / name, tmp_path / "target", config)
    load = functools.partial(load_policy, dtype=torch.float32, optimize=False)
    exact = actions(load(checkpoints / name))
    plain = [noisy(load(checkpoints / name), manifest.layers, config, seed) for seed in range(3)]
    bound = 2 * max(torch.dist(actions(policy), exact) for policy in plain)
    assert 0 < torch.dist(actions(load(tmp_path / "target")), exact) < bound
    assert manifest.config == config
