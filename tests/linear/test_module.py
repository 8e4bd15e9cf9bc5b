"""QuantLinear against a layer computed in fp64, and as a citizen of torch: casts, state_dict, meta, compile."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import kernels
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import apply_linear
from openpi_duquant.linear import shared_forward

K, N = 48, 24
NOTHING = {"rotation": "none", "rotation_block": 0, "output_rotation": "none", "output_rotation_block": 0}
BITS = {"weight_bits": 4, "activation_bits": 8, "group_size": None}
PLAIN = LayerSpec(K, N, bias=True, permute=False, pre_rotation=False, group="a", **BITS, **NOTHING)
HADAMARD = {"rotation": "hadamard", "rotation_block": 16}
MATRICES = {"permute": True, "rotation": "matrix", "output_rotation": "matrix", "output_rotation_block": 8}
CHANGES = {
    "plain": {},
    "no bias": {"bias": False},
    "W8": {"weight_bits": 8},
    "A16": {"activation_bits": 16, "permute": True, **HADAMARD},
    "groups": {"group_size": 16},
    "default": {"permute": True, **HADAMARD},
    "hadamards": {**HADAMARD, "output_rotation": "hadamard", "output_rotation_block": 4},
    "svd, restored": {"rotation_block": 16, **MATRICES},
    "folded": {"output_rotation": "folded", "output_rotation_block": 8},
    "everything": {"weight_bits": 8, "group_size": 8, "pre_rotation": True, "rotation_block": 4, **MATRICES},
}
SPECS = {name: dataclasses.replace(PLAIN, **changes) for name, changes in CHANGES.items()}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def hadamard(size: int) -> Tensor:
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) * size**-0.5


def filled(spec: LayerSpec, backend: str = "auto", dtype: torch.dtype = torch.float32) -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear(spec, backend=backend, dtype=dtype)
    for name, buffer in layer.named_buffers():
        if name == "permutation":
            buffer.copy_(torch.randperm(K))
        elif name == "weight_packed":
            buffer.copy_(torch.randint(256, buffer.shape, dtype=torch.uint8).view(buffer.dtype))
        else:
            buffer.copy_(torch.rand(buffer.shape) - (0 if name == "weight_scale" else 0.5))
    return layer


def wide(kind: str, block: int, matrices: Tensor | None, width: int) -> Tensor:
    if kind in ("none", "folded"):
        return torch.eye(width, dtype=torch.float64)
    return torch.block_diag(*([hadamard(block)] * (width // block) if kind == "hadamard" else matrices.double()))


def in_fp64(layer: QuantLinear, x: Tensor) -> Tensor:
    """The layer by its definition; fails where an activation is too near a tie to tell its code."""
    spec = layer.spec
    x = x.double() @ (torch.block_diag(*layer.pre_rotation.double()) if spec.pre_rotation else torch.eye(K).double())
    if spec.permute:
        x = torch.stack([x[..., channel] for channel in layer.permutation.tolist()], dim=-1)
    x = x @ wide(spec.rotation, spec.rotation_block, layer.rotation, K)
    if spec.activation_bits == 8:
        scale = x.abs().amax(-1, keepdim=True) / 127
        assert ((x / scale).frac().abs() - 0.5).abs().min() > 1e-5
        x = (x / scale).round() * scale
    codes = layer.weight_packed.tolist()
    if spec.weight_bits == 4:
        codes = [[(nibble ^ 8) - 8 for byte in row for nibble in (byte & 15, byte >> 4)] for row in codes]
    scales = layer.weight_scale.double().repeat_interleave(spec.group_size or K, dim=1)
    y = x @ (torch.tensor(codes, dtype=torch.float64) * scales).T
    y = y @ wide(spec.output_rotation, spec.output_rotation_block, layer.output_rotation, N)
    return y + layer.bias.double() if spec.bias else y


@pytest.mark.parametrize("backend", ["reference", "fake"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1, 3)])
@every_spec
def test_a_layer_is_its_definition(spec: LayerSpec, shape: tuple[int, ...], backend: str) -> None:
    layer, x = filled(spec, backend), torch.randn(*shape, K)
    y, expected = layer(x), in_fp64(layer, x)
    assert (y.dtype, y.shape) == (torch.float32, (*shape, N))
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6 * expected.abs().amax().item())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
@every_spec
def test_no_tokens_give_no_outputs(spec: LayerSpec, shape: tuple[int, ...]) -> None:
    assert filled(spec)(torch.zeros(*shape, K)).shape == (*shape, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_spec
def test_a_half_input_is_computed_in_fp32_and_rounded_at_the_end(spec: LayerSpec, dtype: torch.dtype) -> None:
    layer, x = filled(spec), torch.randn(3, K).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))


@every_spec
def test_a_cast_changes_what_weight_answers_and_no_tensor(spec: LayerSpec) -> None:
    host = nn.Sequential(filled(spec))
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        host.to(dtype)
        assert (host[0].weight.dtype, host[0].weight.shape) == (dtype, (N, K))
        assert (host[0].in_features, host[0].out_features) == (K, N)
        after = host.state_dict()
        assert list(after) == list(before)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)


def test_tensors_are_those_of_the_contract() -> None:
    layer = filled(SPECS["svd, restored"], dtype=torch.bfloat16)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()} == {
        "weight_packed": (torch.uint8, (N, K // 2)),
        "weight_scale": (torch.float32, (N, 1)),
        "permutation": (torch.int64, (K,)),
        "rotation": (torch.bfloat16, (K // 16, 16, 16)),
        "output_rotation": (torch.bfloat16, (N // 8, 8, 8)),
        "bias": (torch.bfloat16, (N,)),
    }
    bare = QuantLinear(dataclasses.replace(PLAIN, bias=False, weight_bits=8, group_size=16)).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in bare.items()} == {
        "weight_packed": (torch.int8, (N, K)),
        "weight_scale": (torch.float32, (N, 3)),
    }
    assert set(QuantLinear(SPECS["default"]).state_dict()) == {"weight_packed", "weight_scale", "permutation", "bias"}


@pytest.mark.parametrize("assign", [False, True])
@every_spec
def test_a_state_dict_restores_the_layer(spec: LayerSpec, *, assign: bool) -> None:
    layer, x = filled(spec), torch.randn(4, K)
    other = QuantLinear(spec, device="meta" if assign else "cpu")
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(other(x), layer(x))


def test_a_meta_layer_becomes_real_by_to_empty() -> None:
    layer, x = filled(SPECS["svd, restored"], dtype=torch.bfloat16), torch.randn(4, K)
    other = QuantLinear(layer.spec, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    assert other.weight.dtype == torch.bfloat16
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_copies_compute_alike() -> None:
    layer, x = filled(SPECS["everything"]), torch.randn(4, K)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch.compile's own
def test_compiled_equals_eager() -> None:
    layers = [filled(SPECS[name]) for name in ("default", "everything", "A16")]
    for layer in layers:
        layer.prepare()

    def host(x: Tensor) -> list[Tensor]:
        return [layer(x.to(layer.weight.dtype) * 2) + 1 for layer in layers]

    x = torch.randn(2, 3, K)
    for compiled, eager in zip(torch.compile(host, fullgraph=True)(x), host(x), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5 * eager.abs().max().item())


def test_the_backend_named_runs_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, name in enumerate(("reference", "fake")):
        constant = kernels.Backend(lambda *_, value=value: torch.full((2, N), value))
        monkeypatch.setitem(kernels.BACKENDS, name, constant)
        assert (filled(PLAIN, name)(torch.ones(2, K)) == value).all()
    with pytest.raises(DuQuantError, match="'cutlass'"):
        QuantLinear(PLAIN, backend="cutlass")


@every_spec
def test_a_layer_only_rounds_if_it_neither_permutes_nor_rotates(
    spec: LayerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not filled(spec, "reference").only_rounds  # by its definition, not by a kernel
    fused = dataclasses.replace(kernels.BACKENDS["reference"], fused=True)
    monkeypatch.setitem(kernels.BACKENDS, "reference", fused)
    untouched = (spec.permute, spec.pre_rotation, spec.rotation) == (False, False, "none")
    assert filled(spec, "reference").only_rounds == (untouched and spec.activation_bits == 8)


@every_spec
@pytest.mark.parametrize("backend", ["reference", "fake"])
def test_geglu_is_the_next_layers_wherever_it_is_computed(spec: LayerSpec, backend: str) -> None:
    layer = filled(spec, backend)
    x = torch.randn(2, 3, K).bfloat16()
    expected = Prologue(geglu=True).apply(layer(x))
    assert expected.shape == (2, 3, N // 2)
    assert torch.equal(apply_linear(layer, x, epilogue=Epilogue(geglu=True)), expected)
    restored = spec.output_rotation not in ("none", "folded")
    assert layer.fuses_geglu == (backend == "reference" and not restored)


def test_shared_forward_equals_calls_and_quantizes_once_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    first = filled(SPECS["default"])
    second = filled(dataclasses.replace(first.spec, weight_bits=8))
    second.permutation = first.permutation
    apart = filled(dataclasses.replace(PLAIN, group="b"))
    layers = [first, nn.Linear(K, 5), second, apart, first]
    x = torch.randn(2, 3, K)
    expected = [layer(x) for layer in layers]
    calls = []
    original = QuantLinear.quantize_input
    monkeypatch.setattr(QuantLinear, "quantize_input", lambda self, *args: calls.append(self) or original(self, *args))
    outputs = shared_forward(layers, x)
    assert calls == [first, apart]
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("backend", ["reference", "fake"])
@every_spec
def test_autocast_does_not_reach_the_arithmetic(spec: LayerSpec, backend: str) -> None:
    layer, x = filled(spec, backend), torch.randn(5, K)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("backend", ["reference", "fake"])
@every_spec
def test_reduced_precision_matmuls_do_not_reach_the_arithmetic(spec: LayerSpec, backend: str) -> None:
    layer, x = filled(spec, backend), torch.randn(5, K)
    expected = layer(x)
    torch.set_float32_matmul_precision("medium")
    try:
        actual = layer(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(actual, expected)
