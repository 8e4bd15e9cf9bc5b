"""The research code's simulation of a quantized layer, which this project replaces; `bench-policy` times it.

Nothing in it is an integer: the activation is rounded to the values that int8 would keep, the weight holds those that
int4 keeps, and both are multiplied in the host's type. Its time goes into the transforms: a Python loop over blocks of
16 channels, a matmul each, on a copy of the activation before and after the layer.
"""

from collections.abc import Callable
import dataclasses

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant import transforms
from openpi_duquant.kernels.transform import fused_transform
from openpi_duquant.linear import QuantLinear


@dataclasses.dataclass(frozen=True)
class Style:
    """How the simulation computes what it computes.

    Attributes:
        batched: All blocks of a rotation in one batched matmul; else one after the other.
        clones: Copy the activation before every rotation, 252 copies in a forward pass of the expert.
        fused: Permutation, rotation and rounding of the activation in one kernel, this project's.
        compiled: Each layer under torch.compile.
    """

    batched: bool = False
    clones: bool = True
    fused: bool = False
    compiled: bool = False


def rotate(x: Tensor, matrices: Tensor | None, style: Style) -> Tensor:
    """Every block of x [..., K] times its matrix of [K/B, B, B], in the type of x."""
    if matrices is None:
        return x
    if style.batched:
        return transforms.rotate(x.clone() if style.clones else x, matrices)
    out = x.clone() if style.clones else torch.empty_like(x)
    start = 0
    for matrix in matrices:
        end = start + len(matrix)
        out[..., start:end] = x[..., start:end] @ matrix
        start = end
    return out


def fake_quantize(x: Tensor) -> Tensor:
    """The values that int8 keeps of x [..., K], token by token, in the type of x."""
    return quant.fake_quantize_activation(x.float()).to(x.dtype)


class SimulatedLinear(nn.Module):
    """Computes what a QuantLinear does, as the research code would.

    Args:
        layer: The layer, with its tensors and not prepared for a backend; Hadamard rotations are used as matrices.
        style: How to compute.
    """

    def __init__(self, layer: QuantLinear, style: Style) -> None:
        super().__init__()
        self.style, self.rounds = style, layer.spec.activation_bits == 8
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes = packing.unpack(layer.weight_packed)
        self.register_buffer("weight", quant.dequantize_weight(codes, layer.weight_scale).to(layer.dtype))
        self.register_buffer("bias", layer.bias)
        self.register_buffer("permutation", layer.permutation)
        self.register_buffer("rotation", _matrices(layer.transform.rotation, self.in_features, self.weight))
        self.register_buffer("restore", _matrices(layer.restore, self.out_features, self.weight))
        self.transform = layer.transform
        self.run: Callable[[Tensor], Tensor] = self.compute
        if style.compiled:
            self.run = torch.compile(self.compute, dynamic=False)

    def compute(self, x: Tensor) -> Tensor:
        """As `forward`, never compiled."""
        y = F.linear(self.fused_input(x) if self.style.fused else self.simulated_input(x), self.weight)
        y = rotate(y, self.restore, self.style)
        return y if self.bias is None else y + self.bias

    def simulated_input(self, x: Tensor) -> Tensor:
        """x [..., K], permuted, rotated and rounded step by step."""
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        x = rotate(x, self.rotation, self.style)
        return fake_quantize(x) if self.rounds else x

    def fused_input(self, x: Tensor) -> Tensor:
        """The same in one kernel, but for the multiplication by the scale."""
        codes, act_scale, _ = fused_transform(x.reshape(-1, self.in_features), self.transform)
        return (codes * act_scale).to(x.dtype).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], floating point -> [..., N], the same dtype."""
        return self.run(x)


def _matrices(rotation: transforms.Rotation, width: int, like: Tensor) -> Tensor | None:
    if isinstance(rotation, int):
        return transforms.hadamard_matrix(rotation, like).expand(width // rotation, rotation, rotation)
    return rotation if rotation is None else rotation.to(like.dtype)


def simulate_(model: nn.Module, style: Style) -> int:
    """Puts simulations in place of the QuantLinears of a model; returns how many."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SimulatedLinear(layer, style))
    return len(layers)
