"""Embedded patches against the convolution in fp64; without a GPU, the kernel in Triton's interpreter."""

import pytest
import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.kernels import patches

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

ERROR = 2e-5 if GPU else 3e-6
"""Of sums in fp32; tensor cores cut digits off."""

SHAPES = [(1, 28, 14, 8), (2, 28, 7, 72), (3, 42, 14, 65), (1, 12, 3, 1)]
"""B, H, S, W."""


def given(count: int, side: int, size: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with all bytes, and weights, bias and positions in fp32."""
    torch.manual_seed(0)
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8)
    images.view(-1)[:256] = torch.arange(256)
    weight, bias = torch.randn(width, 3, size, size), torch.randn(width)
    return tuple(x.to(DEVICE) for x in (images, weight, bias, torch.randn((side // size) ** 2, width)))


def convolved(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """By torch's convolution over values in [-1, 1], in fp64."""
    values = images.double().movedim(3, 1) / 255 * 2 - 1
    y = F.conv2d(values, weight.double(), bias.double(), stride=weight.shape[2])
    return y.flatten(2).mT + positions.double()


def embedded(shape: tuple[int, ...], dtype: torch.dtype, *, launch: bool) -> tuple[Tensor, Tensor]:
    """What is made, and what should be."""
    images, *rest = given(*shape)
    parts, offset = patches.prepare(*rest)
    size, expected = shape[2], convolved(images, *rest)
    if not launch:
        return patches.embed_patches(images, parts, offset, size, dtype), expected
    from openpi_duquant.kernels import patches_triton  # noqa: PLC0415

    out = torch.full(expected.shape, torch.nan, dtype=dtype, device=DEVICE)
    patches_triton.launch(out, images, parts if GPU else parts.float(), offset, size)
    return out, expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_the_convolution(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    actual, expected = embedded(shape, dtype, launch=False)
    assert actual.dtype == dtype
    error = ERROR if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error * expected.std().item())


@pytest.mark.triton
@pytest.mark.parametrize("shape", [*SHAPES, (1, 224, 14, 80)])
def test_the_kernel_is_the_convolution(shape: tuple[int, ...]) -> None:
    actual, expected = embedded(shape, torch.float32, launch=True)
    torch.testing.assert_close(actual.double(), expected, rtol=ERROR, atol=ERROR * expected.std().item())


def test_a_weight_is_the_sum_of_its_parts() -> None:
    _, weight, bias, positions = given(1, 28, 14, 8)
    parts, _ = patches.prepare(weight, bias, positions)
    length = 3 * 14**2
    assert parts.shape == (3, 640, 8)
    assert not parts[:, length:].any()
    expected = weight.double().permute(2, 3, 1, 0).flatten(0, 2) * 2 / 255
    torch.testing.assert_close(parts.double().sum(0)[:length], expected, rtol=2**-23, atol=0)
