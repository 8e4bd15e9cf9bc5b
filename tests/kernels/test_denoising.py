"""Embedded actions and Euler steps against the formulas in fp64; without a GPU, the kernels in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import denoising
from openpi_duquant.kernels.reference import Prologue

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STEP_OF = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
IN_KERNEL = [dtype for dtype in STEP_OF if GPU or dtype != torch.bfloat16]  # the interpreter cuts bf16 off

SHAPES = [(1, 10, 32, 1024), (2, 5, 7, 72), (1, 1, 1, 1), (3, 2, 33, 129), (2, 1, 5, 5000), (1, 3, 4100, 2)]
"""B, H, A, W."""

by_shape = pytest.mark.parametrize("shape", SHAPES)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def assert_close(actual: Tensor, expected: Tensor, error: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error)


def assert_embeds(shape: tuple[int, ...], dtype: torch.dtype, *, launch: bool) -> None:
    """Actions, projected in fp32 and then rounded."""
    torch.manual_seed(0)
    batch, horizon, channels, width = shape
    actions, weight, bias = random(batch, horizon, channels), random(width, channels), random(width)
    if launch:
        from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415

        y = torch.full((batch, horizon, width), torch.nan, dtype=dtype, device=DEVICE)
        denoising_triton.launch_embed(y, actions, weight, bias)
    else:
        y = denoising.embed_actions(actions, weight, bias, dtype)
    assert y.dtype == dtype
    assert_close(y, actions.double() @ weight.double().T + bias.double(), STEP_OF[dtype] + 1e-6 * channels**0.5)


@by_shape
@pytest.mark.parametrize("dtype", STEP_OF)
def test_actions_are_embedded(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_embeds(shape, dtype, launch=False)


@pytest.mark.triton
@by_shape
@pytest.mark.parametrize("dtype", IN_KERNEL)
def test_the_kernel_embeds_actions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_embeds(shape, dtype, launch=True)


def assert_steps(
    shape: tuple[int, ...], dtype: torch.dtype, *, launch: bool, state: int = 0, scaled: bool = True,
    shifted: bool = True, steps: int = 10, small: float = 1.0,
) -> None:  # fmt: skip
    """x normalized in fp64 and rounded; then projected, divided and subtracted in fp64."""
    torch.manual_seed(0)
    batch, horizon, channels, width = shape
    x, actions = random(batch, state + horizon, width).mul(small).to(dtype), random(batch, horizon, channels)
    weight, bias = random(channels, width) / width**0.5, random(channels)
    scale, shift = random(width) if scaled else None, random(width) if shifted else None
    if launch:
        from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415

        y = torch.full_like(actions, torch.nan)
        denoising_triton.launch_step(y, x, scale, shift, weight, bias, actions, steps)
    else:
        y = denoising.euler_step(x, Prologue(norm=True, scale=scale, shift=shift), weight, bias, actions, steps)
    wide = x[:, state:].double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * (1 + scale.double()) if scaled else normed
    normed = (normed + shift.double() if shifted else normed).to(dtype).double()
    expected = actions.double() - (normed @ weight.double().T + bias.double()) / steps
    assert y.dtype == torch.float32
    exact = dtype == torch.float32
    assert_close(y, expected, 1e-5 if exact else STEP_OF[dtype] / steps)  # one that is on an edge rounds either way


VARIANTS = [
    {}, {"state": 1}, {"state": 1, "shifted": False}, {"scaled": False, "shifted": False}, {"steps": 1}, {"steps": 3},
    {"small": 1e-3},
]  # fmt: skip


@by_shape
@pytest.mark.parametrize("dtype", STEP_OF)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_follows_the_velocity(shape: tuple[int, ...], dtype: torch.dtype, variant: dict) -> None:
    assert_steps(shape, dtype, launch=False, **variant)


@pytest.mark.triton
@by_shape
@pytest.mark.parametrize("dtype", IN_KERNEL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_follows_the_velocity(shape: tuple[int, ...], dtype: torch.dtype, variant: dict) -> None:
    assert_steps(shape, dtype, launch=True, **variant)


@pytest.mark.triton
def test_the_kernel_rounds_what_is_normalized() -> None:
    """A weight that picks one channel shows its rounding."""
    from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415

    x, actions, bias = random(1, 1, 16).half(), torch.zeros(1, 1, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    y = torch.empty_like(actions)
    denoising_triton.launch_step(y, x, None, None, torch.eye(16, device=DEVICE), bias, actions, 1)
    assert torch.equal(y, y.half().float())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_operands_may_be_views() -> None:
    x, actions = random(5, 2, 72).transpose(0, 1), random(4, 2, 8).transpose(0, 1)
    into, out, bias = random(72, 8), random(8, 72), random(72)
    norm = Prologue(norm=True, scale=random(144)[:72], shift=random(144)[72:])
    whole = [part.contiguous() for part in (x, actions)]
    moved = denoising.euler_step(x, norm, out, bias[:8], actions, 10)
    assert torch.equal(moved, denoising.euler_step(whole[0], norm, out, bias[:8], whole[1], 10))
    embedded = denoising.embed_actions(actions, into, bias, torch.float32)
    assert torch.equal(embedded, denoising.embed_actions(whole[1], into, bias, torch.float32))
