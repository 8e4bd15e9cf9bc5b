"""The kernel of `epilogue`."""

from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels.blocks_triton import block_diagonal


def launch(
    out: Tensor,
    accumulators: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    row_sum: Tensor | None,
    bias: Tensor | None,
    matrices: Tensor | None,
    hadamard: int,
    *,
    part: tl.dtype = tl.bfloat16,
) -> None:
    """Fills out [M, N]; arguments as `epilogue.epilogue`, contiguous, a rotation as matrices or by its size.

    A rotation multiplies rows as the sum of two numbers of type `part`: of bf16 they hold 16 bits of the 24.
    """
    m, n = out.shape
    block = hadamard if matrices is None else matrices.shape[-1]
    rows, columns = (16 if m <= 64 else 64, max(block, 64)) if block else (4 if m < 256 else 8, 256)
    _epilogue[triton.cdiv(n, columns), triton.cdiv(m, rows)](
        out, accumulators, act_scale, weight_scale, row_sum, bias, matrices, m, n,
        HAS_SUM=row_sum is not None, HAS_BIAS=bias is not None, HADAMARD=hadamard > 0, BLOCK=block,
        NORM=hadamard**-0.5 if hadamard else 1.0, PART=part, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip


@triton.jit
def _epilogue(
    out, accumulators, act_scale, weight_scale, row_sum, bias, matrices, m, n,
    HAS_SUM: tl.constexpr, HAS_BIAS: tl.constexpr, HADAMARD: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < m, column < n
    at = row[:, None] * n + column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    y = tl.load(accumulators + at, mask=inside, other=0)
    if HAS_SUM:
        y -= 8 * tl.load(row_sum + row, mask=in_rows, other=0)[:, None]
    y = y.to(tl.float32) * tl.load(weight_scale + column, mask=in_columns, other=0.0)[None, :]
    y *= tl.load(act_scale + row, mask=in_rows, other=0.0)[:, None]
    if BLOCK > 0:  # one product with the block-diagonal [COLUMNS, COLUMNS] part of the rotation
        rotation = block_diagonal(matrices, column, n, COLUMNS, BLOCK, HADAMARD).to(PART)
        high = y.to(PART)
        low = (y - high.to(tl.float32)).to(PART)
        y = tl.dot(high, rotation, tl.dot(low, rotation)) * NORM
    if HAS_BIAS:
        y += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
