"""A backend with a layout of its own, as on a GPU: chosen when the tensors are there, never seen from outside."""

from collections.abc import Callable, Iterable
import copy
import dataclasses
import pathlib

import pytest
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import DuQuantConfig
from openpi_duquant import kernels
from openpi_duquant import load_policy
from openpi_duquant import quantize_
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import Backend
from openpi_duquant.kernels import Problem
from openpi_duquant.kernels import reference
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import module
from openpi_duquant.linear import prepare_

K, N = 48, 24


class Mirrored:
    """A backend that keeps the rows of the weight in reverse, and what it was asked."""

    def __init__(self) -> None:
        self.loaded: list[set[Problem]] = []
        self.row_sums: list[Tensor | None] = []

    def backend(self) -> Backend:
        return Backend(
            self.matmul,
            load=self.load,
            repack=lambda _, weight: weight.flip(0),
            canonical=lambda _, weight: weight.flip(0),
        )

    def load(self, problems: Iterable[Problem], _: torch.device) -> None:
        self.loaded.append(set(problems))

    def matmul(self, a: Tensor, act_scale: Tensor | None, weight: Tensor, *operands: object) -> Tensor:
        *others, row_sum = operands
        self.row_sums.append(row_sum)
        if row_sum is not None:
            assert row_sum.dtype == torch.int32
            assert torch.equal(row_sum, a.to(torch.int32).sum(1, keepdim=True))
        return reference.matmul(a, act_scale, weight.flip(0), *others)


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> Mirrored:
    backend = Mirrored()
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", backend.backend())
    return backend


def quantized(backend: str, **changes: object) -> QuantLinear:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(K, N)})
    quantize_(model, dataclasses.replace(DuQuantConfig(rotation_block=16), **changes), backend=backend)
    return model["q_proj"]


@pytest.mark.parametrize("changes", [{}, {"weight_bits": 8}, {"activation_bits": 16}], ids=str)
def test_its_layout_is_not_seen_in_results_or_files(mirrored: Mirrored, changes: dict[str, object]) -> None:
    layer, usual, x = quantized("bitblas", **changes), quantized("reference", **changes), torch.randn(5, K)
    expected, state = usual(x), usual.state_dict()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight_packed, usual.weight_packed.flip(0))
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    wanted = "activation_bits" not in changes
    assert [row_sum is not None for row_sum in mirrored.row_sums] == [wanted]


@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_transform_runs_for_backends_that_want_it(monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> None:
    calls = []

    def fused_transform(*given: object) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(given)
        return reference.fused_transform(*given)

    monkeypatch.setattr(module, "fused_transform", fused_transform)
    monkeypatch.setitem(kernels.BACKENDS, "bitblas", Backend(reference.matmul, fused=fused))
    x = torch.randn(5, K)
    assert torch.equal(quantized("bitblas")(x), quantized("reference")(x))
    assert len(calls) == fused


def test_a_state_dict_may_come_before_and_after_the_first_use(mirrored: Mirrored) -> None:
    del mirrored
    layer, x = quantized("bitblas"), torch.randn(5, K)
    other = quantized("bitblas")
    other.weight_scale.zero_()
    for _ in range(2):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        other.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(other(x), layer(x))


def test_casts_and_copies_keep_the_weight(mirrored: Mirrored) -> None:
    del mirrored
    layer, x = quantized("bitblas"), torch.randn(5, K)
    expected, weight = layer(x), layer.state_dict()["weight_packed"].clone()
    twin = copy.deepcopy(layer)
    for dtype in (torch.bfloat16, torch.float32):
        twin.to(dtype)
        assert torch.equal(twin.state_dict()["weight_packed"], weight)
    assert torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)


def test_to_empty_and_load_is_as_good(mirrored: Mirrored) -> None:
    del mirrored
    layer, x = quantized("bitblas"), torch.randn(5, K)
    other = QuantLinear(layer.spec, backend="bitblas", device="meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_a_model_is_prepared_at_once(mirrored: Mirrored) -> None:
    model = nn.ModuleList([quantized("bitblas"), quantized("bitblas", weight_bits=8), quantized("reference")])
    prepare_(model)
    assert mirrored.loaded[0] == {model[0].spec.problem(torch.float32), model[1].spec.problem(torch.float32)}
    assert [layer.running for layer in model] == ["bitblas", "bitblas", "reference"]
    before = model[0].weight_packed.clone()
    prepare_(model)
    assert torch.equal(model[0].weight_packed, before)


def test_a_loaded_policy_is_prepared(mirrored: Mirrored, converted: Callable[[str], pathlib.Path]) -> None:
    policy = load_policy(converted("default"), backend="bitblas")
    layers = [module for module in policy.modules() if isinstance(module, QuantLinear)]
    assert {layer.running for layer in layers} == {"bitblas"}
    assert mirrored.loaded[0] == {layer.problem for layer in layers}
    seen = {
        name.split(".")[1]: layer.tokens for name, layer in policy.named_modules() if isinstance(layer, QuantLinear)
    }
    assert seen == {"paligemma": ((544, 1), (968, 1)), "gemma_expert": ((10, 10), (50, 10))}


def test_a_backend_that_cannot_run_here_stops_the_load(converted: Callable[[str], pathlib.Path]) -> None:
    with pytest.raises(DuQuantError, match=r"bitblas cannot run: .*CUDA device, not cpu"):
        load_policy(converted("default"), backend="bitblas")


def test_it_stops_at_the_first_use_and_can_be_saved() -> None:
    layer = quantized("bitblas")
    with pytest.raises(DuQuantError, match="bitblas cannot run"):
        layer(torch.randn(1, K))
    assert torch.equal(layer.state_dict()["weight_packed"], quantized("reference").weight_packed)


def test_a_copy_that_finds_no_kernels_loads_them(mirrored: Mirrored) -> None:
    layer = quantized("bitblas")
    layer.prepare()
    mirrored.loaded.clear()
    copy.deepcopy(layer)
    assert mirrored.loaded == [{layer.spec.problem(torch.float32)}]
