"""Mean error of layer outputs on held-out inputs, W4A8, by method; `pytest -rP` prints the tables.

Every layer is fed what the original feeds it. The methods of others are written out here, from the papers.
"""

from collections.abc import Callable
import copy
import dataclasses
import statistics

import pytest
import structured
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import fitting
from openpi_duquant import quant
from openpi_duquant.accuracy import layer_errors
from openpi_duquant.accuracy import relative_error
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.linear import quantize_
from openpi_duquant.transforms import rotate

DEFAULT = DuQuantConfig(include=r"_proj$")
PLAIN = dataclasses.replace(DEFAULT, permute=False, rotation="none")
OURS: dict[str, tuple[DuQuantConfig, bool]] = {
    "rtn, largest": (dataclasses.replace(PLAIN, scale_search="max"), False),
    "rtn": (PLAIN, False),
    "duquant, by weights": (dataclasses.replace(DEFAULT, rotation="duquant"), False),
    "default": (DEFAULT, False),
    "gptq, not rotated": (PLAIN, True),
    "default, calibrated": (DEFAULT, True),
}
"""Configurations of ours, and whether they are calibrated."""

Prepared = tuple[Tensor, Tensor, Tensor]
"""A weight, calibration inputs and held-out inputs, all transformed."""


def zigzag_hadamard(weight: Tensor, x: Tensor, held_out: Tensor) -> Prepared:
    order = fitting.zigzag_permutation(weight.double().square().sum(0), 64)
    weight, x, held_out = (rotate(part[:, order], 64) for part in (weight, x, held_out))
    return weight, x, held_out


def released_duquant(weight: Tensor, x: Tensor, held_out: Tensor) -> Prepared:
    """SmoothQuant, then rotate - zigzag - rotate by 128; one greedy rotation, of the activations, for all blocks."""
    smooth = x.abs().amax(0).clamp(min=1e-5) ** 0.5 / weight.abs().amax(0).clamp(min=1e-5) ** 0.5
    parts = weight * smooth, x / smooth, held_out / smooth
    for last in (False, True):
        shared = fitting.greedy_rotation(parts[1].reshape(-1, 128), 128).float()
        rotation = shared.expand(weight.shape[1] // 128, -1, -1)
        parts = tuple(rotate(part, rotation) for part in parts)
        if not last:
            order = fitting.zigzag_permutation(parts[1].abs().amax(0), 128)
            parts = tuple(part[:, order] for part in parts)
    return parts


def nearest(weight: Tensor, _: Tensor) -> Tensor:
    scale = quant.weight_scale(weight, 4)
    return quant.dequantize_weight(quant.quantize_weight(weight, scale, 4), scale)


def textbook_gptq(weight: Tensor, x: Tensor) -> Tensor:
    """Algorithm 1 of Frantar et al. 2022: channels as they come, dampened by 1% of the mean energy."""
    scale = quant.weight_scale(weight, 4).double()
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, quantized = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for k in range(weight.shape[1]):
        quantized[:, k : k + 1] = (left[:, k : k + 1] / scale).round().clamp(-8, 7) * scale
        left = left - (left - quantized)[:, k : k + 1] / factor[k, k] * factor[k]
    return quantized.float()


OTHERS: dict[str, tuple[Callable[..., Prepared], Callable[[Tensor, Tensor], Tensor]]] = {
    "duquant, as released": (released_duquant, nearest),
    "textbook gptq": (zigzag_hadamard, textbook_gptq),
}
"""A transform and a rounding."""

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
    errors: dict[str, list[float]] = {name: [] for name in OTHERS}
    for prefix, group in ((prefix, group) for prefix, _ in model.named_children() for group in GROUPS):
        weights = [model.get_submodule(f"{prefix}.{part}").weight.detach() for part in group]
        stacked, lead = torch.cat(weights), f"{prefix}.{group[0]}"
        expected = after[lead] @ stacked.T
        for name, (transform, rounding) in OTHERS.items():
            weight, x, x_after = transform(stacked, before[lead], after[lead])
            actual = quant.fake_quantize_activation(x_after) @ rounding(weight, x).T
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
    assert ours < of_rtn * errors["rtn"]
    assert ours < of_duquant * errors["duquant, as released"]
    assert ours < 0.97 * errors["textbook gptq"]
    assert ours < 0.7 * errors["gptq, not rotated"]
    assert uncalibrated < 0.86 * errors["rtn"]
    assert uncalibrated < 0.7 * errors["rtn, largest"]
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
