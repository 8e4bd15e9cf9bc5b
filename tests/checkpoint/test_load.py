"""From a folder to a policy: what is damaged or contradicts its manifest is refused, what loads is what was written."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from openpi_duquant import PRESETS
from openpi_duquant import DuQuantError
from openpi_duquant import Manifest
from openpi_duquant import Policy
from openpi_duquant import QuantLinear
from openpi_duquant import convert
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import MANIFEST_NAME

EXPERT = "paligemma_with_expert.gemma_expert.model.layers.0."
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model.layers.0."
FLOAT_LINEAR = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture
def folder(converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of `optimized`, which has tensors of every kind."""
    return shutil.copytree(converted("optimized"), tmp_path / "optimized")


def refusal(folder: pathlib.Path) -> str:
    """What loading the folder says; an error when it loads."""
    with pytest.raises(DuQuantError) as caught:
        load_policy(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_among_the_weights_is_refused(folder: pathlib.Path, share: float, bit: int) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin + round(share * (len(content) - 1 - begin))] ^= bit
    path.write_bytes(content)
    assert "sha256" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (EXPERT + "mlp.up_proj.weight_packed", None),
        (EXPERT + "mlp.gate_proj.permutation", None),
        (EXPERT + "mlp.up_proj.output_rotation", None),
        (FLOAT_LINEAR, None),
        (EXPERT + "mlp.up_proj.permutation", lambda _: torch.arange(64)),
        (EXPERT + "mlp.up_proj.weight", lambda _: torch.zeros(256, 64)),
        ("unknown", lambda _: torch.zeros(1)),
        (EXPERT + "mlp.up_proj.weight_packed", lambda old: old.T.contiguous()),
        (EXPERT + "mlp.up_proj.weight_packed", lambda old: old.view(torch.int8)),
        (EXPERT + "mlp.up_proj.weight_scale", lambda old: old.bfloat16()),
        (EXPERT + "mlp.up_proj.weight_scale", lambda old: old.flatten()),
        (FLOAT_LINEAR, lambda old: old.float()),
        (FLOAT_LINEAR, lambda old: old[1:].contiguous()),
    ],
)
def test_a_tensor_that_is_missing_foreign_or_of_another_type_is_refused_by_name(
    folder: pathlib.Path, name: str, change: Callable[[Tensor | None], Tensor] | None
) -> None:
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(name, None)
    if change:
        tensors[name] = change(old)
    save_file(tensors, folder / "model.safetensors")
    assert name in refusal(folder)


def test_a_file_cut_short_or_gone_is_refused(folder: pathlib.Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors: not a readable" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(folder)


def test_a_converted_folder_that_lost_its_manifest_is_refused(folder: pathlib.Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    assert EXPERT in refusal(folder)


def test_the_manifest_of_another_checkpoint_is_refused(
    folder: pathlib.Path, tmp_path: pathlib.Path, tiny: Architecture, converted: Callable[[str], pathlib.Path]
) -> None:
    synthetic.make_checkpoint(tmp_path / "sibling", tiny, seed=99)
    convert(tmp_path / "sibling", tmp_path / "other", PRESETS["optimized"])
    shutil.copy(tmp_path / "other" / MANIFEST_NAME, folder)
    assert "sha256" in refusal(folder)
    shutil.copy(converted("simple") / MANIFEST_NAME, folder)
    refusal(folder)


@pytest.mark.parametrize("count", [0, 13, 15])
def test_another_number_of_layers_than_was_counted_is_refused(folder: pathlib.Path, count: int) -> None:
    manifest = Manifest.load(folder)
    dataclasses.replace(manifest, counts=manifest.counts | {"layers": count}).save(folder)
    assert f"holds 14 quantized layers, its manifest says {count}" in refusal(folder)


@pytest.mark.parametrize(
    ("preset", "layer", "change"),
    [
        ("default", "self_attn.q_proj", {"rotation_block": 32}),
        ("default", "self_attn.q_proj", {"rotation": "none", "rotation_block": 0}),
        ("default", "mlp.down_proj", {"activation_bits": 16}),
        ("simple", "mlp.down_proj", {"rotation": "hadamard", "rotation_block": 64}),
        ("simple", "mlp.up_proj", {"group": EXPERT + "self_attn.q_proj"}),
        ("optimized", "mlp.up_proj", {"output_rotation": "hadamard"}),
    ],
)
def test_a_record_that_would_run_another_layer_than_was_converted_is_refused(
    converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, preset: str, layer: str, change: dict[str, Any]
) -> None:
    folder = shutil.copytree(converted(preset), tmp_path / preset)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["layers"][EXPERT + layer] |= change
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    refusal(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_original_checkpoint_loads_as_it_is(source: pathlib.Path, dtype: torch.dtype) -> None:
    tensors = load_file(source / "model.safetensors")
    state = load_policy(source, dtype=dtype, optimize=False).state_dict()
    assert set(state) < set(tensors)
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), tensors[name].float()), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match=r"^device cuda: 0 CUDA devices are visible here"):
        load_policy(tmp_path, device="cuda")


def in_float32(name: str) -> bool:
    """The names that openpi's `to_bfloat16_for_selected_params` keeps, and what it never casts: the heads."""
    kept = r"patch_embedding|position_embedding|input_layernorm|post_attention_layernorm|model\.norm"
    return not name.startswith("paligemma_with_expert.") or re.search(kept, name) is not None


@pytest.mark.parametrize("preset", [None, "default", "optimized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tensor_has_its_dtype_after_loading(
    source: pathlib.Path, converted: Callable[[str], pathlib.Path], preset: str | None, dtype: torch.dtype
) -> None:
    quantized = {
        "weight_packed": torch.uint8,
        "weight_scale": torch.float32,
        "permutation": torch.int64,
        "rotation": torch.bfloat16,
        "output_rotation": torch.bfloat16,
    }
    policy = load_policy(converted(preset) if preset else source, dtype=dtype, optimize=False)
    for name, tensor in policy.state_dict().items():
        last = name.rpartition(".")[2]
        assert tensor.dtype == quantized.get(last, torch.float32 if in_float32(name) else dtype), name
    layers = [layer for layer in policy.modules() if isinstance(layer, QuantLinear)]
    # 7 in each of 2 layers; of both Gemmas, without the unread q, o, gate, up, down of the language model's last one
    assert len(layers) == {None: 0, "default": 28 - 5, "optimized": 14}[preset]
    assert {layer.weight.dtype for layer in layers} <= {dtype}
    assert not any(tensor.is_meta for tensor in policy.state_dict().values())
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert not policy.training


def test_layers_of_a_group_hold_one_permutation_and_one_rotation(converted: Callable[[str], pathlib.Path]) -> None:
    policy = load_policy(converted("optimized"), optimize=False)
    for members in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        layers = [policy.get_submodule(EXPERT + member) for member in members]
        assert len({layer.permutation.data_ptr() for layer in layers}) == 1
        assert len({layer.rotation.data_ptr() for layer in layers}) == 1
        assert len({layer.output_rotation.data_ptr() for layer in layers}) == len(layers)


def actions(policy: Policy) -> Tensor:
    """What the policy does on one observation, in two steps."""
    observation, noise = synthetic.libero_like_observation(policy.architecture, seed=1)
    return policy.sample_actions(observation, noise, num_steps=2)


def test_a_backend_is_the_one_that_was_asked_for(converted: Callable[[str], pathlib.Path]) -> None:
    with pytest.raises(DuQuantError, match="no-such-backend"):
        load_policy(converted("default"), backend="no-such-backend")
    backends = ("auto", "reference", "fake")
    results = {name: actions(load_policy(converted("default"), backend=name, dtype=torch.float32)) for name in backends}
    assert torch.equal(results["auto"], results["reference"])
    # the same integers, summed in another order: what differs is fp32 rounding, and the rare code that it tips over
    assert torch.dist(results["fake"], results["reference"]) < 1e-2 * results["reference"].norm()


def test_a_policy_in_use_does_not_change_with_its_file(folder: pathlib.Path) -> None:
    policy = load_policy(folder, optimize=False)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(size // 2)
        file.write(b"\x55" * (size - size // 2))
    changed = [name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed
