"""Rotary embedding against a walk through the formula in fp64; without a GPU, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant.kernels import reference
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.rotary import rotary
from openpi_duquant.kernels.tiles import Tile

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 1e-2 if GPU else 1e-5


def rotated_by_hand(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel by channel: pairs (i, i + D/2) of every head but the last turn together."""
    out = qkv.double().clone()
    half = cos.shape[-1] // 2
    for head in range(qkv.shape[-1] // (2 * half) - 1):
        for i in range(2 * half * head, 2 * half * head + half):
            first, second, angle = qkv[..., i].double(), qkv[..., i + half].double(), i % half
            c, s = cos[..., angle].double(), sin[..., angle].double()
            out[..., i] = first * c - second * s
            out[..., i + half] = second * c + first * s
    return out


def random(*shape: int) -> Tensor:
    """Standard normal."""
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., D] of random angles, the same for both halves."""
    angle = torch.rand(*shape[:-1], shape[-1] // 2, device=DEVICE).repeat(*[1] * (len(shape) - 1), 2) * 6
    return angle.cos().to(DTYPE), angle.sin().to(DTYPE)


@pytest.mark.parametrize("heads", [0, 1, 8])
def test_it_is_the_formula(heads: int) -> None:
    torch.manual_seed(0)
    qkv, (cos, sin) = random(2, 5, (heads + 2) * 16), angles(2, 5, 16)
    expected = rotated_by_hand(qkv, cos, sin)
    actual = rotary(qkv, cos, sin)
    assert torch.equal(actual[..., -16:], qkv[..., -16:])
    assert (actual.double() - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.triton
@pytest.mark.parametrize("heads", [0, 1, 8])
def test_the_kernel_is_the_formula(heads: int) -> None:
    from openpi_duquant.kernels import rotary_triton  # noqa: PLC0415

    torch.manual_seed(0)
    qkv, (cos, sin) = random(2, 5, (heads + 2) * 16), angles(2, 5, 16)
    turned = torch.full_like(qkv, torch.nan)
    rotary_triton.launch(turned, qkv, cos, sin)
    expected = rotated_by_hand(qkv, cos, sin)
    assert torch.equal(turned[..., -16:], qkv[..., -16:])
    assert (turned.double() - expected).abs().max() < TOLERANCE * expected.abs().max()


def product(m: int, n: int, k: int, bits: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Codes, scales and a repacked weight, as `matmul_triton.launch` takes them; and what they give, in fp64."""
    a, w = torch.randint(-127, 128, (m, k)), torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k))
    scales = [(torch.rand(size, 1) + 0.5) / 100 for size in (m, n)]
    y = (a.double() @ w.double().T) * scales[0].double() * scales[1].double().T
    problem = Problem(n, k, bits, 8, 1, "none", 0, DTYPE)
    weight = triton_matmul.repack(problem, packing.pack(w.to(torch.int8), bits))
    given = a.to(torch.int8), scales[0], weight, scales[1]
    return tuple(part.to(DEVICE) for part in given), y.to(DEVICE)


@pytest.mark.triton
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [16, 32, 64])
@pytest.mark.parametrize(("m", "heads", "size"), [(1, 0, 16), (3, 8, 16), (17, 2, 32), (33, 1, 64)])
@pytest.mark.parametrize("extra", ["none", "bias", "gated residual"])
def test_a_matmul_turns_what_it_gives(extra: str, m: int, heads: int, size: int, columns: int, bits: int) -> None:
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415

    torch.manual_seed(1)
    n = (heads + 2) * size
    operands, y = product(m, n, 72, bits)
    (cos, sin), bias = angles(m, size), random(n) if extra == "bias" else None
    residual, gate = (random(m, n), random(n)) if extra == "gated residual" else (None, None)
    expected = rotated_by_hand(y if bias is None else y + bias, cos, sin)
    expected = expected if residual is None else residual + gate * expected
    out, tile = torch.full((m, n), torch.nan, device=DEVICE, dtype=DTYPE), Tile(16, columns, 32, 2, 4, 2)
    after = bias, None, 0, cos, sin, residual, gate
    matmul_triton.launch(out, *operands, *after, tile, interpreted=not GPU)
    assert (out.double() - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_an_epilogue_turns_gates_and_adds_in_this_order() -> None:
    y, residual, gate, turned = random(2, 3, 48), random(2, 3, 48), random(48), angles(2, 3, 16)
    expected = residual + gate * rotated_by_hand(y, *turned)
    actual = Epilogue(turned, residual, gate).apply(y)
    assert (actual.double() - expected).abs().max() < TOLERANCE * expected.abs().max()
    by_token = Epilogue(turned, residual, gate).by_token(6)
    assert torch.equal(by_token.apply(y.flatten(0, 1)), actual.flatten(0, 1))
    assert reference.NO_EPILOGUE.apply(y) is y


def test_angles_of_some_tokens_alone_are_refused() -> None:
    qkv, turned = random(2, 3, 48), angles(1, 3, 16)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        rotary(qkv, *turned)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        Epilogue(turned).by_token(6)
