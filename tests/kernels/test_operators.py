"""Every custom operator under torch's own checks: schema, fake tensors, autograd, tracing.

Without a GPU the kernels run in the interpreter; BitBLAS' operator is checked in test_bitblas_gpu.
"""

from collections.abc import Iterator
import contextlib

import interpreted
import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
OPERATORS = torch.ops.openpi_duquant

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's, of gates far below zero
]


@pytest.fixture(autouse=True)
def somewhere_to_run() -> Iterator[None]:
    with contextlib.nullcontext() if GPU else interpreted.operators():
        yield


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(0, 256, shape, device=DEVICE, dtype=torch.uint8).view(dtype)


def rotations(width: int, block: int) -> Tensor:
    return random(width // block, block, block, dtype=torch.bfloat16)


def test_the_transform() -> None:
    x, permutation = random(3, 64), torch.randperm(64, device=DEVICE)
    for operands in (
        (x, None, None, None, None, 0, False, False),
        (x, random(64), random(64), permutation, None, 16, False, True),
        (random(3, 128), None, None, permutation, rotations(64, 16), 0, True, False),
        (random(3, 80)[:, :64], None, None, None, None, 16, False, False),
    ):
        torch.library.opcheck(OPERATORS.fused_transform.default, operands)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_matmul(bits: int) -> None:
    m, n, k = 3, 32, 64
    weight = integers(n, k // 2, dtype=torch.uint8) if bits == 4 else integers(n, k)
    scales = [torch.rand(size, 1, device=DEVICE) for size in (m, n)]
    given = integers(m, k), scales[0], weight, scales[1]
    for rest in (
        (None, None, 0, None, None, None, None, False),
        (random(n), None, 16, None, None, random(m, n), random(n, dtype=torch.float32), False),
        (None, rotations(n, 16), 0, None, None, random(m, n), None, False),
        (random(n), None, 0, random(m, 16), random(m, 16), None, None, False),
        (random(n), None, 0, None, None, None, None, True),
    ):
        torch.library.opcheck(OPERATORS.triton_matmul.default, (*given, *rest, DTYPE))


def test_the_epilogue() -> None:
    sums, row_sum = (torch.randint(-999, 999, shape, dtype=torch.int32, device=DEVICE) for shape in ((3, 64), (3, 1)))
    scales = torch.rand(3, 1, device=DEVICE), torch.rand(64, 1, device=DEVICE)
    for rest in ((None, None, None, 0), (row_sum, random(64), None, 16), (row_sum, None, rotations(64, 16), 0)):
        torch.library.opcheck(OPERATORS.epilogue.default, (sums, *scales, *rest, DTYPE))


def test_the_rotary_embedding() -> None:
    torch.library.opcheck(OPERATORS.rotary.default, (random(2, 5, 160), random(2, 5, 16), random(2, 5, 16)))


def test_the_layer_norm() -> None:
    for shape in ((2, 5, 72), (3, 1152)):
        for bias in (None, random(shape[-1])):
            given = random(*shape), random(*shape), bias, random(shape[-1]), random(shape[-1])
            torch.library.opcheck(OPERATORS.add_layer_norm.default, (*given, 1e-6))


def test_embedded_patches() -> None:
    images = torch.randint(256, (2, 28, 28, 3), dtype=torch.uint8, device=DEVICE)
    parts, offset = torch.randn(3, 192, 72, device=DEVICE).bfloat16(), torch.randn(16, 72, device=DEVICE)
    torch.library.opcheck(OPERATORS.embed_patches.default, (images, parts, offset, 7, DTYPE))


def test_the_ends_of_a_denoising_step() -> None:
    actions = torch.randn(2, 3, 7, device=DEVICE)
    into, out = torch.randn(72, 7, device=DEVICE), torch.randn(7, 72, device=DEVICE)
    torch.library.opcheck(OPERATORS.embed_actions.default, (actions, into, into[:, 0].contiguous(), DTYPE))
    scale = torch.randn(72, device=DEVICE)
    for norm in ((None, None), (scale, None), (scale, scale)):
        given = random(2, 4, 72), *norm, out, out[:, 0].contiguous(), actions, 10
        torch.library.opcheck(OPERATORS.euler_step.default, given)


def test_attention() -> None:
    q, k, v = random(2, 3, 8, 16), random(2, 13, 16), random(2, 13, 16)
    visible, own = torch.rand(2, 13, device=DEVICE) < 0.6, (random(2, 3, 16), random(2, 3, 16))
    for rest in ((None, None, None, False), (visible, None, None, False), (visible, *own, True)):
        torch.library.opcheck(OPERATORS.attend.default, (q, k, v, *rest))
        torch.library.opcheck(OPERATORS.attend_quantized.default, (q, k, v, *rest))


def test_attention_of_patches() -> None:
    torch.library.opcheck(OPERATORS.attend_patches.default, random(2, 256, 3, 2, 72).unbind(2))


def test_what_stands_around_a_matmul() -> None:
    x = random(2, 3, 96)
    for operands in ((x, None, None, True, False), (x, random(96), None, False, True), (x, *random(2, 48), True, True)):
        torch.library.opcheck(OPERATORS.prologue.default, operands)
    for gate in (None, random(96, dtype=torch.float32)):
        torch.library.opcheck(OPERATORS.add_gated.default, (x, random(2, 3, 96), gate))
