"""The `triton` backend: this project's own W4A8 and W8A8 matmul, everything up to the epilogue in one launch."""

from collections.abc import Iterable
import functools
import importlib.util

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant import transforms
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import matmul_cuda
from openpi_duquant.kernels import self_test
from openpi_duquant.kernels import tiles
from openpi_duquant.kernels.backend import Backend
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.backend import reasons_against
from openpi_duquant.kernels.reference import NO_EPILOGUE
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.rotary import is_power
from openpi_duquant.profiling import span

LARGEST_BLOCK = 64
"""Of an output rotation: a block must fit into a tile."""


def can_run(problem: Problem, device: torch.device) -> tuple[bool, list[str]]:
    """See `Backend.can_run`."""
    reasons = []
    if problem.activation_bits != 8:
        reasons.append(f"it has no W{problem.weight_bits}A{problem.activation_bits}")
    if problem.scale_groups > 1:
        reasons.append("it has one weight scale a row, the layer has a group_size")
    if problem.output_block > LARGEST_BLOCK:
        reasons.append(f"it restores output blocks of at most {LARGEST_BLOCK}, the layer's are {problem.output_block}")
    reasons += reasons_against(device)
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed (pip install triton)")
    return not reasons, reasons


def load(problems: Iterable[Problem], device: torch.device) -> None:
    """Tests the kernel on small data of every kind of problem among these, see `self_test.matmul_fault`.

    Raises:
        DuQuantError: If it does not compile, or computes wrongly.
    """
    faults = dict.fromkeys(self_test.matmul_fault("triton", BACKEND, problem, device) for problem in problems)
    faults.pop(None, None)
    if faults:
        raise DuQuantError("; ".join(faults))


def repack(problem: Problem, weight: Tensor) -> Tensor:
    """From the canonical int4 weight (channels 2 j and 2 j + 1 in byte j) to channels j and j + K/2; int8 as it is."""
    if problem.weight_bits == 8:
        return weight
    low, high = packing.unpack(weight).view(torch.uint8).chunk(2, dim=1)
    return (low & 0xF) | (high << 4)


def canonical(problem: Problem, weight: Tensor) -> Tensor:
    """Inverse of `repack`."""
    if problem.weight_bits == 8:
        return weight
    low, high = (weight << 4).view(torch.int8) >> 4, weight.view(torch.int8) >> 4
    return packing.pack(torch.cat((low, high), dim=1), bits=4)


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
    """As `backend.Matmul`, then the epilogue, in one launch and rounded as by definition; the sums are not used.

    Where an output rotation comes before a rotary embedding or GeGLU, heads are of no power of two, or anything follows
    GeGLU, the epilogue is applied to the result.
    """
    del row_sum
    rotation = transforms.as_operands(output_rotation)
    epilogue = epilogue.by_token(a.shape[0])
    fits = _fits(epilogue, output_rotation)
    turned, *others = epilogue if fits else NO_EPILOGUE
    after = *(turned or (None, None)), *others, dtype
    with span("matmul", a):
        y = torch.ops.openpi_duquant.triton_matmul(a, act_scale, weight, weight_scale, bias, *rotation, *after)
    return y if fits else epilogue.apply(y)


def _fits(epilogue: Epilogue, output_rotation: transforms.Rotation) -> bool:
    """Whether the kernel takes it."""
    turned, residual, gate, geglu = epilogue
    if geglu:
        return output_rotation is None and turned is residual is gate is None
    return turned is None or (output_rotation is None and is_power(turned[0].shape[-1]))


torch.library.define(
    "openpi_duquant::triton_matmul",
    "(Tensor a, Tensor act_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? matrices, int hadamard, "
    "Tensor? cos, Tensor? sin, Tensor? residual, Tensor? gate, bool geglu, ScalarType dtype) -> Tensor",
)


@torch.library.register_fake("openpi_duquant::triton_matmul")
def _fake(a: Tensor, act_scale: Tensor, weight: Tensor, *operands: object) -> Tensor:
    del act_scale
    *_, geglu, dtype = operands
    return a.new_empty(a.shape[0], weight.shape[0] // (1 + geglu), dtype=dtype)


@functools.cache
def _tile(device: torch.device, m: int, n: int, k: int, bits: int) -> tiles.Tile:
    return tiles.tile_for(architecture(device), m, n, k, bits)


@torch.library.impl("openpi_duquant::triton_matmul", "CUDA")
def _on_gpu(a: Tensor, act_scale: Tensor, weight: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415  triton is there where CUDA is

    weight_scale, bias, matrices, hadamard, cos, _, residual, gate, geglu, _ = operands
    (m, k), n = a.shape, weight.shape[0]
    out = _fake(a, act_scale, weight, *operands)
    with torch.cuda.device_of(a):
        if matmul_cuda.takes(out, a, weight, bias, matrices, hadamard, cos, residual, gate, geglu=geglu):
            matmul_cuda.launch(out, a, act_scale, weight, weight_scale, residual, geglu=geglu)
        else:
            tile = _tile(a.device, m, n, k, 8 if weight.dtype == torch.int8 else 4)
            matmul_triton.launch(out, a, act_scale, weight, *operands[:-2], tile, geglu=geglu)
    return out


BACKEND = Backend(matmul, can_run, load, repack, canonical, fused=True, fuses_epilogue=True)
