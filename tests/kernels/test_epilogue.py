"""The epilogue kernel against the same in fp64; without a GPU, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from openpi_duquant import transforms
from openpi_duquant.kernels import epilogue

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = 1e-5 if GPU else 1e-6  # of a rotation in two parts of bf16; of fp16 in the interpreter, which has no bf16


def rotation(kind: str, block: int, n: int) -> transforms.Rotation:
    if kind == "matrix":
        return torch.randn(n // block, block, block, device=DEVICE).bfloat16()
    return block if kind == "hadamard" else None


def exact(y: Tensor, rotated_by: transforms.Rotation, bias: Tensor | None) -> Tensor:
    y = transforms.rotate(y, rotated_by)
    return y if bias is None else y + bias.double()


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(1, 256), (3, 128), (37, 384)])
@pytest.mark.parametrize(
    ("kind", "block"),
    [("none", 0), ("hadamard", 4), ("hadamard", 64), ("hadamard", 128), ("matrix", 8), ("matrix", 16), ("matrix", 128)],
)
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_the_kernel_is_its_definition(
    shape: tuple[int, int], kind: str, block: int, bias_dtype: torch.dtype, *, with_sum: bool
) -> None:
    from openpi_duquant.kernels import epilogue_triton  # noqa: PLC0415

    torch.manual_seed(0)
    m, n = shape
    sums = torch.randint(-20000, 20000, (m, n), dtype=torch.int32, device=DEVICE)
    act_scale = torch.rand(m, 1, device=DEVICE) + 0.01
    weight_scale = (torch.rand(n, 1, device=DEVICE) + 0.01) / 100
    row_sum = torch.randint(-1000, 1000, (m, 1), dtype=torch.int32, device=DEVICE) if with_sum else None
    bias = None if bias_dtype is None else (torch.randn(n, device=DEVICE) * 1000).to(bias_dtype)
    rotated_by = rotation(kind, block, n)
    out = torch.full((m, n), torch.nan, device=DEVICE)
    matrices, hadamard = (rotated_by, 0) if isinstance(rotated_by, Tensor) else (None, rotated_by or 0)
    part = epilogue_triton.tl.bfloat16 if GPU else epilogue_triton.tl.float16
    epilogue_triton.launch(out, sums, act_scale, weight_scale, row_sum, bias, matrices, hadamard, part=part)
    whole = sums - 8 * row_sum if with_sum else sums
    expected = exact(whole.double() * weight_scale.double().T * act_scale.double(), rotated_by, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=TOLERANCE * expected.abs().max().item())


def test_the_operator_gives_shape_and_dtype_without_data() -> None:
    with torch.device("meta"):
        y = epilogue.epilogue(
            torch.empty(3, 32, dtype=torch.int32), torch.empty(3, 1), torch.empty(32, 1), None, 16, torch.half
        )
    assert (y.shape, y.dtype, y.device.type) == ((3, 32), torch.half, "meta")
