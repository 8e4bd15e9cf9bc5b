"""How far a quantized policy is from the original: actions, and layer by layer."""

from collections.abc import Callable, Mapping
import dataclasses
import math

import torch
from torch import Tensor
from torch import nn

from openpi_duquant import gptq
from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant import transforms
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| over all elements, in fp64; 0 where both are zero."""
    error = (actual.double() - expected.double()).norm()
    return 0.0 if error == 0 else (error / expected.double().norm()).item()


def weight_error(weight: Tensor, spec: LayerSpec, tensors: Mapping[str, Tensor], moment: Tensor | None = None) -> float:
    """Relative error of a quantized weight, in the space in which it is stored.

    Args:
        weight: [N, K], the floating-point weight after folds.
        spec: The layer.
        tensors: Those that `LayerSpec.tensors` names.
        moment: [K, K], E[x x^T] of the inputs: the error is then that of the outputs, were the inputs not rounded.
    """
    layer = QuantLinear(dataclasses.replace(spec, bias=False), device="meta")
    layer.load_state_dict(dict(tensors), assign=True)
    stored = quant.dequantize_weight(packing.unpack(layer.weight_packed), layer.weight_scale)
    transform = layer.transform
    expected = transforms.rotate_rows(transform.dual().apply(weight.float()), transforms.inverse(layer.restore))
    if moment is None:
        return relative_error(stored, expected)
    moment = transform.apply(transform.apply(moment.double()).T)
    return _ratio(*(gptq.output_error(of, moment).sum().item() for of in (stored - expected, expected)))


def layer_errors(folded: nn.Module, quantized: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, float]:
    """Relative error of every quantized layer's output, each fed the inputs that the folded original feeds it.

    Args:
        folded: The original with the same folds, not quantized.
        quantized: The quantized model; its layers have the same names.
        run: Runs a model once.

    Returns:
        By layer name, ||y_quantized - y|| / ||y|| over all calls of the layer; layers never called are left out.
    """
    errors: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def compare(name: str, layer: QuantLinear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            difference = (layer(inputs[0]).double() - output.double()).square().sum()
            errors[name] = errors.get(name, 0.0) + difference
            norms[name] = norms.get(name, 0.0) + output.double().square().sum()

        return hook

    layers = quantized_layers(quantized)
    handles = [folded.get_submodule(name).register_forward_hook(compare(name, layer)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            run(folded)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _ratio(errors[name].item(), norms[name].item()) for name in layers if name in norms}


def _ratio(error: float, norm: float) -> float:
    """Root of error / norm; 0 where both are zero."""
    return 0.0 if error == 0 else math.sqrt(error / norm) if norm > 0 else math.inf


def quantized_layers(model: nn.Module) -> Mapping[str, QuantLinear]:
    """The quantized layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
