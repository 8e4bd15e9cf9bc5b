"""The same on a CUDA device: exact accumulators, the engine's actions, conversion."""

import dataclasses
import pathlib
import statistics

import pytest
from tiny import TINY
import torch

from openpi_duquant import QuantLinear
from openpi_duquant import kernels
from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.calibration import Calibrator
from openpi_duquant.calibration import record_states
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.conversion import convert
from openpi_duquant.engine import Observation
from openpi_duquant.engine import load_policy
from openpi_duquant.kernels import Problem
from openpi_duquant.kernels import reference
from openpi_duquant.linear import quantize_
from openpi_duquant.recording import Example
from openpi_duquant.recording import Recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(observation: Observation) -> Observation:
    """The observation on the GPU."""
    return Observation(
        {name: image.cuda() for name, image in observation.images.items()},
        {name: mask.cuda() for name, mask in observation.image_masks.items()},
        observation.tokenized_prompt.cuda(),
        observation.tokenized_prompt_mask.cuda(),
        observation.state.cuda(),
    )


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 127])
def test_accumulators_are_exact(rows: int, bits: int, precision: str) -> None:
    codes = torch.randint(-127, 128, (rows, 16384), dtype=torch.int8)
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (65, 16384), dtype=torch.int8)
    codes[0], weight[0] = 127, -(2 ** (bits - 1))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)  # openpi sets "high"
    try:
        actual = reference.integer_matmul(codes.cuda(), weight.cuda()).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual.long(), codes.long() @ weight.long().T)


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
@pytest.mark.parametrize("preset", [None, "default", "optimized"])
def test_the_policy_gives_the_cpus_actions(tmp_path: pathlib.Path, preset: str | None, *, pi05: bool) -> None:
    architecture = dataclasses.replace(TINY, pi05=pi05)
    folder = tmp_path / "original"
    synthetic.make_checkpoint(folder, architecture)
    if preset:
        folder = tmp_path / "converted"
        convert(tmp_path / "original", folder, dataclasses.replace(PRESETS[preset], activation_bits=16))
    observation, noise = synthetic.libero_like_observation(architecture, prompt_tokens=6)
    expected = load_policy(folder, dtype=torch.float32).sample_actions(observation, noise)
    policy = load_policy(folder, dtype=torch.float32, device="cuda")
    actual = policy.sample_actions(on_gpu(observation), noise.cuda()).cpu()
    assert relative_error(actual - noise, expected - noise) < 1e-4
    moved = policy.cpu().sample_actions(observation, noise)
    assert relative_error(moved - noise, expected - noise) < 1e-5


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
@pytest.mark.parametrize("preset", PRESETS)
def test_triton_layers_are_the_definitions(tmp_path: pathlib.Path, preset: str, *, pi05: bool) -> None:
    architecture = dataclasses.replace(TINY, pi05=pi05)
    synthetic.make_checkpoint(tmp_path / "original", architecture)
    convert(tmp_path / "original", tmp_path / "converted", PRESETS[preset])
    observation, noise = synthetic.libero_like_observation(architecture, prompt_tokens=6)
    policies = {
        name: load_policy(tmp_path / "converted", backend=name, dtype=torch.float32, device="cuda")
        for name in ("triton", "reference")
    }
    for policy in policies.values():
        assert {module.running for module in policy.modules() if isinstance(module, QuantLinear)} <= set(policies)
    actual, expected = (policy.sample_actions(on_gpu(observation), noise.cuda()) for policy in policies.values())
    # An int8 code may differ: with 1e-5 more noise, a pi0 as small as this acts otherwise by as much as 2e-2.
    assert relative_error(actual.cpu() - noise, expected.cpu() - noise) < (1e-2 if pi05 else 6e-2)
    moved = policies["triton"].cpu().cuda().sample_actions(on_gpu(observation), noise.cuda())
    assert torch.equal(moved, actual)


@pytest.mark.parametrize("rotation", ["matrix", "hadamard"])
@pytest.mark.parametrize("block", [16, 64])
def test_a_large_restored_matmul_fits(rotation: str, block: int) -> None:
    problem = Problem(16384, 2048, 4, 8, 1, rotation, block, torch.bfloat16)
    codes = torch.randint(-127, 128, (968, 2048), dtype=torch.int8, device="cuda")
    weight = torch.randint(256, (16384, 1024), dtype=torch.uint8, device="cuda")
    scales = torch.rand(968, 1, device="cuda") + 0.5, torch.rand(16384, 1, device="cuda") + 0.5
    blocks = torch.linalg.qr(torch.randn(16384 // block, block, block, device="cuda"))[0].bfloat16().contiguous()
    restore = block if rotation == "hadamard" else blocks
    backend = kernels.BACKENDS["triton"]
    rest = scales[1], None, restore, torch.bfloat16
    actual = backend.matmul(codes, scales[0], backend.repack(problem, weight), *rest)
    expected = reference.matmul(codes, scales[0], weight, *rest[:-1], torch.float32)
    assert relative_error(actual, expected) < 4e-3


@pytest.mark.parametrize("rotation", ["hadamard", "svd", "duquant"])
def test_conversion_on_a_gpu_is_as_good(tmp_path: pathlib.Path, rotation: str) -> None:
    synthetic.make_checkpoint(tmp_path / "original", TINY)
    config = DuQuantConfig(rotation=rotation, rotation_block=16, row_rotation="restore", weight_bits=8)
    observation, noise = synthetic.libero_like_observation(TINY, prompt_tokens=6)
    expected = load_policy(tmp_path / "original", dtype=torch.float32).sample_actions(observation, noise)
    errors = []
    for device in ("cpu", "cuda"):
        convert(tmp_path / "original", tmp_path / device, config, device=device)
        actions = load_policy(tmp_path / device, dtype=torch.float32).sample_actions(observation, noise)
        errors.append(relative_error(actions - noise, expected - noise))
    assert errors[1] < 0.1
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
def test_calibration_on_a_gpu_is_as_good(tmp_path: pathlib.Path, *, pi05: bool) -> None:
    architecture = dataclasses.replace(TINY, pi05=pi05)
    synthetic.make_checkpoint(tmp_path / "original", architecture)
    made = [synthetic.libero_like_observation(architecture, seed=seed, prompt_tokens=6) for seed in range(6)]
    given = Recording([Example(*pair) for pair in made], {"num_steps": 3})  # of one shape: they run together
    config, means, leaving = DuQuantConfig(rotation_block=16), [], []
    for device in ("cpu", "cuda"):
        manifest = convert(tmp_path / "original", tmp_path / device, config, device=device, calibration=given)
        means.append(statistics.mean(manifest.calibration["errors"].values()))
        policy = load_policy(tmp_path / "original", dtype=torch.float32, device=device, optimize=False)
        schedule = policy.tabulated(given.num_steps)
        states = record_states(policy, given.examples, schedule)
        calibrator = Calibrator(architecture, config, {}, states, schedule, torch.float32)
        with SafetensorsReader(tmp_path / "original") as reader:
            weights = {name: reader[name].to(device) for name in reader}
        for index in range(architecture.expert.depth):
            calibrator.quantize(index, weights)
        leaving += [each.expert.cpu() for each in calibrator._stream._states]
    assert means[1] == pytest.approx(means[0], rel=0.1)  # in bf16 there, in fp32 here
    assert relative_error(leaving[1], leaving[0]) < 1e-3


@pytest.mark.parametrize("kind", ["hadamard", "svd"])
@pytest.mark.parametrize("backend", ["reference", "fake"])
def test_reduced_precision_matmuls_do_not_reach_a_layer(backend: str, kind: str) -> None:
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(512, 256)})
    quantize_(model, DuQuantConfig(rotation=kind, row_rotation="restore"), backend=backend)
    layer, x = model["q_proj"].cuda(), torch.randn(127, 512, device="cuda")
    expected = layer(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_float32_matmul_precision(before)
