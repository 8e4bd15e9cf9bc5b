"""The custom operators on a CPU: their Triton kernels in the interpreter, which must not be given 16-bit dots."""

from collections.abc import Iterator
import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant import transforms
from openpi_duquant.kernels import around
from openpi_duquant.kernels import attention
from openpi_duquant.kernels import patch_attention
from openpi_duquant.kernels import persistent
from openpi_duquant.kernels import rotary
from openpi_duquant.kernels import transform
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.reference import NO_PROLOGUE
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.kernels.tiles import Tile
from openpi_duquant.linear import module
from openpi_duquant.transforms import Transform

TILES = {torch.uint8: Tile(16, 32, 32, 2, 4, 2), torch.int8: Tile(16, 32, 64, 1, 4, 2)}


def _fused_transform(x: Tensor, *operands: object) -> tuple[Tensor, Tensor, Tensor]:
    from openpi_duquant.kernels import transform_triton  # noqa: PLC0415

    *tensors, geglu, norm = operands
    outputs = transform._fake(x, *operands)
    transform_triton.launch(x, *tensors, outputs, geglu=geglu, norm=norm, float32=True)
    return outputs


def _triton_matmul(a: Tensor, act_scale: Tensor, weight: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415

    *rest, geglu, _ = operands
    out = triton_matmul._fake(a, act_scale, weight, *operands)
    matmul_triton.launch(out, a, act_scale, weight, *rest, TILES[weight.dtype], geglu=geglu, interpreted=True)
    return out


def _epilogue(accumulators: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import epilogue_triton  # noqa: PLC0415

    *tensors, dtype = operands
    out = accumulators.new_empty(accumulators.shape, dtype=dtype)
    epilogue_triton.launch(out, accumulators, *tensors, part=epilogue_triton.tl.float16)
    return out


def _rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from openpi_duquant.kernels import rotary_triton  # noqa: PLC0415

    turned = qkv.new_empty(qkv.shape)
    rotary_triton.launch(turned, qkv, cos, sin)
    return turned


def _add_layer_norm(x: Tensor, *operands: Tensor | float | None) -> tuple[Tensor, Tensor]:
    from openpi_duquant.kernels import layer_norm_triton  # noqa: PLC0415

    outputs = x.new_empty(x.shape), x.new_empty(x.shape)
    layer_norm_triton.launch(outputs, x, *operands)
    return outputs


def _embed_patches(images: Tensor, parts: Tensor, offset: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    from openpi_duquant.kernels import patches_triton  # noqa: PLC0415

    out = offset.new_empty(len(images), *offset.shape, dtype=dtype)
    patches_triton.launch(out, images, parts.float(), offset, size)
    return out


def _embed_actions(actions: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415

    out = actions.new_empty(*actions.shape[:2], len(weight), dtype=dtype)
    denoising_triton.launch_embed(out, actions, weight, bias)
    return out


def _euler_step(x: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415

    out = torch.empty_like(operands[-2])
    denoising_triton.launch_step(out, x, *operands)
    return out


def _attend(q: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    *tensors, state_first = operands
    out, shape = q.new_empty(q.shape), attention_triton.Shape(16, 16, 2, 4)
    attention_triton.launch_attend(out, q, *tensors, state_first=state_first, exact=True, shape=shape)
    return out


def _attend_quantized(q: Tensor, *operands: object) -> tuple[Tensor, Tensor, Tensor]:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    *tensors, state_first = operands
    outputs, shape = attention._attend_quantized_fake(q), attention_triton.Shape(16, 16, 2, 4)
    attention_triton.launch_attend_quantized(outputs, q, *tensors, state_first=state_first, exact=True, shape=shape)
    return outputs


def _attend_patches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return patch_attention._by_torch(q, k, v).contiguous()


def fused_transform(x: Tensor, given: Transform, prologue: Prologue = NO_PROLOGUE) -> tuple[Tensor, Tensor, Tensor]:
    """`transform.fused_transform` by its kernel."""
    tensors = prologue.scale, prologue.shift, given.permutation, *transforms.as_operands(given.rotation)
    return torch.ops.openpi_duquant.fused_transform(x, *tensors, prologue.geglu, prologue.norm)


def _prologue(x: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import transform_triton  # noqa: PLC0415

    scale, shift, geglu, norm = operands
    out = around._prologue_fake(x, *operands)
    transform_triton.launch_prologue(out, x, scale, shift, geglu=geglu, norm=norm)
    return out


def _add_gated(y: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    from openpi_duquant.kernels import around_triton  # noqa: PLC0415

    out = y.new_empty(y.shape)
    around_triton.launch_add(out, y, residual, gate)
    return out


@contextlib.contextmanager
def operators() -> Iterator[None]:
    """Gives the operators their CPU versions."""
    with torch.library._scoped_library("openpi_duquant", "FRAGMENT") as library:
        for run in (
            _fused_transform, _triton_matmul, _epilogue, _rotary, _add_layer_norm, _embed_patches, _embed_actions,
            _euler_step, _attend, _attend_quantized, _attend_patches, _prologue, _add_gated,
        ):  # fmt: skip
            library.impl(run.__name__.removeprefix("_"), run, "CPU")
        yield


@contextlib.contextmanager
def triton_backend() -> Iterator[None]:
    """The backend `triton` on a CPU, with all that the engine launches."""
    definition, triton = kernels.BACKENDS["reference"], kernels.BACKENDS["triton"]
    anywhere = dataclasses.replace(triton, can_run=definition.can_run, load=definition.load)
    with pytest.MonkeyPatch.context() as patch, operators():
        patch.setitem(kernels.BACKENDS, "triton", anywhere)
        patch.setattr(module, "fused_transform", fused_transform)
        patch.setattr(around, "_on_gpu", lambda _: True)
        for part in (attention, rotary, persistent):
            patch.setattr(part, "on_gpu", lambda _, head_dim: rotary.is_power(head_dim))
        yield
