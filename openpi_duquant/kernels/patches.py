"""Patches of images to embeddings, straight from bytes; on a GPU one launch."""

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.transforms import full_precision

_MIDDLE = 128  # of a byte: what is left of it, and every product by it, is exact in 16 bits
_STEP = 64  # the length of a patch, in bytes, is padded to a multiple of this


def prepare(weight: Tensor, bias: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Weights for `embed_patches`.

    A byte u stands for 2 u / 255 - 1 = (2 (u - 128) + 1) / 255, so that w . x + b is 2 / 255 w . (u - 128) and a
    constant. A weight is the sum of three numbers of 8 bits each, as bf16 holds them.

    Args:
        weight: [W, 3, S, S] fp32, of a convolution whose patches do not overlap, over values in [-1, 1].
        bias: [W].
        positions: [P, W], embeddings of the patches' positions.

    Returns:
        parts [3, K, W] bf16, K = 3 S^2 and zeros up to a multiple of 64; offset [P, W] fp32.
    """
    rest = weight.double().permute(0, 2, 3, 1).flatten(1).mT  # [S S 3, W], as bytes lie in an image
    offset = positions.double() + bias.double() + rest.sum(0) / 255
    rest = F.pad(rest * 2 / 255, (0, 0, 0, -len(rest) % _STEP))
    parts = []
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].double()
    return torch.stack(parts), offset.float()


def embed_patches(images: Tensor, parts: Tensor, offset: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Embeddings of patches and their positions, summed in fp32.

    Args:
        images: [B, H, H, 3] uint8, contiguous.
        parts: See `prepare`.
        offset: See `prepare`.
        size: S, of a patch.
        dtype: Of the result.

    Returns:
        [B, P, W]; patches row by row.
    """
    if images.is_cuda:
        return torch.ops.openpi_duquant.embed_patches(images, parts, offset, size, dtype)
    rows_and_columns = images.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    patches = rows_and_columns.transpose(2, 3).flatten(3).flatten(1, 2).float() - _MIDDLE
    with full_precision(patches):
        return (patches @ parts.float().sum(0)[: patches.shape[2]] + offset).to(dtype)


torch.library.define(
    "openpi_duquant::embed_patches",
    "(Tensor images, Tensor parts, Tensor offset, int size, ScalarType dtype) -> Tensor",
)


@torch.library.register_fake("openpi_duquant::embed_patches")
def _fake(images: Tensor, parts: Tensor, offset: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    del parts, size
    return offset.new_empty(len(images), *offset.shape, dtype=dtype)


@torch.library.impl("openpi_duquant::embed_patches", "CUDA")
def _on_gpu(images: Tensor, parts: Tensor, offset: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    from openpi_duquant.kernels import patches_triton  # noqa: PLC0415  triton is there where CUDA is

    out = _fake(images, parts, offset, size, dtype)
    with torch.cuda.device_of(out):
        patches_triton.launch(out, images.contiguous(), parts, offset, size)
    return out
