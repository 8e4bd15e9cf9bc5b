"""Fake quantization: the values the integers stand for, multiplied in fp32. The fallback and the cross-check."""

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant import transforms
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.backend import Backend
from openpi_duquant.profiling import span


def matmul(
    a: Tensor,
    act_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output_rotation: transforms.Rotation,
    dtype: torch.dtype,
    row_sum: Tensor | None = None,
) -> Tensor:
    """As `backend.Matmul`, of dequantized operands; equal up to fp32 rounding."""
    with span("matmul", a):
        x = a.float() if act_scale is None else a.float() * act_scale
        with transforms.full_precision(x):
            y = x @ quant.dequantize_weight(packing.unpack(weight), weight_scale).T
    return reference.restore_output(y, bias, output_rotation, dtype)


BACKEND = Backend(matmul)
