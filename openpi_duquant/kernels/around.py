"""What stands before and after a matmul that is not quantized; on a GPU a launch each.

A quantized layer's are part of its own kernels. A compiler fuses the definitions better than it could these.
"""

import torch
from torch import Tensor

from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue


def apply_prologue(x: Tensor, prologue: Prologue) -> Tensor:
    """`prologue.apply(x)`: x [..., K], or [..., 2 K] for GeGLU -> [..., K]."""
    if not _on_gpu(x) or not (prologue.geglu or prologue.norm):
        return prologue.apply(x)
    return torch.ops.openpi_duquant.prologue(x, prologue.scale, prologue.shift, prologue.geglu, prologue.norm)


def apply_epilogue(y: Tensor, epilogue: Epilogue) -> Tensor:
    """`epilogue.apply(y)`: y [..., N], or [..., 2 N] for GeGLU -> [..., N]."""
    if not _on_gpu(y) or epilogue.residual is None:
        return epilogue.apply(y)
    y = epilogue._replace(residual=None, gate=None).apply(y)
    return torch.ops.openpi_duquant.add_gated(y, epilogue.residual, epilogue.gate)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


torch.library.define(
    "openpi_duquant::prologue", "(Tensor x, Tensor? scale, Tensor? shift, bool geglu, bool norm) -> Tensor"
)
torch.library.define("openpi_duquant::add_gated", "(Tensor y, Tensor residual, Tensor? gate) -> Tensor")


@torch.library.register_fake("openpi_duquant::prologue")
def _prologue_fake(x: Tensor, *operands: object) -> Tensor:
    *_, geglu, _ = operands
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (1 + geglu))


@torch.library.register_fake("openpi_duquant::add_gated")
def _add_fake(y: Tensor, *operands: object) -> Tensor:
    del operands
    return y.new_empty(y.shape)


@torch.library.impl("openpi_duquant::prologue", "CUDA")
def _prologue_on_gpu(x: Tensor, scale: Tensor | None, shift: Tensor | None, geglu: bool, norm: bool) -> Tensor:  # noqa: FBT001
    from openpi_duquant.kernels import transform_triton  # noqa: PLC0415  triton is there where CUDA is

    out = _prologue_fake(x, geglu, norm)
    with torch.cuda.device_of(x):
        transform_triton.launch_prologue(out, x.contiguous(), scale, shift, geglu=geglu, norm=norm)
    return out


@torch.library.impl("openpi_duquant::add_gated", "CUDA")
def _add_on_gpu(y: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    from openpi_duquant.kernels import around_triton  # noqa: PLC0415  triton is there where CUDA is

    out = _add_fake(y)
    with torch.cuda.device_of(y):
        around_triton.launch_add(out, y.contiguous(), residual.contiguous(), gate)
    return out
