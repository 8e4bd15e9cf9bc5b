"""The epilogue kernel in Triton's interpreter, against the same in fp64; on a GPU see test_bitblas_gpu."""

import importlib.util
import pathlib
import types

import pytest
import torch
from torch import Tensor

from openpi_duquant import transforms
from openpi_duquant.kernels import epilogue


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The kernel's module, loaded for the interpreter (which cannot multiply bf16: parts of fp16 take its place)."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = pathlib.Path(epilogue.__file__).with_name("epilogue_triton.py")
    spec = importlib.util.spec_from_file_location("interpreted_epilogue", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rotation(kind: str, block: int, n: int) -> transforms.Rotation:
    if kind == "matrix":
        return torch.randn(n // block, block, block).bfloat16()
    return block if kind == "hadamard" else None


def exact(y: Tensor, rotated_by: transforms.Rotation, bias: Tensor | None) -> Tensor:
    y = transforms.rotate(y, rotated_by)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("shape", [(1, 256), (3, 128), (37, 384)])
@pytest.mark.parametrize(
    ("kind", "block"),
    [("none", 0), ("hadamard", 4), ("hadamard", 64), ("hadamard", 128), ("matrix", 8), ("matrix", 16), ("matrix", 128)],
)
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_the_kernel_is_its_definition(
    kernel: types.ModuleType, shape: tuple[int, int], kind: str, block: int, bias_dtype: torch.dtype, *, with_sum: bool
) -> None:
    torch.manual_seed(0)
    m, n = shape
    sums = torch.randint(-20000, 20000, (m, n), dtype=torch.int32)
    act_scale, weight_scale = torch.rand(m, 1) + 0.01, (torch.rand(n, 1) + 0.01) / 100
    row_sum = torch.randint(-1000, 1000, (m, 1), dtype=torch.int32) if with_sum else None
    bias = None if bias_dtype is None else (torch.randn(n) * 1000).to(bias_dtype)
    rotated_by = rotation(kind, block, n)
    out = torch.full((m, n), torch.nan)
    matrices, hadamard = (rotated_by, 0) if isinstance(rotated_by, Tensor) else (None, rotated_by or 0)
    kernel.launch(out, sums, act_scale, weight_scale, row_sum, bias, matrices, hadamard, part=kernel.tl.float16)
    whole = sums - 8 * row_sum if with_sum else sums
    expected = exact(whole.double() * weight_scale.double().T * act_scale.double(), rotated_by, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_the_operator_gives_shape_and_dtype_without_data() -> None:
    with torch.device("meta"):
        y = epilogue.epilogue(
            torch.empty(3, 32, dtype=torch.int32), torch.empty(3, 1), torch.empty(32, 1), None, 16, torch.half
        )
    assert (y.shape, y.dtype, y.device.type) == ((3, 32), torch.half, "meta")
