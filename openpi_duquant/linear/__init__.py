"""Quantized linear layers: their description, the module, the choice of layers, and `quantize_`."""

from openpi_duquant.linear.merge import merge_
from openpi_duquant.linear.module import QuantizedInput
from openpi_duquant.linear.module import QuantLinear
from openpi_duquant.linear.module import apply_linear
from openpi_duquant.linear.module import name_layers
from openpi_duquant.linear.module import shared_forward
from openpi_duquant.linear.prepare import prepare_
from openpi_duquant.linear.quantize import plan_layers
from openpi_duquant.linear.quantize import quantize_
from openpi_duquant.linear.quantize import quantize_group
from openpi_duquant.linear.select import select_linears
from openpi_duquant.linear.spec import LayerSpec

__all__ = [
    "LayerSpec",
    "QuantLinear",
    "QuantizedInput",
    "apply_linear",
    "merge_",
    "name_layers",
    "plan_layers",
    "prepare_",
    "quantize_",
    "quantize_group",
    "select_linears",
    "shared_forward",
]
