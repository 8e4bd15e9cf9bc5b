"""How far a quantized policy is from the original: actions, and layer by layer."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import math

import torch
from torch import Tensor
from torch import nn

from openpi_duquant import gptq
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
    stored, transform = layer.stored_weight(), layer.transform
    expected = transforms.rotate_rows(transform.dual().apply(weight.float()), transforms.inverse(layer.restore))
    if moment is None:
        return relative_error(stored, expected)
    moment = transform.of_moment(moment.double())
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
    with LayerErrors(folded, quantized_layers(quantized)) as errors:
        errors.run(run)
    return {name: errors.of(name) for name in errors.names}


class LayerErrors(contextlib.AbstractContextManager):
    """Errors of quantized layers, each fed the inputs that the folded original feeds it; sums, no activations are kept.

    Args:
        folded: The original with the folds of the quantized model; it is watched until this is left.
        layers: Quantized layers, by the names that the folded original has.
        activations: Also measure what rounding the activations alone does, with weights in floating point.
    """

    def __init__(self, folded: nn.Module, layers: Mapping[str, QuantLinear], *, activations: bool = False) -> None:
        self._folded = folded
        self._sums: dict[str, list[Tensor]] = {}
        self._calls: dict[str, int] = {}
        self._handles = [
            folded.get_submodule(name).register_forward_hook(self._hook(name, layer, activations=activations))
            for name, layer in layers.items()
        ]

    def run(self, run: Callable[[nn.Module], object]) -> None:
        """Runs the folded original; a layer's first call in it is its call 0."""
        self._calls = {}
        with torch.no_grad():
            run(self._folded)

    @property
    def names(self) -> list[str]:
        """Layers that were called, in the order of their first calls."""
        return list(self._sums)

    def of(self, name: str) -> float:
        """||y_quantized - y|| / ||y|| of a layer, over all of its calls."""
        return self._ratios(name)[0]

    def by_call(self, name: str) -> list[float]:
        """As `of`, for each of the calls of a run: the denoising steps, where it is a layer of the expert."""
        return [_ratio(*sums[[0, 1]].tolist()) for sums in self._sums[name]]

    def of_activations(self, name: str) -> tuple[float, float]:
        """Relative errors of the outputs and of the transformed inputs, the inputs being rounded and nothing else."""
        return self._ratios(name)[1:]

    def _ratios(self, name: str) -> tuple[float, float, float]:
        error, norm, rounded, before, inputs = torch.stack(self._sums[name]).sum(0).tolist()
        return _ratio(error, norm), _ratio(rounded, norm), _ratio(before, inputs)

    def _hook(
        self, name: str, layer: QuantLinear, *, activations: bool
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        undo = layer.transform.inverse() if activations and layer.spec.activation_bits == 8 else None

        def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            found = [layer(inputs[0]).double() - output.double(), output]
            if undo is not None:
                x = layer.transform.apply(inputs[0].float().flatten(0, -2))
                rounding = quant.fake_quantize_activation(x) - x
                found += [undo.apply(rounding) @ linear.weight.float().T, rounding, x]
            sums = [part.double().square().sum() for part in found]
            sums += [torch.zeros_like(sums[0])] * (5 - len(sums))
            by_call = self._sums.setdefault(name, [])
            if call == len(by_call):
                by_call.append(torch.zeros_like(torch.stack(sums)))
            by_call[call] += torch.stack(sums)

        return hook

    def __exit__(self, *_: object) -> None:
        """Ends the watch."""
        for handle in self._handles:
            handle.remove()


def sqnr_db(error: float) -> float:
    """Signal-to-quantization-noise ratio of a relative error, in dB; infinite for none."""
    return math.inf if error == 0 else -20.0 * math.log10(error)


def _ratio(error: float, norm: float) -> float:
    """Root of error / norm; 0 where both are zero."""
    return 0.0 if error == 0 else math.sqrt(error / norm) if norm > 0 else math.inf


def quantized_layers(model: nn.Module) -> Mapping[str, QuantLinear]:
    """The quantized layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
