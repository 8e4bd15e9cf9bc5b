"""Errors of layers, against the same errors worked out on recorded inputs."""

import copy

import pytest
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import DuQuantConfig
from openpi_duquant import quantize_
from openpi_duquant.accuracy import LayerErrors
from openpi_duquant.accuracy import layer_errors
from openpi_duquant.accuracy import quantized_layers
from openpi_duquant.accuracy import sqnr_db
from openpi_duquant.quant import quantize_activation


class Model(nn.Module):
    """Calls its second layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 64]."""
        return self.o_proj(self.o_proj(self.q_proj(x)) + x)


def norm_ratio(error: Tensor, of: Tensor) -> float:
    return (error.double().norm() / of.double().norm()).item()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("rotation", ["none", "hadamard", "svd", "duquant"])
def test_errors_by_call_and_of_activations_alone(model: Model, rotation: str) -> None:
    quantized = copy.deepcopy(model)
    quantize_(quantized, DuQuantConfig(rotation=rotation, rotation_block=16), backend="fake")
    runs = [torch.randn(2, 5, 64) * (1 + 9 * (torch.arange(64) == 7)) for _ in range(3)]
    with LayerErrors(model, quantized_layers(quantized), activations=True) as errors:
        for x in runs:
            errors.run(lambda model, x=x: model(x))
    seen: list[Tensor] = []
    model.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        for x in runs:
            model(x)
        layer = quantized.o_proj
        first, second = torch.cat(seen[0::2]), torch.cat(seen[1::2])
        for call, x in enumerate((first, second)):
            expected = norm_ratio(layer(x) - model.o_proj(x), model.o_proj(x))
            assert errors.by_call("o_proj")[call] == pytest.approx(expected, rel=1e-4)
        x = torch.cat((first, second)).flatten(0, 1)
        assert errors.of("o_proj") == pytest.approx(norm_ratio(layer(x) - model.o_proj(x), model.o_proj(x)), rel=1e-4)
        transformed, weight = layer.transform.apply(x), layer.transform.dual().apply(model.o_proj.weight)
        codes, scale = quantize_activation(transformed)
        rounding = codes.float() * scale - transformed
        outputs, inputs = errors.of_activations("o_proj")
        assert inputs == pytest.approx(norm_ratio(rounding, transformed), rel=1e-3)
        assert outputs == pytest.approx(norm_ratio(rounding @ weight.T, model.o_proj(x)), rel=1e-2)
    assert errors.names == ["q_proj", "o_proj"]
    assert layer_errors(model, quantized, lambda model: [model(x) for x in runs]) == pytest.approx(
        {name: errors.of(name) for name in errors.names}
    )


def test_a_model_is_left_as_it_was(model: Model) -> None:
    quantized = copy.deepcopy(model)
    quantize_(quantized, DuQuantConfig(rotation_block=16), backend="fake")
    with LayerErrors(model, quantized_layers(quantized)):
        assert model.q_proj._forward_hooks
    assert not model.q_proj._forward_hooks


def test_16_bit_activations_have_no_error_of_their_own(model: Model) -> None:
    quantized = copy.deepcopy(model)
    quantize_(quantized, DuQuantConfig(rotation_block=16, activation_bits=16), backend="fake")
    with LayerErrors(model, quantized_layers(quantized), activations=True) as errors:
        errors.run(lambda model: model(torch.randn(3, 64)))
    assert errors.of_activations("q_proj") == (0, 0)
    assert errors.of("q_proj") > 0.01


def test_decibels() -> None:
    assert sqnr_db(0.1) == pytest.approx(20)
    assert sqnr_db(0.5) == pytest.approx(6.0206, rel=1e-4)
    assert sqnr_db(0) == float("inf")
