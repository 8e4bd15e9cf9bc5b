"""The definition of every operation, in plain torch: true integers, exact accumulators."""

from typing import NamedTuple

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant import transforms
from openpi_duquant.kernels.backend import Backend
from openpi_duquant.kernels.rotary import rotary
from openpi_duquant.profiling import span


def transform_and_quantize(x: Tensor, transform: transforms.Transform) -> tuple[Tensor, Tensor]:
    """Permutes and rotates an activation in fp32 and rounds it to int8, token by token.

    Args:
        x: [M, K], floating point.
        transform: What is done to it.

    Returns:
        codes [M, K] int8 and act_scale [M, 1] fp32, as `quant.quantize_activation`.
    """
    with span("input_transform", x):
        x = transform.apply(x.float())
    with span("activation_forward", x):
        return quant.quantize_activation(x)


NORM_EPS = 1e-6
"""What RMS norms add to the mean square, as in Gemma."""


def gated(x: Tensor) -> Tensor:
    """GeGLU (Shazeer 2020, arXiv:2002.05202) of x = gate | up [..., 2 K]: gelu(gate) * up [..., K], GELU by its tanh
    approximation; each step is rounded to the type of x."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class Prologue(NamedTuple):
    """What a layer's input is made from, element by element; each step is rounded to the type of x.

    Attributes:
        geglu: x = gate | up becomes gelu(gate) * up, see `gated`.
        norm: x becomes x / rms(x) * (1 + scale) + shift.
        scale: [K], or None for zeros: weight of Gemma's RMS norm, or scale of adaRMS.
        shift: [K], or None for zeros.
    """

    geglu: bool = False
    norm: bool = False
    scale: Tensor | None = None
    shift: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x [..., K], or [..., 2 K] for GeGLU -> [..., K], the same dtype."""
        x = gated(x) if self.geglu else x
        if self.norm:
            y = x.float()
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)
            y = y if self.scale is None else y * (1.0 + self.scale.float())
            x = (y if self.shift is None else y + self.shift.float()).to(x.dtype)
        return x


NO_PROLOGUE = Prologue()


class Epilogue(NamedTuple):
    """What is made of a layer's output y: residual + gate * rotary(geglu(y)), without what is None or not asked for.

    Attributes:
        rotary: Cosines and sines [..., D] of every token, which turn all heads of D channels but the last, see
            `rotary.rotary`.
        residual: [..., N].
        gate: [N].
        geglu: y = gate | up, rounded to the output type, becomes what a `Prologue` of the next layer would make of it.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None
    geglu: bool = False

    def by_token(self, tokens: int) -> "Epilogue":
        """The same for an output [tokens, N].

        Raises:
            RuntimeError: If what it holds is of another number of tokens.
        """

        def flat(x: Tensor) -> Tensor:
            return x.reshape(tokens, x.shape[-1]).contiguous()

        rotary = self.rotary and (flat(self.rotary[0]), flat(self.rotary[1]))
        return self._replace(rotary=rotary, residual=None if self.residual is None else flat(self.residual))

    def apply(self, y: Tensor) -> Tensor:
        """y [..., N], or [..., 2 N] for GeGLU -> [..., N], the same dtype."""
        y = gated(y) if self.geglu else y
        y = y if self.rotary is None else rotary(y, *self.rotary)
        y = y if self.gate is None else y * self.gate.to(y.dtype)
        return y if self.residual is None else self.residual + y


NO_EPILOGUE = Epilogue()


def fused_transform(
    x: Tensor, transform: transforms.Transform, prologue: Prologue = NO_PROLOGUE
) -> tuple[Tensor, Tensor, Tensor]:
    """Prologue, transform and rounding, as `transform.fused_transform`."""
    codes, act_scale = transform_and_quantize(prologue.apply(x), transform)
    return codes, act_scale, codes.sum(1, keepdim=True, dtype=torch.int32)


def integer_matmul(codes: Tensor, weight: Tensor, bits: int = 8) -> Tensor:
    """Exact int32 accumulators of codes x weight^T.

    The integers are carried in floating point, which is exact while every partial sum stays below the mantissa:
    fp32 (2^24) on a CPU where the bound allows, else fp64 (2^53).

    Args:
        codes: [..., M, k] int8 within -127..127.
        weight: [..., N, k] int8.
        bits: Of the weight: 4 if its codes are within -8..7.

    Returns:
        [..., M, N] int32.
    """
    largest = quant.ACTIVATION_MAX * 2 ** (bits - 1) * weight.shape[-1]
    exact = torch.float32 if codes.device.type == "cpu" and largest < 2**24 else torch.float64
    with transforms.full_precision(codes):
        return (codes.to(exact) @ weight.to(exact).mT).to(torch.int32)


def accumulate(codes: Tensor, weight: Tensor, weight_scale: Tensor, bits: int = 8) -> Tensor:
    """Accumulators under their weight scales, [M, N] fp32.

    Args:
        codes: [M, K] int8.
        weight: [N, K] int8.
        weight_scale: [N, G] fp32; a row of G > 1 scales has one accumulator a group.
        bits: As `integer_matmul`.
    """
    rows, groups = weight_scale.shape
    if groups == 1:
        return integer_matmul(codes, weight, bits) * weight_scale.T
    size = codes.shape[1] // groups
    by_group = codes.reshape(-1, groups, size).transpose(0, 1), weight.reshape(rows, groups, size).transpose(0, 1)
    return (integer_matmul(*by_group, bits) * weight_scale.T.unsqueeze(1)).sum(0)


def restore_output(y: Tensor, bias: Tensor | None, output_rotation: transforms.Rotation, dtype: torch.dtype) -> Tensor:
    """Restores rotated output rows, adds the bias, rounds to the output type; y [M, N] fp32."""
    with span("output_restore", y):
        y = transforms.rotate(y, output_rotation)
        return (y if bias is None else y + bias).to(dtype)


def matmul(
    a: Tensor,
    act_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output_rotation: transforms.Rotation,
    dtype: torch.dtype,
    row_sum: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """As `backend.Matmul`, by its definition, then the epilogue, rounded once, but for GeGLU, which takes rounded
    factors; the weight is the canonical one, the sums are not used."""
    with span("matmul", a):
        codes = packing.unpack(weight)
        if act_scale is None:
            with transforms.full_precision(a):
                y = a.float() @ quant.dequantize_weight(codes, weight_scale).T
        else:
            y = accumulate(a, codes, weight_scale, 4 if weight.dtype == torch.uint8 else 8) * act_scale
    y = restore_output(y, bias, output_rotation, dtype if epilogue.geglu else torch.float32)
    return epilogue.by_token(len(y)).apply(y).to(dtype)


BACKEND = Backend(matmul, fuses_epilogue=True)
