"""Norm, GeGLU and residual around a floating-point matmul against the formulas in fp64.

Without a GPU the kernels run in Triton's interpreter.
"""

from collections.abc import Iterator
import contextlib
import math
import types

import interpreted
import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import around
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
IN_KERNEL = [dtype for dtype in TOLERANCE if GPU or dtype != torch.bfloat16]  # the interpreter cuts bf16 off

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's, of gates far below zero
]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU the operators run all the same, in the interpreter."""
    if not GPU:
        monkeypatch.setattr(around, "_on_gpu", lambda _: True)
    with contextlib.nullcontext() if GPU else interpreted.operators():
        yield


def by_formula(x: Tensor, prologue: Prologue) -> Tensor:
    y = x.double()
    if prologue.geglu:
        gate, up = y.chunk(2, -1)
        y = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if prologue.norm:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = y * (1 if prologue.scale is None else 1 + prologue.scale.double())
        y = y + (0 if prologue.shift is None else prologue.shift.double())
    return y


@pytest.mark.parametrize("dtype", IN_KERNEL)
@pytest.mark.parametrize("shape", [(1, 16), (3, 1000), (2, 5, 64), (1, 4096)])
@pytest.mark.parametrize("kind", ["norm", "gain", "modulated", "geglu", "geglu norm"])
def test_a_prologue_is_its_formula(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    geglu, norm = "geglu" in kind, kind != "geglu"
    scale = torch.randn(shape[-1], device=DEVICE).to(dtype) if kind in ("gain", "modulated") else None
    shift = torch.randn(shape[-1], device=DEVICE) if kind == "modulated" else None
    prologue = Prologue(geglu=geglu, norm=norm, scale=scale, shift=shift)
    x = torch.randn(*shape[:-1], shape[-1] * (1 + geglu), device=DEVICE).to(dtype)
    actual, expected = around.apply_prologue(x, prologue), by_formula(x, prologue)
    assert (actual.shape, actual.dtype) == (shape, dtype)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(actual, prologue.apply(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", IN_KERNEL)
@pytest.mark.parametrize("shape", [(1, 16), (3, 1000), (2, 5, 64)])
@pytest.mark.parametrize("gated", [True, False])
def test_a_residual_is_added(shape: tuple[int, ...], dtype: torch.dtype, *, gated: bool) -> None:
    torch.manual_seed(0)
    y, residual = torch.randn(2, *shape, device=DEVICE).to(dtype)
    epilogue = Epilogue(residual=residual, gate=torch.randn(shape[-1], device=DEVICE) if gated else None)
    actual = around.apply_epilogue(y, epilogue)
    expected = residual.double() + y.double() * (epilogue.gate.double() if gated else 1)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(actual, epilogue.apply(y), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_nothing_is_launched_where_there_is_nothing_to_do() -> None:
    x = torch.randn(2, 16, device=DEVICE)
    assert around.apply_prologue(x, Prologue()) is x
    assert around.apply_epilogue(x, Epilogue()) is x


def test_a_compiler_sees_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    somewhere = types.SimpleNamespace(is_cuda=True)
    assert around._on_gpu(somewhere)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not around._on_gpu(somewhere)
