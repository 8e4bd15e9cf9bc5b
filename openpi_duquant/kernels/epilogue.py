"""What follows a matmul, in one launch: accumulators -> scales -> output restore -> bias -> output type.

Defined by `reference.accumulate` and `reference.restore_output`. Only where a fp32 output is rotated, which takes more
exact products than the tensor cores have, the rotation is the reference's.
"""

import torch
from torch import Tensor

from openpi_duquant import transforms
from openpi_duquant.kernels import reference

LARGEST_BLOCK = 128
"""Of an output rotation: a block is a tile of the kernel."""


def epilogue(
    accumulators: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output_rotation: transforms.Rotation,
    dtype: torch.dtype,
    row_sum: Tensor | None = None,
) -> Tensor:
    """rotate((accumulators - 8 * row_sum) * weight_scale * act_scale, output_rotation) + bias, rounded to `dtype`.

    Args:
        accumulators: [M, N] int32 or fp32, on a CUDA device.
        act_scale: [M, 1] fp32.
        weight_scale: [N, 1] fp32.
        bias: [N], or None.
        output_rotation: See `transforms.Rotation`; blocks of at most `LARGEST_BLOCK`.
        dtype: bf16, fp16 or fp32.
        row_sum: [M, 1] int32 if the weights were multiplied as w + 8: the sums of the codes.

    Returns:
        [M, N] dtype.
    """
    if dtype == torch.float32 and output_rotation is not None:
        scaled = epilogue(accumulators, act_scale, weight_scale, None, None, dtype, row_sum)
        return reference.restore_output(scaled, bias, output_rotation, dtype)
    rotation = transforms.as_operands(output_rotation)
    return torch.ops.openpi_duquant.epilogue(accumulators, act_scale, weight_scale, row_sum, bias, *rotation, dtype)


torch.library.define(
    "openpi_duquant::epilogue",
    "(Tensor accumulators, Tensor act_scale, Tensor weight_scale, Tensor? row_sum, Tensor? bias, Tensor? matrices, "
    "int hadamard, ScalarType dtype) -> Tensor",
)


@torch.library.register_fake("openpi_duquant::epilogue")
def _fake(accumulators: Tensor, *operands: object) -> Tensor:
    return accumulators.new_empty(accumulators.shape, dtype=operands[-1])


@torch.library.impl("openpi_duquant::epilogue", "CUDA")
def _on_gpu(accumulators: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import epilogue_triton  # noqa: PLC0415  triton is there where CUDA is

    out = accumulators.new_empty(accumulators.shape, dtype=operands[-1])
    if out.numel():
        tensors = [part.contiguous() if isinstance(part, Tensor) else part for part in (accumulators, *operands[:-1])]
        with torch.cuda.device_of(out):
            epilogue_triton.launch(out, *tensors)
    return out
