"""Mean error of layer outputs on held-out inputs, W4A8, by method; `pytest -rP` prints the tables.

Every layer is fed what the original feeds it.
"""

import copy
import dataclasses
import statistics

import pytest
import structured
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import quant
from openpi_duquant.accuracy import layer_errors
from openpi_duquant.accuracy import relative_error
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.linear import quantize_
from openpi_duquant.published import PUBLISHED

DEFAULT = DuQuantConfig(include=r"_proj$")
PLAIN = dataclasses.replace(DEFAULT, permute=False, rotation="none")
OURS: dict[str, tuple[DuQuantConfig, bool]] = {
    "duquant, by weights": (dataclasses.replace(DEFAULT, rotation="duquant"), False),
    "default": (DEFAULT, False),
    "gptq, not rotated": (PLAIN, True),
    "default, calibrated": (DEFAULT, True),
}
"""Configurations of ours, and whether they are calibrated."""

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def layer_inputs(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Inputs [rows, K] of every linear layer."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: found.setdefault(name, []).append(x[0].flatten(0, 1))
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def errors_of_others(model: nn.Module, batches: list[Tensor], held_out: list[Tensor]) -> dict[str, float]:
    before, after = layer_inputs(copy.deepcopy(model), batches), layer_inputs(copy.deepcopy(model), held_out)
    errors: dict[str, list[float]] = {name: [] for name in PUBLISHED}
    for prefix, group in ((prefix, group) for prefix, _ in model.named_children() for group in GROUPS):
        weights = [model.get_submodule(f"{prefix}.{part}").weight.detach() for part in group]
        stacked, lead = torch.cat(weights), f"{prefix}.{group[0]}"
        expected = after[lead] @ stacked.T
        for name, method in PUBLISHED.items():
            actual = method(stacked, before[lead])(after[lead])
            sizes = [len(weight) for weight in weights]
            errors[name] += map(relative_error, actual.split(sizes, 1), expected.split(sizes, 1))
    return {name: sum(found) / len(found) for name, found in errors.items()}


def mean_errors(seed: int, decay: float) -> dict[str, float]:
    """Mean relative error of the layers' outputs, by method."""
    model = structured.structured_model(seed, layers=1)
    inputs = structured.structured_inputs(seed, 80, decay)
    batches, held_out = inputs[:64], inputs[64:]
    errors = errors_of_others(model, batches, held_out)
    for name, (config, calibrated) in OURS.items():
        quantized = copy.deepcopy(model)
        quantize_(quantized, config, backend="fake", calibration=batches if calibrated else None)
        by_layer = layer_errors(model, quantized, lambda model: [model(x) for x in held_out])
        errors[name] = sum(by_layer.values()) / len(by_layer)
    for name, error in sorted(errors.items(), key=lambda pair: -pair[1]):
        print(f"{name:24}{error:.4f}{error / errors['rtn']:8.3f}")  # noqa: T201
    return errors


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("decay", "of_rtn", "of_duquant"),
    [(1.0, 0.35, 0.58), (1.5, 0.24, 0.38), (2.0, 0.16, 0.26)],
    ids=["decay 1", "decay 1.5", "decay 2"],
)
def test_errors_by_method(decay: float, of_rtn: float, of_duquant: float, seed: int) -> None:
    errors = mean_errors(seed, decay)
    ours, uncalibrated = errors["default, calibrated"], errors["default"]
    assert ours < of_rtn * errors["simple"]
    assert ours < of_duquant * errors["duquant, as released"]
    assert ours < 0.97 * errors["textbook gptq"]
    assert ours < 0.7 * errors["gptq, not rotated"]
    assert uncalibrated < 0.86 * errors["simple"]
    assert uncalibrated < 0.7 * errors["rtn"]
    assert uncalibrated < 1.05 * errors["duquant, by weights"]


@pytest.mark.parametrize("seed", range(2))
def test_activations_err_as_gaussian_ones_do(seed: int) -> None:
    model, batches = structured.structured_model(seed, layers=1), structured.structured_inputs(seed, 16, 1.0)
    inputs = layer_inputs(copy.deepcopy(model), batches)
    quantize_(model, DEFAULT, backend="fake")
    ratios: dict[str, list[float]] = {"as they are": [], "transformed": []}
    for name, x in inputs.items():
        for kind, given in (("as they are", x), ("transformed", model.get_submodule(name).transform.apply(x))):
            error = relative_error(quant.fake_quantize_activation(given), given)
            ratios[kind].append(error / quant.gaussian_int8_error(x.shape[1]))
    medians = {kind: statistics.median(found) for kind, found in ratios.items()}
    print(medians)  # noqa: T201
    assert medians["as they are"] > 2
    assert medians["transformed"] < 1.1
