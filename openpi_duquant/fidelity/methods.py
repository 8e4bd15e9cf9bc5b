"""Published methods and ours at the same bits, layer by layer on what the original feeds its layers."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.accuracy import relative_error
from openpi_duquant.accuracy import sqnr_db
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.fidelity.layers import component
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import plan_layers
from openpi_duquant.linear import quantize_group
from openpi_duquant.linear.calibration import watched
from openpi_duquant.linear.quantize import members_by_group
from openpi_duquant.linear.rounding import InputMoment
from openpi_duquant.published import PUBLISHED
from openpi_duquant.published import Fitted

OURS = {"default, not calibrated": False, "default, calibrated": True}
METHODS = (*PUBLISHED, *OURS)


@dataclasses.dataclass
class Group:
    """Layers that read one input, and samples of it.

    Attributes:
        weights: [N, K] of every layer, as the original has them, by name.
        calibration: Inputs [rows, K] fp32 of every observation to calibrate on, on the CPU.
        held_out: The same of those to judge by.
    """

    weights: dict[str, Tensor]
    calibration: list[Tensor] = dataclasses.field(default_factory=list)
    held_out: list[Tensor] = dataclasses.field(default_factory=list)


def choose_groups(policy: nn.Module, count: int, widest: int) -> list[Group]:
    """Up to `count` groups of the layers that `default` quantizes, spread evenly over those with K <= `widest`."""
    linears = {name: module for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    specs = _specs({name: module.weight for name, module in linears.items()})
    groups = [names for names in members_by_group(specs).values() if specs[names[0]].in_features <= widest]
    if len(groups) > count:
        groups = [groups[round(index)] for index in torch.linspace(0, len(groups) - 1, count).tolist()]
    return [Group({name: linears[name].weight for name in names}) for names in groups]


def _specs(weights: Mapping[str, Tensor]) -> dict[str, LayerSpec]:
    return plan_layers({name: tuple(weight.shape) for name, weight in weights.items()}, [], DuQuantConfig())


@contextlib.contextmanager
def collecting(policy: nn.Module, groups: Sequence[Group], kind: str, rows: int, num_steps: int) -> Any:  # noqa: ANN401
    """While it lasts, every observation adds up to `rows` inputs of every group to its list of that kind.

    Yields a function to call before every observation. Rows are taken evenly from all denoising steps and tokens.
    """

    def keep(group: Group, steps: int) -> Callable[[Tensor], None]:
        def hook(inputs: Tensor) -> None:
            x = inputs.flatten(0, -2)
            places = torch.linspace(0, len(x) - 1, min(len(x), max(1, rows // steps)), device=x.device).round().long()
            samples = getattr(group, kind)
            samples[-1] = torch.cat((samples[-1], x[places].float().cpu()))

        return hook

    def begin() -> None:
        for group in groups:
            width = next(iter(group.weights.values())).shape[1]
            getattr(group, kind).append(torch.empty(0, width))

    hooks = {}
    for group in groups:
        first = next(iter(group.weights))
        steps = num_steps if first.startswith(ACTION_EXPERT) else 1
        hooks[policy.get_submodule(first)] = keep(group, steps)
    with watched(hooks):
        yield begin


def errors_by_method(
    group: Group, device: torch.device | str, advance: Callable[[], object] = lambda: None
) -> dict[str, dict[str, float]]:
    """Relative error of the outputs on held-out inputs, by method and layer."""
    weights = {name: weight.to(device).float() for name, weight in group.weights.items()}
    stacked, x = torch.cat(list(weights.values())), torch.cat(group.held_out).to(device)
    sizes = [len(weight) for weight in weights.values()]
    expected = (x @ stacked.T).split(sizes, 1)
    calibration = [part.to(device) for part in group.calibration]
    errors = {}
    for method in METHODS:
        if method in PUBLISHED:
            fitted = PUBLISHED[method](stacked, torch.cat(calibration))
        else:
            fitted = _ours(weights, calibration if OURS[method] else None)
        actual = fitted(x).split(sizes, 1)
        errors[method] = dict(zip(weights, map(relative_error, actual, expected)))
        advance()
    return errors


def _ours(weights: Mapping[str, Tensor], calibration: Sequence[Tensor] | None) -> Fitted:
    """The preset `default`, without folds."""
    specs, moment = _specs(weights), None
    if calibration is not None:
        width, device = next(iter(specs.values())).in_features, calibration[0].device
        moment = InputMoment(width, device)
        for part in calibration:
            moment.add(part[None])
    tensors = quantize_group(weights, specs, DuQuantConfig(), moment)
    layers = [QuantLinear(specs[name], device="meta") for name in weights]
    for layer, name in zip(layers, weights):
        layer.load_state_dict(tensors[name], assign=True)
    return Fitted(layers[0].transform.apply, torch.cat([layer.stored_weight() for layer in layers]))


def method_table(
    errors: Mapping[str, Mapping[str, float]], checkpoints: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A row a method: mean error of the layers, of those of the language model and of the expert; the best comes last.

    Args:
        errors: By method, of every layer that was compared.
        checkpoints: By name of a converted checkpoint, of every layer that it quantizes.
    """
    reference = errors["rtn"]
    rows = [_row(method, by_layer, reference) for method, by_layer in errors.items()]
    for name, by_layer in checkpoints.items():
        shared = {layer: error for layer, error in by_layer.items() if layer in reference}
        if shared:
            rows.append(_row(f"checkpoint {name}", shared, reference))
    return sorted(rows, key=lambda row: -row["error"])


def _row(name: str, errors: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, Any]:
    def mean(of: Mapping[str, float], part: str | None = None) -> float | None:
        chosen = [of[layer] for layer in errors if part in (None, component(layer)[0])]
        return sum(chosen) / len(chosen) if chosen else None

    error = mean(errors)
    return {
        "method": name,
        "layers": len(errors),
        "error": error,
        "of_rtn": error / mean(reference),
        "sqnr_db": sqnr_db(error) if error else None,
        "language": mean(errors, "language"),
        "expert": mean(errors, "expert"),
    }
