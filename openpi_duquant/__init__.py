"""W4A8 inference for openpi's pi0 and pi0.5 policies: DuQuant transforms, int4 weights, int8 activations."""

from typing import Any

from openpi_duquant.checkpoint import Manifest
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import convert
from openpi_duquant.engine import Observation
from openpi_duquant.engine import Policy
from openpi_duquant.engine import load_policy
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import quantize_

__all__ = [
    "PRESETS",
    "DuQuantConfig",
    "DuQuantError",
    "Manifest",
    "Observation",
    "Policy",
    "QuantLinear",
    "convert",
    "create_trained_policy",
    "load_policy",
    "quantize_",
    "register",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """`create_trained_policy` and `register` of the plugin, which imports openpi."""
    if name not in ("create_trained_policy", "register"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from openpi_duquant import plugin  # noqa: PLC0415

    return getattr(plugin, name)
