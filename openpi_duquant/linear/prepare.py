"""Backends of a whole model, chosen together."""

from torch import nn

from openpi_duquant import kernels
from openpi_duquant.linear.module import QuantLinear


def prepare_(model: nn.Module) -> None:
    """Prepares every `QuantLinear` of a model that is on its device; kernels that are missing are built all at once.

    Raises:
        DuQuantError: If a backend asked for cannot run; says every reason.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    by_place: dict[tuple[str, object], list[QuantLinear]] = {}
    for layer in layers:
        by_place.setdefault((layer.backend, layer.weight_scale.device), []).append(layer)
    for (backend, device), members in by_place.items():
        kernels.load(backend, [layer.problem for layer in members], device)
    for layer in layers:
        layer.prepare()
