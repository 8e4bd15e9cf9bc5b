"""What precedes a quantized matmul: norm or GeGLU -> permutation -> rotation -> int8, scale, row sum; in few launches.

Defined by `reference.fused_transform`, which also runs it where there is no GPU.
"""

import torch
from torch import Tensor

from openpi_duquant import transforms
from openpi_duquant.kernels import reference
from openpi_duquant.kernels import transform_cuda
from openpi_duquant.profiling import span

ROTATION_BLOCKS = (16, 32, 64, 128)
"""Sizes of rotation blocks that the kernels take."""

LARGEST_WIDTH = 16384


def why_not_fused(transform: transforms.Transform, width: int) -> str | None:
    """Why the kernels cannot apply this transform to rows of that width; None if they can."""
    matrices, hadamard = transforms.as_operands(transform.rotation)
    block = hadamard if matrices is None else matrices.shape[-1]
    if transform.pre_rotation is not None:
        return "the transform rotates before it permutes"
    if block and block not in ROTATION_BLOCKS:
        return f"rotation blocks are of {block}, not of {', '.join(map(str, ROTATION_BLOCKS))}"
    if width > LARGEST_WIDTH:
        return f"{width} input channels are more than {LARGEST_WIDTH}"
    return None


def fused_transform(
    x: Tensor, transform: transforms.Transform, prologue: reference.Prologue = reference.NO_PROLOGUE
) -> tuple[Tensor, Tensor, Tensor]:
    """Prologue, transform and rounding; on a GPU by kernels where `why_not_fused` has nothing against it.

    Args:
        x: [M, K], or [M, 2 K] for GeGLU, floating point; rows may lie apart, channels not.
        transform: What is done to it before it is rounded.
        prologue: What is done to it before that.

    Returns:
        codes [M, K] int8, act_scale [M, 1] fp32, row_sum [M, 1] int32 (sums of the codes).
    """
    width = x.shape[1] // 2 if prologue.geglu else x.shape[1]
    if not x.is_cuda or why_not_fused(transform, width):
        return reference.fused_transform(x, transform, prologue)
    matrices, hadamard = transforms.as_operands(transform.rotation)
    tensors = prologue.scale, prologue.shift, transform.permutation, matrices
    with span("input_transform", x):
        return torch.ops.openpi_duquant.fused_transform(x, *tensors, hadamard, prologue.geglu, prologue.norm)


torch.library.define(
    "openpi_duquant::fused_transform",
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor? permutation, Tensor? matrices, int hadamard, bool geglu, "
    "bool norm) -> (Tensor, Tensor, Tensor)",
)


def empty(x: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, width], act_scale and row_sum [rows, 1], where x is, to be filled."""
    codes, act_scale = x.new_empty(rows, width, dtype=torch.int8), x.new_empty(rows, 1, dtype=torch.float32)
    return codes, act_scale, x.new_empty(rows, 1, dtype=torch.int32)


@torch.library.register_fake("openpi_duquant::fused_transform")
def _fake(x: Tensor, *operands: object) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x, x.shape[0], x.shape[1] // 2 if operands[-2] else x.shape[1])


def _on_gpu(x: Tensor, *operands: object) -> tuple[Tensor, Tensor, Tensor]:
    from openpi_duquant.kernels import transform_triton  # noqa: PLC0415  triton is there where CUDA is

    *tensors, geglu, norm = operands
    outputs = _fake(x, *operands)
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        kind = transform_cuda.kind_for(x, *tensors, geglu=geglu, norm=norm)
        if kind is not None:
            transform_cuda.launch(kind, x, *tensors[:3], outputs)
        else:
            transform_triton.launch(x, *tensors, outputs, geglu=geglu, norm=norm, float32=x.dtype == torch.float32)
    return outputs


torch.library.impl("openpi_duquant::fused_transform", "CUDA", _on_gpu)
