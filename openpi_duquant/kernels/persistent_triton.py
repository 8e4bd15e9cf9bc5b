"""The kernel of `persistent`: the operations of a decoder layer one after the other, in programs that stay.

They are those of the kernels that are launched one by one, cut up the same way. Between two of them every program waits
for all others, which takes a microsecond on an H200: less than a launch.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels.attention_triton import combine_token
from openpi_duquant.kernels.attention_triton import shape_for
from openpi_duquant.kernels.persistent_parts_triton import add_sums
from openpi_duquant.kernels.persistent_parts_triton import arrive
from openpi_duquant.kernels.persistent_parts_triton import as_bytes
from openpi_duquant.kernels.persistent_parts_triton import attend
from openpi_duquant.kernels.persistent_parts_triton import multiply
from openpi_duquant.kernels.persistent_parts_triton import norm_row
from openpi_duquant.kernels.persistent_parts_triton import prefetch
from openpi_duquant.kernels.persistent_parts_triton import read_ahead
from openpi_duquant.kernels.persistent_parts_triton import read_factors
from openpi_duquant.kernels.persistent_parts_triton import read_keys
from openpi_duquant.kernels.persistent_parts_triton import read_part
from openpi_duquant.kernels.persistent_parts_triton import read_permutation
from openpi_duquant.kernels.persistent_parts_triton import round_row
from openpi_duquant.kernels.persistent_parts_triton import sum_up
from openpi_duquant.kernels.persistent_parts_triton import wait_for
from openpi_duquant.kernels.reference import NORM_EPS
from openpi_duquant.kernels.rows_triton import gated
from openpi_duquant.kernels.rows_triton import read_modulation

if TYPE_CHECKING:
    from openpi_duquant.kernels.persistent import Matrix
    from openpi_duquant.kernels.persistent import Stack

OPERATIONS = tl.constexpr(9)
"""Of a layer, each of which reads what the one before wrote."""

_SPLITS = 2  # the kernel is compiled for multiples of so many parts of the keys
_ROWS = 16  # pairs of a query and a head that attention has in a tile
_FEWEST_CHANNELS = 32  # bytes of weights that the tensor cores take at once


def launch(
    x: Tensor,
    stack: "Stack",
    norms: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    state_first: bool,
    interpreted: bool = False,
) -> Tensor:
    """What the layers make of x [B, S, W]; arguments as `persistent.run_layers`, contiguous."""
    y = x.clone()
    (batch, length, width), (depth, _, prefix, head) = y.shape, keys.shape
    tokens, heads = batch * length, stack.qkv.weight.shape[1] // head - 2
    mlp = stack.gate_up.weight.shape[1] // 2
    exact = interpreted or y.dtype == torch.float32
    if interpreted:
        programs, step = 3, 16
    else:
        about = torch.cuda.get_device_properties(y.device)
        memory, programs = about.shared_memory_per_block_optin, about.multi_processor_count
        step = shape_for(length * heads, prefix, exact=exact, shared_memory=memory, processors=programs).keys
    blocks, shared = triton.cdiv(length * heads, _ROWS), triton.cdiv(prefix, step)
    splits = shared + triton.cdiv(length, step)
    most = triton.cdiv(splits, _SPLITS) * _SPLITS
    parts = batch, most, blocks * _ROWS
    fp32 = {"dtype": torch.float32}
    scratch = (
        y.new_empty(tokens, max(mlp, heads * head, width), dtype=torch.int8), y.new_empty(tokens, 1, **fp32),
        y.new_empty(tokens, (heads + 2) * head), y.new_empty(*parts, head, **fp32), y.new_empty(*parts, 2, **fp32),
        y.new_empty(tokens, 2 * mlp), y.new_empty(tokens, width),
    )  # fmt: skip
    zeros = y.new_zeros(tokens * width + 1, dtype=torch.int32)
    matrices = stack.qkv, stack.o, stack.gate_up, stack.down
    operands = (
        y, zeros, zeros[-1:], *(part for matrix in matrices for part in matrix[:3]), norms, keys, values, visible, cos,
        sin, *scratch, tokens, length, batch, prefix, blocks, splits, shared,
    )  # fmt: skip
    columns = 64 if width % 64 == 0 and programs >= 64 else 16
    constants = {
        "W": width, "MLP": mlp, "HEADS": heads, "PADDED": triton.next_power_of_2(heads), "D": head,
        "BM": max(16, triton.next_power_of_2(tokens)), "ROWS": _ROWS, "KEYS": step, "SPLITS": most,
        "ADAPTIVE": norms.shape[-1] == 3 * width, "VISIBLE": visible is not None, "STATE_FIRST": state_first,
        "EPS": NORM_EPS, "SCALE": head**-0.5 * math.log2(math.e), "EXACT": exact, "INTERPRETED": interpreted,
        "QKV_COLUMNS": min(_columns(stack.qkv, programs), head), "UP_COLUMNS": _columns(stack.gate_up, programs),
        "COLUMNS": columns, "O_PARTS": _parts(stack.o, columns, programs),
        "DOWN_PARTS": _parts(stack.down, columns, programs), "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    for name, matrix in (("QKV", stack.qkv), ("UP", stack.gate_up), ("DOWN", stack.down)):
        constants[f"{name}_PERMUTE"], constants[f"{name}_BLOCK"] = matrix.permutation is not None, matrix.hadamard
    if not interpreted:
        _layers[(programs,)](*operands, 0, depth, OPERATION=-1, launch_cooperative_grid=True, **constants)
        return y
    for layer in range(depth):  # programs of the interpreter run one after the other: they cannot wait
        for operation in range(OPERATIONS.value):
            _layers[(programs,)](*operands, layer, layer + 1, OPERATION=operation, **constants)
    _layers[(programs,)](*operands, 0, depth, OPERATION=OPERATIONS.value, **constants)
    return y


def _columns(matrix: "Matrix", programs: int) -> int:
    """Of a tile: the most that leave half of the programs or more something to do."""
    return next((columns for columns in (64, 32) if 2 * matrix.weight.shape[1] >= columns * programs), 16)


def _parts(matrix: "Matrix", columns: int, programs: int) -> int:
    """Into which the channels are cut, so that nearly all programs have something to do."""
    _, n, stored = matrix.weight.shape
    most = min(max(1, programs * columns // n), stored // _FEWEST_CHANNELS)
    return 1 << (most.bit_length() - 1)


@triton.jit(do_not_specialize=("tokens", "length", "batches", "prefix", "blocks", "splits", "shared", "first", "last"))
def _layers(
    y_ptr, all_sums_ptr, counter_ptr, qkv_ptr, qkv_scale_ptr, qkv_permutation_ptr, o_ptr, o_scale_ptr,
    o_permutation_ptr, up_ptr, up_scale_ptr, up_permutation_ptr, down_ptr, down_scale_ptr, down_permutation_ptr,
    norms_ptr, keys_ptr, values_ptr, visible_ptr, cos_ptr, sin_ptr, codes_ptr, act_scale_ptr, heads_ptr, sums_ptr,
    parts_ptr, hidden_ptr, normed_ptr, tokens, length, batches, prefix, blocks, splits, shared, first, last,
    W: tl.constexpr, MLP: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, ADAPTIVE: tl.constexpr,
    VISIBLE: tl.constexpr, STATE_FIRST: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr, QKV_COLUMNS: tl.constexpr, QKV_PERMUTE: tl.constexpr, QKV_BLOCK: tl.constexpr,
    UP_COLUMNS: tl.constexpr, UP_PERMUTE: tl.constexpr, UP_BLOCK: tl.constexpr, DOWN_PERMUTE: tl.constexpr,
    DOWN_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, O_PARTS: tl.constexpr, DOWN_PARTS: tl.constexpr,
    OPERATION: tl.constexpr,
):  # fmt: skip
    """Layers first to last - 1: all operations of each, or one of them. What an operation reads that is not computed
    here, it reads before it waits."""
    ALL: tl.constexpr = OPERATION < 0
    HEAD: tl.constexpr = (HEADS + 2) * D
    NORM: tl.constexpr = 3 * W if ADAPTIVE else W
    BYTES: tl.constexpr = D * keys_ptr.dtype.element_ty.primitive_bitwidth // 8
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, W)[None, :]
    for layer in range(first, last):
        done = (layer - first) * OPERATIONS
        norm = norms_ptr + layer * (2 * NORM)
        qkv = qkv_ptr + layer * (HEAD * (W // 2))
        o = o_ptr + layer * (W * (HEADS * D // 2))
        up = up_ptr + layer * (2 * MLP * (W // 2))
        down = down_ptr + layer * (W * (MLP // 2))
        cached = layer * batches * prefix * D
        if ALL or OPERATION == 0:
            source = read_permutation(qkv_permutation_ptr, layer, W, QKV_PERMUTE)
            scale, shift = read_modulation(norm, norm + W, channel, channel < W, SCALE=True, SHIFT=ADAPTIVE)
            factor, gate = read_factors(down_scale_ptr, norm - W, layer - 1, channel, W, ADAPTIVE)
            if ALL:
                next_qkv = qkv_ptr + (layer + 1) % last * (HEAD * (W // 2))
                prefetch(next_qkv, program * QKV_COLUMNS, HEAD, QKV_COLUMNS, W // 2)
                prefetch(o, program * 16, W, 16, HEADS * D // 2)
                prefetch(up, program * UP_COLUMNS, 2 * MLP, UP_COLUMNS, W // 2)
                prefetch(down, program * 16, W, 16, MLP // 2)
                prefetch(as_bytes(keys_ptr + cached), program * KEYS, batches * prefix, KEYS, BYTES)
                prefetch(as_bytes(values_ptr + cached), program * KEYS, batches * prefix, KEYS, BYTES)
                wait_for(counter_ptr, done * programs)
            for row in range(program, tokens, programs):
                x = add_sums(y_ptr, all_sums_ptr, act_scale_ptr, row, channel, factor, gate, layer > 0, W)
                x = norm_row(row, x, scale, shift, source, normed_ptr, W, QKV_PERMUTE, EPS)
                round_row(row, x, codes_ptr, act_scale_ptr, tokens, W, QKV_BLOCK, EXACT)
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 1:
            scales = qkv_scale_ptr + layer * HEAD
            w, scale, cos, sin = read_ahead(
                qkv, scales, cos_ptr, sin_ptr, program, tokens, HEAD, W, BM, QKV_COLUMNS, D
            )  # fmt: skip
            if ALL:
                wait_for(counter_ptr, (done + 1) * programs)
            multiply(
                w, scale, cos, sin, codes_ptr, act_scale_ptr, qkv, scales, cos_ptr, sin_ptr, heads_ptr, tokens, HEAD, W,
                BM, QKV_COLUMNS, D, INTERPRETED,
            )  # fmt: skip
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 2:
            keys, values = keys_ptr + cached, values_ptr + cached
            k, v, seen = read_keys(
                keys, values, visible_ptr, program, batches, blocks, splits, prefix, D, KEYS, VISIBLE
            )  # fmt: skip
            if ALL:
                wait_for(counter_ptr, (done + 2) * programs)
            for unit in range(program, blocks * splits * batches, programs):
                attend(
                    k, v, seen, heads_ptr, sums_ptr, parts_ptr, unit, blocks, splits, shared, length, SCALE, HEADS,
                    D, ROWS, KEYS, SPLITS, STATE_FIRST, EXACT,
                )  # fmt: skip
                later = unit + programs
                k, v, seen = read_keys(
                    keys, values, visible_ptr, later, batches, blocks, splits, prefix, D, KEYS, VISIBLE
                )  # fmt: skip
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 3:
            if ALL:
                wait_for(counter_ptr, (done + 3) * programs)
            for token in range(program, tokens, programs):
                combine_token(
                    token, codes_ptr, act_scale_ptr, act_scale_ptr, sums_ptr, parts_ptr, blocks * ROWS, length, splits,
                    SPLITS, HEADS, PADDED, D, y_ptr.dtype.element_ty, ROW_SUM=False,
                )  # fmt: skip
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 4:
            w = read_part(o, program, W, HEADS * D, COLUMNS, O_PARTS)
            if ALL:
                wait_for(counter_ptr, (done + 4) * programs)
            sum_up(w, codes_ptr, o, all_sums_ptr, tokens, W, HEADS * D, BM, COLUMNS, O_PARTS, INTERPRETED)
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 5:
            source = read_permutation(up_permutation_ptr, layer, W, UP_PERMUTE)
            scale, shift = read_modulation(
                norm + NORM, norm + NORM + W, channel, channel < W, SCALE=True, SHIFT=ADAPTIVE
            )
            factor, gate = read_factors(o_scale_ptr, norm + 2 * W, layer, channel, W, ADAPTIVE)
            if ALL:
                wait_for(counter_ptr, (done + 5) * programs)
            for row in range(program, tokens, programs):
                x = add_sums(y_ptr, all_sums_ptr, act_scale_ptr, row, channel, factor, gate, pending=True, W=W)
                x = norm_row(row, x, scale, shift, source, normed_ptr, W, UP_PERMUTE, EPS)
                round_row(row, x, codes_ptr, act_scale_ptr, tokens, W, UP_BLOCK, EXACT)
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 6:
            scales = up_scale_ptr + layer * (2 * MLP)
            w, scale, cos, sin = read_ahead(
                up, scales, cos_ptr, sin_ptr, program, tokens, 2 * MLP, W, BM, UP_COLUMNS, 0
            )  # fmt: skip
            if ALL:
                wait_for(counter_ptr, (done + 6) * programs)
            multiply(
                w, scale, cos, sin, codes_ptr, act_scale_ptr, up, scales, cos_ptr, sin_ptr, hidden_ptr, tokens, 2 * MLP,
                W, BM, UP_COLUMNS, 0, INTERPRETED,
            )  # fmt: skip
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 7:
            source = read_permutation(down_permutation_ptr, layer, MLP, DOWN_PERMUTE)
            if ALL:
                wait_for(counter_ptr, (done + 7) * programs)
            for row in range(program, tokens, programs):
                x = gated(hidden_ptr + row * (2 * MLP), source, source >= 0, MLP, GEGLU=True)
                round_row(row, x, codes_ptr, act_scale_ptr, tokens, MLP, DOWN_BLOCK, EXACT)
            if ALL:
                arrive(counter_ptr)
        if ALL or OPERATION == 8:
            w = read_part(down, program, W, MLP, COLUMNS, DOWN_PARTS)
            if ALL:
                wait_for(counter_ptr, (done + 8) * programs)
            sum_up(w, codes_ptr, down, all_sums_ptr, tokens, W, MLP, BM, COLUMNS, DOWN_PARTS, INTERPRETED)
            if ALL:
                arrive(counter_ptr)
    if ALL or OPERATION == OPERATIONS:
        gate_ptr = norms_ptr + last * (2 * NORM) - W
        factor, gate = read_factors(down_scale_ptr, gate_ptr, last - 1, channel, W, ADAPTIVE)
        if ALL:
            wait_for(counter_ptr, (last - first) * OPERATIONS * programs)
        for row in range(program, tokens, programs):
            add_sums(y_ptr, all_sums_ptr, act_scale_ptr, row, channel, factor, gate, pending=True, W=W)
