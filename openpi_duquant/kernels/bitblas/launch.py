"""The matmul of the BitBLAS backend: one generated kernel for the accumulators, one of ours for the rest."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from openpi_duquant import transforms
from openpi_duquant.kernels import driver
from openpi_duquant.kernels.bitblas.operators import bucket
from openpi_duquant.kernels.epilogue import epilogue
from openpi_duquant.profiling import span


class Kernel(NamedTuple):
    """A matmul kernel, loaded on one device.

    Attributes:
        function: The kernel.
        rows: Tokens a block.
        columns: Out channels a block.
        threads: Threads a block.
    """

    function: driver.Function
    rows: int
    columns: int
    threads: int

    def __call__(self, a: Tensor, weight: Tensor, out: Tensor) -> None:
        """Launches out [M, N] = a [M, K] . weight [N, ...]^T on the current stream; all contiguous, on the device."""
        m, n = out.shape
        tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, weight, out)]
        self.function((n // self.columns, -(-m // self.rows), 1), self.threads, [*tensors, ctypes.c_int(m)])


KERNELS: dict[tuple[int, torch.dtype, torch.dtype, int, int], tuple[Kernel, ...]] = {}
"""Kernels for few, some and many tokens, by device, dtypes of activation and weight, N and K; filled by `loading`."""


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
    """As `backend.Matmul`, with the weight that `operators.repack` made; W4A8 multiplies w + 8 and wants row sums."""
    if act_scale is None:
        a, act_scale = _as_float16(a)
        row_sum = None
    elif weight.dtype == torch.uint8:
        row_sum = a.sum(1, keepdim=True, dtype=torch.int32) if row_sum is None else row_sum
    else:
        row_sum = None
    with span("matmul", a):
        sums = accumulate(a, weight)
    with span("output_restore", sums):
        return epilogue(sums, act_scale, weight_scale, bias, output_rotation, dtype, row_sum)


def accumulate(a: Tensor, weight: Tensor) -> Tensor:
    """Accumulators [M, N]: int32 of codes a [M, K] int8 (W4: of w + 8), fp32 of a [M, K] float16."""
    missing = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1) - a.shape[1]
    return torch.ops.openpi_duquant.bitblas(torch.nn.functional.pad(a, (0, missing)) if missing else a, weight)


def _as_float16(a: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest magnitude, which float16 cannot overflow, and those magnitudes [M, 1] fp32."""
    scale = a.float().abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return (a / scale).half(), scale


torch.library.define("openpi_duquant::bitblas", "(Tensor a, Tensor weight) -> Tensor")


@torch.library.register_fake("openpi_duquant::bitblas")
def _fake(a: Tensor, weight: Tensor) -> Tensor:
    return a.new_empty(len(a), len(weight), dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)


@torch.library.impl("openpi_duquant::bitblas", "CUDA")
def _on_gpu(a: Tensor, weight: Tensor) -> Tensor:
    device, (m, k), n = a.device.index, a.shape, len(weight)
    out = _fake(a, weight)
    if m:
        kernel = KERNELS[device, a.dtype, weight.dtype, n, k][bucket(m)]
        if device == torch.cuda.current_device():
            kernel(a.contiguous(), weight, out)
        else:
            with torch.cuda.device(device):
                kernel(a.contiguous(), weight, out)
    return out
