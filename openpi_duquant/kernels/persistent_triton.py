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
from openpi_duquant.kernels.matmul_triton import columns_of
from openpi_duquant.kernels.matmul_triton import read_angles
from openpi_duquant.kernels.matmul_triton import read_weights
from openpi_duquant.kernels.matmul_triton import sums_of
from openpi_duquant.kernels.matmul_triton import turned
from openpi_duquant.kernels.reference import NORM_EPS
from openpi_duquant.kernels.transform_triton import gated
from openpi_duquant.kernels.transform_triton import modulate
from openpi_duquant.kernels.transform_triton import read_modulation
from openpi_duquant.kernels.transform_triton import transform_rows

if TYPE_CHECKING:
    from openpi_duquant.kernels.persistent import Matrix
    from openpi_duquant.kernels.persistent import Stack

OPERATIONS = 9
"""Of a layer, each of which reads what the one before wrote."""

_ROWS = 16  # pairs of a query and a head that attention has in a tile
_FEWEST_CHANNELS = 32  # bytes of weights that the tensor cores take at once


def launch(
    y: Tensor,
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
) -> None:
    """Runs y [B, S, W] through all layers, in its place; arguments as `persistent.run_layers`, contiguous."""
    (batch, length, width), (depth, _, prefix, head) = y.shape, keys.shape
    tokens, heads = batch * length, stack.qkv.weight.shape[1] // head - 2
    mlp = stack.gate_up.weight.shape[1] // 2
    exact = interpreted or y.dtype == torch.float32
    if interpreted:
        programs, step = 3, 16
    else:
        about = torch.cuda.get_device_properties(y.device)
        memory, programs = about.shared_memory_per_block_optin, about.multi_processor_count
        step = shape_for(length * heads, prefix, exact=exact, shared_memory=memory).keys
    blocks, shared = triton.cdiv(length * heads, _ROWS), triton.cdiv(prefix, step)
    splits = shared + triton.cdiv(length, step)
    parts = batch, splits, blocks * _ROWS
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
        sin, *scratch, tokens, length, batch, prefix, blocks,
    )  # fmt: skip
    columns = 64 if width % 64 == 0 and programs >= 64 else 16
    constants = {
        "W": width, "MLP": mlp, "HEADS": heads, "PADDED": triton.next_power_of_2(heads), "D": head,
        "BM": max(16, triton.next_power_of_2(tokens)), "ROWS": _ROWS, "KEYS": step, "SPLITS": splits, "SHARED": shared,
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
        return
    for layer in range(depth):  # programs of the interpreter run one after the other: they cannot wait
        for operation in range(OPERATIONS):
            _layers[(programs,)](*operands, layer, layer + 1, OPERATION=operation, **constants)
    _layers[(programs,)](*operands, 0, depth, OPERATION=OPERATIONS, **constants)


def _columns(matrix: "Matrix", programs: int) -> int:
    """Of a tile: the most that leave half of the programs or more something to do."""
    return next((columns for columns in (64, 32) if 2 * matrix.weight.shape[1] >= columns * programs), 16)


def _parts(matrix: "Matrix", columns: int, programs: int) -> int:
    """Into which the channels are cut, so that nearly all programs have something to do."""
    _, n, stored = matrix.weight.shape
    most = min(max(1, programs * columns // n), stored // _FEWEST_CHANNELS)
    return 1 << (most.bit_length() - 1)


@triton.jit
def _arrive(counter_ptr):
    """Counts this program; what it wrote before can be read by all who wait for it."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter_ptr, arrivals):
    """Returns once so many arrivals are counted."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _prefetch(rows_ptr, first, rows, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Asks for rows first, ..., first + ROWS - 1, of so many bytes, into L2, where memory is coherent: a hint."""
    row = (first + tl.arange(0, ROWS))[:, None]
    line = tl.arange(0, (BYTES + 127) // 128)[None, :] * 128
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [rows_ptr + row * BYTES + line, ((row < rows) & (line >= 0)).to(tl.int32)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def _bytes(ptr):
    return ptr.to(tl.pointer_type(tl.uint8))


@triton.jit
def _source(permutation_ptr, layer, K: tl.constexpr, PERMUTE: tl.constexpr):
    """Which channels come where, in a layer."""
    k = tl.arange(0, K)[None, :]
    return tl.load(permutation_ptr + layer * K + k) if PERMUTE else k


@triton.jit
def _normed(
    row, x, scale, shift, source, normed_ptr, W: tl.constexpr, PERMUTE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Norm and permutation of a row x [1, W]. It is permuted on its way through memory: so all else is read in order,
    and not a line for every channel."""
    inverse_rms = tl.rsqrt(tl.sum(x.to(tl.float32) * x.to(tl.float32), 1) / W + EPS)[:, None]
    x = modulate(x, inverse_rms, scale, shift)
    if PERMUTE:
        tl.store(normed_ptr + row * W + tl.arange(0, W)[None, :], x)
        tl.debug_barrier()
        x = tl.load(normed_ptr + row * W + source)
    return x


@triton.jit
def _transform(
    row, x, codes_ptr, act_scale_ptr, tokens, K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Hadamard and rounding of a row x [1, K]."""
    B: tl.constexpr = BLOCK if BLOCK > 0 else K
    transform_rows(
        row + tl.arange(0, 1), x, 0.0, 0.0, codes_ptr, act_scale_ptr, act_scale_ptr, tokens, 1, K // B, B,
        HADAMARD=BLOCK > 0, BUTTERFLY=not EXACT, NORM=False, SHIFT=False, FLOAT32=EXACT, EPS=0.0, K=K, ROW_SUM=False,
    )  # fmt: skip


@triton.jit
def _factors(scale_ptr, gate_ptr, layer, channel, pending, W: tl.constexpr, GATE: tl.constexpr):
    """What the sums of a layer's matrix are multiplied by: its scales, and a gate."""
    factor = tl.load(scale_ptr + layer * W + channel, mask=(channel >= 0) & pending, other=0.0)
    gate = tl.load(gate_ptr + channel, mask=(channel >= 0) & pending, other=0.0).to(tl.float32) if GATE else 1.0
    return factor, gate


@triton.jit
def _added(
    y_ptr, sums_ptr, act_scale_ptr, row, channel, factor, gate, pending, W: tl.constexpr,
):  # fmt: skip
    """Channels of a row of y, to which what the last matrix made of it has been added; its sums are zeros again."""
    at = row * W + channel
    x = tl.load(y_ptr + at)
    if pending:
        added = tl.load(sums_ptr + at).to(tl.float32) * factor * tl.load(act_scale_ptr + row) * gate
        x = (added + x.to(tl.float32)).to(x.dtype)
        tl.store(y_ptr + at, x)
        tl.store(sums_ptr + at, tl.zeros_like(at))
    return x


@triton.jit
def _weights(weight_ptr, unit, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """Of a unit: a part of the channels, of a tile of the columns; zeros where there is none."""
    n = unit // PARTS * BN + tl.arange(0, BN)
    return read_weights(weight_ptr, n, N, unit % PARTS, K // 2, K // 2 // PARTS)


@triton.jit
def _read_ahead(
    weight_ptr, scale_ptr, cos_ptr, sin_ptr, tile, tokens,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Weights, scales, cosines and sines of a tile."""
    n = columns_of(tile * BN, BN, HEAD)
    w = read_weights(weight_ptr, n, N, 0, K // 2, K // 2)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    cos, sin = scale, scale
    if HEAD > 0:
        cos, sin = read_angles(cos_ptr, sin_ptr, tl.arange(0, BM), tokens, tile * BN, N, BN, HEAD)
    return w, scale, cos, sin


@triton.jit
def _multiply(
    w, scale, cos, sin, codes_ptr, act_scale_ptr, weight_ptr, scale_ptr, cos_ptr, sin_ptr, out_ptr, tokens,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HEAD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """W4A8, then a rotary embedding, tile by tile, of the first with what was read ahead."""
    m = tl.arange(0, BM)
    act_scale = tl.load(act_scale_ptr + m, mask=m < tokens, other=0.0)
    programs = tl.num_programs(0)
    for tile in range(tl.program_id(0), tl.cdiv(N, BN), programs):
        y = sums_of(w, codes_ptr, m, tokens, 0, K // 2, K // 2, INTERPRETED).to(tl.float32)
        y = y * scale[None, :] * act_scale[:, None]
        if HEAD > 0:
            y = turned(y, cos, sin, BM, BN)
        n = columns_of(tile * BN, BN, HEAD)
        inside = (m < tokens)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + m[:, None] * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
        w, scale, cos, sin = _read_ahead(
            weight_ptr, scale_ptr, cos_ptr, sin_ptr, tile + programs, tokens, N, K, BM, BN, HEAD
        )  # fmt: skip


@triton.jit
def _read_keys(
    keys_ptr, values_ptr, visible_ptr, unit, blocks, prefix, D: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    VISIBLE: tl.constexpr,
):  # fmt: skip
    """Cached keys and values [KEYS, D] of a unit, and which of them are seen; the prefix has no more than the splits
    before those of the queries' own keys."""
    key = unit // blocks % SPLITS * KEYS + tl.arange(0, KEYS)
    token = unit // (blocks * SPLITS) * prefix + key
    at = token[:, None] * D + tl.arange(0, D)[None, :]
    known = key < prefix
    k = tl.load(keys_ptr + at, mask=known[:, None], other=0.0)
    v = tl.load(values_ptr + at, mask=known[:, None], other=0.0)
    return k, v, (tl.load(visible_ptr + token, mask=known, other=0) != 0) if VISIBLE else known


@triton.jit
def _attend(
    k, v, seen, heads_ptr, sums_ptr, parts_ptr, unit, blocks, prefix, length, scale, HEADS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
    STATE_FIRST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Softmax over one part of the keys, for some pairs of a query and a head, see `attention_triton`."""
    WIDTH: tl.constexpr = (HEADS + 2) * D
    block, split, element = unit % blocks, unit // blocks % SPLITS, unit // (blocks * SPLITS)
    row, lane = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    query = row // HEADS
    tokens_ptr = heads_ptr + element * length * WIDTH
    at = query[:, None] * WIDTH + (row % HEADS)[:, None] * D + lane[None, :]
    q = tl.load(tokens_ptr + at, mask=(query < length)[:, None], other=0.0)
    seen = seen[None, :] & (query < length)[:, None]
    if split >= SHARED:
        key = (split - SHARED) * KEYS + tl.arange(0, KEYS)
        own = tokens_ptr + key[:, None] * WIDTH + HEADS * D + lane[None, :]
        k = tl.load(own, mask=(key < length)[:, None], other=0.0)
        v = tl.load(own + D, mask=(key < length)[:, None], other=0.0)
        seen = (key < length)[None, :] & (query < length)[:, None]
        if STATE_FIRST:
            seen = seen & ((query[:, None] > 0) | (key[None, :] == 0))
    if EXACT:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k))
    scores = tl.where(seen, scores * scale, float("-inf"))
    best = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(best == float("-inf"), 0.0, best)[:, None])
    if EXACT:  # noqa: SIM108
        sums = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
    else:
        sums = tl.dot(weights.to(v.dtype), v)
    place = (element * SPLITS + split) * (blocks * ROWS) + row
    tl.store(sums_ptr + place[:, None] * D + lane[None, :], sums)
    tl.store(parts_ptr + 2 * place, best)
    tl.store(parts_ptr + 2 * place + 1, tl.sum(weights, 1))


@triton.jit
def _sum_up(
    w, codes_ptr, weight_ptr, sums_ptr, tokens, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The sums of a W4A8 matrix, unit by unit, of the first with weights w: integers, the same in any order."""
    m = tl.arange(0, BM)
    programs = tl.num_programs(0)
    for unit in range(tl.program_id(0), tl.cdiv(N, BN) * PARTS, programs):
        sums = sums_of(w, codes_ptr, m, tokens, unit % PARTS, K // 2, K // 2 // PARTS, INTERPRETED)
        n = unit // PARTS * BN + tl.arange(0, BN)
        inside = (m < tokens)[:, None] & (n < N)[None, :]
        tl.atomic_add(sums_ptr + m[:, None] * N + n[None, :], sums, mask=inside, sem="relaxed")
        w = _weights(weight_ptr, unit + programs, N, K, BN, PARTS)


@triton.jit
def _layers(
    y_ptr, all_sums_ptr, counter_ptr, qkv_ptr, qkv_scale_ptr, qkv_permutation_ptr, o_ptr, o_scale_ptr,
    o_permutation_ptr, up_ptr, up_scale_ptr, up_permutation_ptr, down_ptr, down_scale_ptr, down_permutation_ptr,
    norms_ptr, keys_ptr, values_ptr, visible_ptr, cos_ptr, sin_ptr, codes_ptr, act_scale_ptr, heads_ptr, sums_ptr,
    parts_ptr, hidden_ptr, normed_ptr, tokens, length, batches, prefix, blocks, first, last,
    W: tl.constexpr, MLP: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr, ADAPTIVE: tl.constexpr,
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
        done = (layer - first) * 9
        norm = norms_ptr + layer * (2 * NORM)
        qkv = qkv_ptr + layer * (HEAD * (W // 2))
        o = o_ptr + layer * (W * (HEADS * D // 2))
        up = up_ptr + layer * (2 * MLP * (W // 2))
        down = down_ptr + layer * (W * (MLP // 2))
        cached = layer * batches * prefix * D
        if ALL or OPERATION == 0:
            source = _source(qkv_permutation_ptr, layer, W, QKV_PERMUTE)
            scale, shift = read_modulation(norm, norm + W, channel, channel < W, SCALE=True, SHIFT=ADAPTIVE)
            factor, gate = _factors(down_scale_ptr, norm - W, layer - 1, channel, layer > 0, W, ADAPTIVE)
            if ALL:
                next_qkv = qkv_ptr + (layer + 1) % last * (HEAD * (W // 2))
                _prefetch(next_qkv, program * QKV_COLUMNS, HEAD, QKV_COLUMNS, W // 2)
                _prefetch(o, program * 16, W, 16, HEADS * D // 2)
                _prefetch(up, program * UP_COLUMNS, 2 * MLP, UP_COLUMNS, W // 2)
                _prefetch(down, program * 16, W, 16, MLP // 2)
                _prefetch(_bytes(keys_ptr + cached), program * KEYS, batches * prefix, KEYS, BYTES)
                _prefetch(_bytes(values_ptr + cached), program * KEYS, batches * prefix, KEYS, BYTES)
                _wait(counter_ptr, done * programs)
            for row in range(program, tokens, programs):
                x = _added(y_ptr, all_sums_ptr, act_scale_ptr, row, channel, factor, gate, layer > 0, W)
                x = _normed(row, x, scale, shift, source, normed_ptr, W, QKV_PERMUTE, EPS)
                _transform(row, x, codes_ptr, act_scale_ptr, tokens, W, QKV_BLOCK, EXACT)
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 1:
            scales = qkv_scale_ptr + layer * HEAD
            w, scale, cos, sin = _read_ahead(
                qkv, scales, cos_ptr, sin_ptr, program, tokens, HEAD, W, BM, QKV_COLUMNS, D
            )  # fmt: skip
            if ALL:
                _wait(counter_ptr, (done + 1) * programs)
            _multiply(
                w, scale, cos, sin, codes_ptr, act_scale_ptr, qkv, scales, cos_ptr, sin_ptr, heads_ptr, tokens, HEAD, W,
                BM, QKV_COLUMNS, D, INTERPRETED,
            )  # fmt: skip
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 2:
            keys, values = keys_ptr + cached, values_ptr + cached
            k, v, seen = _read_keys(keys, values, visible_ptr, program, blocks, prefix, D, KEYS, SPLITS, VISIBLE)
            if ALL:
                _wait(counter_ptr, (done + 2) * programs)
            for unit in range(program, blocks * SPLITS * batches, programs):
                _attend(
                    k, v, seen, heads_ptr, sums_ptr, parts_ptr, unit, blocks, prefix, length, SCALE, HEADS, D, ROWS,
                    KEYS, SPLITS, SHARED, STATE_FIRST, EXACT,
                )  # fmt: skip
                later = unit + programs
                k, v, seen = _read_keys(keys, values, visible_ptr, later, blocks, prefix, D, KEYS, SPLITS, VISIBLE)
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 3:
            if ALL:
                _wait(counter_ptr, (done + 3) * programs)
            for token in range(program, tokens, programs):
                combine_token(
                    token, codes_ptr, act_scale_ptr, act_scale_ptr, sums_ptr, parts_ptr, blocks * ROWS, length, SPLITS,
                    HEADS, PADDED, D, y_ptr.dtype.element_ty, ROW_SUM=False,
                )  # fmt: skip
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 4:
            w = _weights(o, program, W, HEADS * D, COLUMNS, O_PARTS)
            if ALL:
                _wait(counter_ptr, (done + 4) * programs)
            _sum_up(w, codes_ptr, o, all_sums_ptr, tokens, W, HEADS * D, BM, COLUMNS, O_PARTS, INTERPRETED)
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 5:
            source = _source(up_permutation_ptr, layer, W, UP_PERMUTE)
            scale, shift = read_modulation(
                norm + NORM, norm + NORM + W, channel, channel < W, SCALE=True, SHIFT=ADAPTIVE
            )
            factor, gate = _factors(o_scale_ptr, norm + 2 * W, layer, channel, pending=True, W=W, GATE=ADAPTIVE)
            if ALL:
                _wait(counter_ptr, (done + 5) * programs)
            for row in range(program, tokens, programs):
                x = _added(y_ptr, all_sums_ptr, act_scale_ptr, row, channel, factor, gate, pending=True, W=W)
                x = _normed(row, x, scale, shift, source, normed_ptr, W, UP_PERMUTE, EPS)
                _transform(row, x, codes_ptr, act_scale_ptr, tokens, W, UP_BLOCK, EXACT)
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 6:
            scales = up_scale_ptr + layer * (2 * MLP)
            w, scale, cos, sin = _read_ahead(
                up, scales, cos_ptr, sin_ptr, program, tokens, 2 * MLP, W, BM, UP_COLUMNS, 0
            )  # fmt: skip
            if ALL:
                _wait(counter_ptr, (done + 6) * programs)
            _multiply(
                w, scale, cos, sin, codes_ptr, act_scale_ptr, up, scales, cos_ptr, sin_ptr, hidden_ptr, tokens, 2 * MLP,
                W, BM, UP_COLUMNS, 0, INTERPRETED,
            )  # fmt: skip
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 7:
            source = _source(down_permutation_ptr, layer, MLP, DOWN_PERMUTE)
            if ALL:
                _wait(counter_ptr, (done + 7) * programs)
            for row in range(program, tokens, programs):
                x = gated(hidden_ptr + row * (2 * MLP), source, source >= 0, MLP, GEGLU=True)
                _transform(row, x, codes_ptr, act_scale_ptr, tokens, MLP, DOWN_BLOCK, EXACT)
            if ALL:
                _arrive(counter_ptr)
        if ALL or OPERATION == 8:
            w = _weights(down, program, W, MLP, COLUMNS, DOWN_PARTS)
            if ALL:
                _wait(counter_ptr, (done + 8) * programs)
            _sum_up(w, codes_ptr, down, all_sums_ptr, tokens, W, MLP, BM, COLUMNS, DOWN_PARTS, INTERPRETED)
            if ALL:
                _arrive(counter_ptr)
    if ALL or OPERATION == 9:
        gate_ptr = norms_ptr + last * (2 * NORM) - W
        factor, gate = _factors(down_scale_ptr, gate_ptr, last - 1, channel, pending=True, W=W, GATE=ADAPTIVE)
        if ALL:
            _wait(counter_ptr, (last - first) * 9 * programs)
        for row in range(program, tokens, programs):
            _added(y_ptr, all_sums_ptr, act_scale_ptr, row, channel, factor, gate, pending=True, W=W)
