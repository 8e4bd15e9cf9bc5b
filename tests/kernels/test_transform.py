"""The fused transform: its definition against the formula in fp64, its kernels against its definition.

Without a GPU the kernels run in Triton's interpreter. There bf16 is left out: the interpreter rounds it towards zero.
"""

import math

from by_formula import DEVICE
from by_formula import PROLOGUES
from by_formula import by_formula
from by_formula import check
from by_formula import inputs
from by_formula import prologue_of
from by_formula import sylvester
import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import reference
from openpi_duquant.kernels import transform
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.transforms import Transform

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


def orthogonal(width: int, block: int) -> Tensor:
    """Random orthogonal matrices of all blocks, in bf16."""
    return torch.linalg.qr(torch.randn(width // block, block, block))[0].bfloat16().contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("kind", ["none", "hadamard", "matrix"])
def test_the_definition_is_the_formula(name: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, block = 96, 32
    prologue = prologue_of(name, width)
    x = inputs(5, width, dtype, geglu=prologue.geglu)
    matrices = {"none": None, "hadamard": [sylvester(block)] * 3, "matrix": list(orthogonal(width, block))}[kind]
    rotation = {"none": None, "hadamard": block, "matrix": matrices and torch.stack(matrices).to(DEVICE)}[kind]
    permutation = torch.randperm(width, device=DEVICE)
    actual = reference.fused_transform(x, Transform(None, permutation, rotation), prologue)
    check(*actual, by_formula(x, prologue, permutation, matrices))


def run_kernel(x: Tensor, width: int, given: Transform, prologue: Prologue) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel into poisoned outputs; on a CPU in the interpreter, which must not be given 16-bit dots."""
    from openpi_duquant.kernels import transform_triton  # noqa: PLC0415

    codes = torch.full((len(x), width), -99, dtype=torch.int8, device=DEVICE)
    act_scale = torch.full((len(x), 1), -1.0, device=DEVICE)
    row_sum = torch.full((len(x), 1), -(2**20), dtype=torch.int32, device=DEVICE)
    rotation = given.rotation
    hadamard, matrices = (rotation, None) if isinstance(rotation, int) else (0, rotation)
    transform_triton.launch(
        x, prologue.scale, prologue.shift, given.permutation, matrices, hadamard, (codes, act_scale, row_sum),
        geglu=prologue.geglu, norm=prologue.norm, float32=not GPU or x.dtype == torch.float32,
    )  # fmt: skip
    return codes, act_scale, row_sum


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, of gates far below zero
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "block"), [(1, 64, 16), (3, 192, 64), (5, 384, 128), (67, 96, 32)])
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("kind", ["none", "hadamard", "matrix"])
@pytest.mark.parametrize("permuted", [True, False])
def test_the_kernel_is_the_definition(
    name: str, kind: str, dtype: torch.dtype, rows: int, width: int, block: int, *, permuted: bool
) -> None:
    torch.manual_seed(1)
    prologue = prologue_of(name, width)
    x = inputs(rows, width, dtype, geglu=prologue.geglu)
    rotation = {"none": None, "hadamard": block, "matrix": orthogonal(width, block).to(DEVICE)}[kind]
    given = Transform(None, torch.randperm(width, device=DEVICE) if permuted else None, rotation)
    codes, act_scale, row_sum = run_kernel(x, width, given, prologue)
    expected, scale, _ = reference.fused_transform(x, given, prologue)
    torch.testing.assert_close(act_scale, scale, rtol=2e-3 if dtype != torch.float32 else 1e-5, atol=0)
    difference = (codes.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= max(1, 1e-3 * difference.numel())
    assert torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32))


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["none", "hadamard", "matrix"])
@pytest.mark.parametrize("run", ["definition", "kernel"])
def test_what_is_no_number_is_seen_in_its_row_alone(kind: str, run: str, value: float) -> None:
    torch.manual_seed(4)
    x = torch.randn(3, 64, device=DEVICE).to(DTYPES[-1])  # of 16 bits: on a GPU by butterflies
    x[1, 5] = value
    given = Transform(None, None, {"none": None, "hadamard": 16, "matrix": orthogonal(64, 16).to(DEVICE)}[kind])
    _, act_scale, _ = run_kernel(x, 64, given, Prologue()) if run == "kernel" else reference.fused_transform(x, given)
    assert act_scale.isfinite().flatten().tolist() == [True, False, True]
    assert act_scale[1].isnan() or not math.isnan(value)


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["hadamard", "matrix"])
def test_rows_may_lie_apart(kind: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(6, 200, device=DEVICE)[::2, :128]
    given = Transform(None, None, 32 if kind == "hadamard" else orthogonal(128, 32).to(DEVICE))
    codes, _, _ = run_kernel(x, 128, given, Prologue())
    assert (codes.int() - reference.fused_transform(x, given)[0].int()).abs().max() <= 1


@pytest.mark.triton
def test_matrices_may_lie_in_another_order() -> None:
    torch.manual_seed(2)
    x, matrices = torch.randn(5, 128, device=DEVICE), orthogonal(128, 32).to(DEVICE)
    given = Transform(None, None, matrices.mT.contiguous().mT)
    codes, _, _ = run_kernel(x, 128, given, Prologue())
    expected = reference.fused_transform(x, Transform(None, None, matrices))[0]
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.triton
def test_many_rows_take_two_at_a_time() -> None:
    torch.manual_seed(3)
    x = torch.randn(265, 64, device=DEVICE)
    codes, act_scale, row_sum = run_kernel(x, 64, Transform(None, None, 64), Prologue())
    check(codes, act_scale, row_sum, by_formula(x, Prologue(), None, [sylvester(64)]))


def test_what_the_kernels_do_not_take_is_said() -> None:
    assert transform.why_not_fused(Transform(None, None, 64), 2048) is None
    assert "before" in transform.why_not_fused(Transform(orthogonal(64, 16), None, None), 64)
    assert "256" in transform.why_not_fused(Transform(None, None, 256), 2048)
    assert "16385" in transform.why_not_fused(Transform(), 16385)


def test_without_a_gpu_the_definition_runs() -> None:
    x = torch.randn(3, 64)
    for actual, expected in zip(
        transform.fused_transform(x, Transform(None, None, 16)), reference.fused_transform(x, Transform(None, None, 16))
    ):
        assert torch.equal(actual, expected)
