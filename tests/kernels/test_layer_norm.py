"""Residual addition and layer norm against the formula in fp64; without a GPU, the kernel in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels.layer_norm import add_layer_norm

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
IN_KERNEL = [dtype for dtype in TOLERANCE if GPU or dtype != torch.bfloat16]  # the interpreter cuts bf16 off

Given = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def given(shape: tuple[int, ...], dtype: torch.dtype, *, offset: float = 0.0, biased: bool = False) -> Given:
    """x around an offset, delta, its bias or None, weight and bias."""
    torch.manual_seed(0)
    sizes = shape, shape, shape[-1:], shape[-1:], shape[-1:]
    x, *others = (torch.randn(size, device=DEVICE) for size in sizes)
    delta, delta_bias, weight, bias = (each.to(dtype) for each in others)
    return (x + offset).to(dtype), delta, delta_bias if biased else None, weight, bias


def normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """In fp64, by the formula."""
    x = x.double()
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def assert_right(
    actual: tuple[Tensor, Tensor],
    x: Tensor,
    delta: Tensor,
    delta_bias: Tensor | None,
    *affine: Tensor,
    eps: float = EPS,
    slack: float = 1.0,
) -> None:
    """The sum to the last bit (in fp32 with a bias, whose additions have an order), the norm of that very sum within a
    rounding."""
    total, norm = actual
    if delta_bias is None:
        assert torch.equal(total, x + delta)
    else:
        exact = x.double() + delta.double() + delta_bias.double()
        torch.testing.assert_close(total.double(), exact, rtol=torch.finfo(x.dtype).eps, atol=1e-6)
    assert norm.dtype == x.dtype
    expected = normalized(total, *affine, eps)
    tolerance = slack * TOLERANCE[x.dtype]
    torch.testing.assert_close(norm.double(), expected, rtol=tolerance, atol=tolerance)


def launched(*operands: Tensor | None, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """What the kernel fills."""
    from openpi_duquant.kernels import layer_norm_triton  # noqa: PLC0415

    outputs = torch.full_like(operands[0], torch.nan), torch.full_like(operands[0], torch.nan)
    layer_norm_triton.launch(outputs, *operands, eps)
    return outputs


SHAPES = [(1, 1152), (3, 1152), (2, 5, 16), (7, 72), (1, 1), (4, 1153), (2, 4304), (1, 12_000)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_it_adds_and_normalizes(shape: tuple[int, ...], dtype: torch.dtype, *, biased: bool) -> None:
    operands = given(shape, dtype, biased=biased)
    assert_right(add_layer_norm(*operands, EPS), *operands)


def test_with_nothing_to_add_the_stream_stays() -> None:
    x, _, _, weight, bias = given((3, 72), torch.float32)
    total, norm = add_layer_norm(x, None, None, weight, bias, EPS)
    assert total is x
    torch.testing.assert_close(norm.double(), normalized(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", IN_KERNEL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_adds_and_normalizes(shape: tuple[int, ...], dtype: torch.dtype, *, biased: bool) -> None:
    operands = given(shape, dtype, biased=biased)
    assert_right(launched(*operands), *operands)


@pytest.mark.triton
def test_the_kernel_takes_the_variance_of_what_is_centered() -> None:
    """The mean of the squares less the square of the mean would have lost all digits here."""
    operands = given((3, 1152), torch.float32, offset=1000.0)
    assert_right(launched(*operands), *operands, slack=20)


@pytest.mark.triton
def test_the_kernel_normalizes_the_sum_as_rounded() -> None:
    """A step of fp16 is one half here."""
    operands = given((3, 1152), torch.float16, offset=1000.0)
    assert_right(launched(*operands), *operands, slack=20)


@pytest.mark.triton
def test_the_kernel_adds_eps_to_the_variance() -> None:
    operands = given((3, 1152), torch.float32)
    assert_right(launched(*operands, eps=2.0), *operands, eps=2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_operands_may_be_views() -> None:
    x, delta, _, *affine = given((3, 2, 144), torch.bfloat16)
    views = x.transpose(0, 1)[..., :72], delta.transpose(0, 1)[..., 72:], None, *(part[:72] for part in affine)
    assert_right(add_layer_norm(*views, EPS), *views)
