"""The `triton` backend: this project's own W4A8 and W8A8 matmul, everything up to the residual in one launch."""

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant import transforms
from openpi_duquant.kernels import tiles

LARGEST_BLOCK = 128
"""Of an output rotation: a block must fit into a tile."""


def repack(weight: Tensor) -> Tensor:
    """From the canonical int4 weight (channels 2 j and 2 j + 1 in byte j) to channels j and j + K/2; int8 as it is."""
    if weight.dtype == torch.int8:
        return weight
    low, high = packing.unpack(weight).view(torch.uint8).chunk(2, dim=1)
    return (low & 0xF) | (high << 4)


def canonical(weight: Tensor) -> Tensor:
    """Inverse of `repack`."""
    if weight.dtype == torch.int8:
        return weight
    low, high = (weight << 4).view(torch.int8) >> 4, weight.view(torch.int8) >> 4
    return packing.pack(torch.cat((low, high), dim=1), bits=4)


def matmul(
    a: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output_rotation: transforms.Rotation,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """y = (a . weight) * act_scale * weight_scale, restored, plus bias; or residual + gate * y, rounded once.

    Args:
        a: [M, K] int8 codes, on a CUDA device.
        act_scale: [M, 1] fp32.
        weight: What `repack` made.
        weight_scale: [N, 1] fp32.
        bias: [N], or None.
        output_rotation: See `transforms.Rotation`; blocks of at most `LARGEST_BLOCK`.
        dtype: bf16, fp16 or fp32.
        residual: [M, N], or None.
        gate: [N], or None for ones.

    Returns:
        [M, N] dtype.
    """
    hadamard, matrices = (output_rotation, None) if isinstance(output_rotation, int) else (0, output_rotation)
    return torch.ops.openpi_duquant.triton_matmul(
        a, act_scale, weight, weight_scale, bias, matrices, hadamard, residual, gate, dtype
    )


torch.library.define(
    "openpi_duquant::triton_matmul",
    "(Tensor a, Tensor act_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? matrices, int hadamard, "
    "Tensor? residual, Tensor? gate, ScalarType dtype) -> Tensor",
)


@torch.library.register_fake("openpi_duquant::triton_matmul")
def _fake(a: Tensor, act_scale: Tensor, weight: Tensor, *operands: object) -> Tensor:
    del act_scale
    return a.new_empty(len(a), len(weight), dtype=operands[-1])


@torch.library.impl("openpi_duquant::triton_matmul", "CUDA")
def _on_gpu(a: Tensor, act_scale: Tensor, weight: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415  triton is there where CUDA is

    *rest, dtype = operands
    (m, k), n = a.shape, len(weight)
    major, minor = torch.cuda.get_device_capability(a.device)
    tile = tiles.tile_for(f"sm_{major}{minor}", m, n, k, bits=8 if weight.dtype == torch.int8 else 4)
    out = a.new_empty(m, n, dtype=dtype)
    matmul_triton.launch(out, a, act_scale, weight, *rest, tile)
    return out
