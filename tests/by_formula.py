"""What a fused transform gives, by the formula in fp64, and inputs for it."""

import math

import torch
from torch import Tensor

from openpi_duquant.kernels.reference import Prologue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROLOGUES = ("none", "norm", "gain", "modulated", "geglu", "geglu norm")


def sylvester(size: int) -> Tensor:
    """The normalised Hadamard matrix, by its definition."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


def prologue_of(name: str, width: int) -> Prologue:
    """The prologue of that name, with random tensors."""
    scale, shift = (0.3 * torch.randn(width, device=DEVICE) for _ in range(2))
    return {
        "none": Prologue(),
        "norm": Prologue(norm=True),
        "gain": Prologue(norm=True, scale=scale),
        "modulated": Prologue(norm=True, scale=scale, shift=shift),
        "geglu": Prologue(geglu=True),
        "geglu norm": Prologue(geglu=True, norm=True),
    }[name]


def by_formula(x: Tensor, prologue: Prologue, permutation: Tensor | None, matrices: list[Tensor] | None) -> Tensor:
    """What is rounded to int8, in fp64 but for the roundings to the type of x that the host makes."""
    dtype, y = x.dtype, x.double()
    if prologue.geglu:
        gate, up = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
        gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        y = (gelu.to(dtype).double() * up).to(dtype).double()
    if prologue.norm:
        y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
        y = y * (1 if prologue.scale is None else 1 + prologue.scale.double())
        y = (y + (0 if prologue.shift is None else prologue.shift.double())).to(dtype).double()
    if permutation is not None:
        y = y[:, permutation]
    if matrices is not None:
        parts = y.split(len(matrices[0]), dim=1)
        y = torch.cat([part @ matrix.double().to(y.device) for part, matrix in zip(parts, matrices, strict=True)], 1)
    return y


def check(codes: Tensor, act_scale: Tensor, row_sum: Tensor, y: Tensor) -> None:
    """Codes within one step of y's, on less than 0.1% of the elements (or a few of them); scales and sums right."""
    largest = y.abs().amax(1, keepdim=True)
    expected = torch.where(largest > 0, largest / 127, 1.0)
    torch.testing.assert_close(act_scale, expected.float(), rtol=2e-3, atol=0)
    difference = (codes.double() - (y / act_scale.double()).round()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= max(2, 1e-3 * difference.numel())
    assert torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32))


def inputs(rows: int, width: int, dtype: torch.dtype, *, geglu: bool) -> Tensor:
    """Random rows with outliers, the last one zeros where there are several."""
    x = torch.randn(rows, width * (2 if geglu else 1), device=DEVICE)
    x[:, 3] *= 20
    if rows > 1:
        x[-1] = 0
    return x.to(dtype)
