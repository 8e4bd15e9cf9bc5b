"""The kernels of `attention`."""

from typing import NamedTuple

import torch
from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels import transform_triton
from openpi_duquant.kernels.rows_triton import quantize_rows


class Shape(NamedTuple):
    """How an attention is cut up.

    Attributes:
        rows: Pairs of a query and a head that a program has.
        keys: That a step looks at.
        splits: Parts of the keys; each has a program of its own, and another launch puts them together. Where there
            are several, the queries' own keys are one.
        warps: Of a program.
    """

    rows: int
    keys: int
    splits: int
    warps: int


def shape_for(rows: int, keys: int, *, exact: bool, shared_memory: int, processors: int, batch: int = 1) -> Shape:
    """Keys are shared out among programs: those of few queries (a denoising step), which wait for them; those of many
    (a prefix) as long as all programs run at the same time.

    Args:
        rows: Pairs of a query and a head.
        keys: Cached keys.
        exact: Whether fp32 is multiplied, which takes twice the room.
        shared_memory: Bytes that a program may have: 227 KB on sm_90, 99 KB on sm_86 and sm_89.
        processors: SMs.
        batch: Observations.
    """
    step = (32 if exact else 64) // (1 if shared_memory >= 128 * 1024 else 2)
    if rows <= 512:
        return Shape(16, step, 1 + min(triton.cdiv(keys, 64), 16), 4)
    at_a_time = processors * (shared_memory // (97 * 1024))  # of programs with 64 rows and 32 keys, twice, in 16 bits
    splits = min(at_a_time // (triton.cdiv(rows, 64) * batch), triton.cdiv(keys, 64), 4)
    if splits > 1 and not exact:
        return Shape(64, 32, splits, 4)
    return Shape(16 if exact else 64, step, 1, 4)


def launch_attend(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    own_k: Tensor | None,
    own_v: Tensor | None,
    *,
    state_first: bool,
    exact: bool,
    shape: Shape | None = None,
) -> None:
    """Fills out [B, S, H, D]; arguments as `attention.attend`. `exact` multiplies in fp32."""
    batch, length, heads, size = q.shape
    shape = shape or _shape(q, k, exact=exact)
    partial = _partial_sums(q, shape) if shape.splits > 1 else None
    _launch(out, partial, q, k, v, visible, own_k, own_v, shape, state_first=state_first, exact=exact)
    if partial is not None:
        _combine[(length * heads, batch)](
            out, *partial, partial.sums.shape[2], length * heads, SPLITS=shape.splits, D=size,
            num_warps=2,
        )  # fmt: skip


def launch_attend_quantized(
    outputs: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    *operands: Tensor | None,
    state_first: bool,
    exact: bool,
    shape: Shape | None = None,
) -> None:
    """Fills codes [B S, H D], act_scale and row_sum [B S, 1]; arguments as `launch_attend`."""
    (_, length, heads, size), tokens = q.shape, len(outputs[0])
    shape = shape or _shape(q, operands[0], exact=exact)
    if shape.splits == 1:
        out = q.new_empty(q.shape)
        launch_attend(out, q, *operands, state_first=state_first, exact=exact, shape=shape)
        nothing = None, None, None, None, 0
        transform_triton.launch(out.view(tokens, -1), *nothing, outputs, geglu=False, norm=False, float32=exact)
        return
    partial = _partial_sums(q, shape)
    _launch(q, partial, q, *operands, shape, state_first=state_first, exact=exact)
    _combine_quantized[(tokens,)](
        *outputs, *partial, partial.sums.shape[2], length, SPLITS=shape.splits, HEADS=heads,
        PADDED=triton.next_power_of_2(heads), D=size, DTYPE=getattr(tl, str(q.dtype).removeprefix("torch.")),
        num_warps=8,
    )  # fmt: skip


def _shape(q: Tensor, k: Tensor, *, exact: bool) -> Shape:
    gpu = torch.cuda.get_device_properties(q.device)
    room = {"shared_memory": gpu.shared_memory_per_block_optin, "processors": gpu.multi_processor_count}
    return shape_for(q.shape[1] * q.shape[2], k.shape[1], exact=exact, batch=len(q), **room)


class _Partial(NamedTuple):
    """Sums [B, splits, rows, D] fp32 over parts of the keys; under each its highest score and its total, [..., 2]."""

    sums: Tensor
    totals: Tensor


def _partial_sums(q: Tensor, shape: Shape) -> _Partial:
    batch, length, heads, size = q.shape
    rows = triton.cdiv(length * heads, shape.rows) * shape.rows
    sums = q.new_empty(batch, shape.splits, rows, size, dtype=torch.float32)
    return _Partial(sums, q.new_empty(batch, shape.splits, rows, 2, dtype=torch.float32))


def _launch(
    out: Tensor,
    partial: _Partial | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    own_k: Tensor | None,
    own_v: Tensor | None,
    shape: Shape,
    *,
    state_first: bool,
    exact: bool,
) -> None:
    """Fills the partial sums; without any, out."""
    batch, length, heads, size = q.shape
    own = k if own_k is None else own_k, v if own_v is None else own_v
    _attend[(triton.cdiv(length * heads, shape.rows), shape.splits, batch)](
        out, *(partial or (out, out)), q, k, v, visible, *own, length, k.shape[1],
        0 if own_k is None else own_k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
        v.stride(1), own[0].stride(0), own[0].stride(1), own[1].stride(0), own[1].stride(1),
        size**-0.5 * 1.4426950408889634,
        HEADS=heads, D=size, ROWS=shape.rows, KEYS=shape.keys, SPLITS=shape.splits, VISIBLE=visible is not None,
        OWN=own_k is not None, STATE_FIRST=state_first, EXACT=exact,
        num_warps=shape.warps, num_stages=2,
    )  # fmt: skip


@triton.jit
def _combined(sums_ptr, parts_ptr, row, known, padded_rows, splits, SPLITS: tl.constexpr, D: tl.constexpr):
    """Rows [R, D] fp32 from their partial sums (as FlashDecoding, Dao et al. 2023); `row` is where the first lie. There
    are `splits`, of at most SPLITS."""
    lane = tl.arange(0, D)[None, :]
    highest = tl.load(parts_ptr + 2 * row, mask=known, other=0.0)
    for split in tl.static_range(1, SPLITS):
        there = known & (tl.full(row.shape, split, tl.int32) < splits)
        best = tl.load(parts_ptr + 2 * (row + split * padded_rows), mask=there, other=float("-inf"))
        highest = tl.maximum(highest, best)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros_like(highest)
    y = tl.zeros((row.shape[0], D), tl.float32)
    for split in tl.static_range(SPLITS):
        at, there = row + split * padded_rows, known & (tl.full(row.shape, split, tl.int32) < splits)
        weight = tl.exp2(tl.load(parts_ptr + 2 * at, mask=there, other=float("-inf")) - highest)
        total += weight * tl.load(parts_ptr + 2 * at + 1, mask=there, other=0.0)
        y += weight[:, None] * tl.load(sums_ptr + at[:, None] * D + lane, mask=there[:, None], other=0.0)
    return y / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _combine(
    out_ptr, sums_ptr, parts_ptr, padded_rows, rows, SPLITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One row from its partial sums."""
    row, batch = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1).to(tl.int64)
    y = _combined(sums_ptr, parts_ptr, batch * SPLITS * padded_rows + row, row < rows, padded_rows, SPLITS, SPLITS, D)
    at = (batch * rows + row)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty))


@triton.jit
def _combine_quantized(
    codes_ptr, act_scale_ptr, row_sum_ptr, sums_ptr, parts_ptr, padded_rows, length, SPLITS: tl.constexpr,
    HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A token a program."""
    combine_token(
        tl.program_id(0), codes_ptr, act_scale_ptr, row_sum_ptr, sums_ptr, parts_ptr, padded_rows, length, SPLITS,
        SPLITS, HEADS, PADDED, D, DTYPE, ROW_SUM=True,
    )  # fmt: skip


@triton.jit
def combine_token(
    token, codes_ptr, act_scale_ptr, row_sum_ptr, sums_ptr, parts_ptr, padded_rows, length, splits,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
    ROW_SUM: tl.constexpr,
):  # fmt: skip
    """All heads of one token from their partial sums, rounded to DTYPE and then to int8."""
    token = tl.cast(token, tl.int64)
    head = tl.arange(0, PADDED)
    row = token // length * SPLITS * padded_rows + token % length * HEADS + head
    y = _combined(sums_ptr, parts_ptr, row, head < HEADS, padded_rows, splits, SPLITS, D).to(DTYPE).to(tl.float32)
    codes, act_scale = quantize_rows(tl.reshape(y, (1, PADDED * D)), 1.0)
    k = tl.arange(0, PADDED * D)[None, :]
    tl.store(codes_ptr + token * HEADS * D + k, codes, mask=k < HEADS * D)
    tl.store(act_scale_ptr + token + tl.arange(0, 1), act_scale)
    if ROW_SUM:
        tl.store(row_sum_ptr + token + tl.arange(0, 1), tl.sum(codes.to(tl.int32), 1))


@triton.jit
def scores_of(q, k, EXACT: tl.constexpr):
    """q [R, D] times keys [T, D]."""
    if EXACT:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k))
    return scores


@triton.jit
def weighted(weights, v, EXACT: tl.constexpr):
    """Weights [R, T] times values [T, D]."""
    if EXACT:  # noqa: SIM108
        sums = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
    else:
        sums = tl.dot(weights.to(v.dtype), v)
    return sums


@triton.jit
def _attend_to(
    q, query, scale, k_ptr, v_ptr, visible_ptr, first, keys, k_stride, v_stride, best, total, sums,
    D: tl.constexpr, KEYS: tl.constexpr, VISIBLE: tl.constexpr, STATE_FIRST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first to keys - 1 of one segment (Milakov & Gimelshein 2018, arXiv:1805.02867)."""
    lane = tl.arange(0, D)
    for start in range(first, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        known = key < keys
        k = tl.load(k_ptr + key[:, None] * k_stride + lane[None, :], mask=known[:, None], other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_stride + lane[None, :], mask=known[:, None], other=0.0)
        seen = known
        if VISIBLE:
            seen = known & (tl.load(visible_ptr + key, mask=known, other=0) != 0)
        seen = seen[None, :] & (query[:, None] >= 0)
        if STATE_FIRST:
            seen = seen & ((query[:, None] > 0) | (key[None, :] == 0))
        scores = tl.where(seen, scores_of(q, k, EXACT) * scale, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(best - shift)
        total = total * decay + tl.sum(weights, 1)
        sums = sums * decay[:, None] + weighted(weights, v, EXACT)
        best = highest
    return best, total, sums


@triton.jit
def _attend(
    out_ptr, sums_ptr, parts_ptr, q_ptr, k_ptr, v_ptr, visible_ptr, own_k_ptr, own_v_ptr, length, keys, own_keys,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, own_k_batch, own_k_token, own_v_batch, own_v_token, scale,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    VISIBLE: tl.constexpr, OWN: tl.constexpr, STATE_FIRST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows are pairs of a query and a head: all of them read the same keys and values. The queries' own are the last
    part of the keys, or come last in the only one."""
    SHARED: tl.constexpr = SPLITS - 1 if OWN and SPLITS > 1 else SPLITS
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head, lane = row // HEADS, row % HEADS, tl.arange(0, D)
    known = (query < length)[:, None]
    at = query[:, None] * q_token + head[:, None] * D + lane[None, :]
    q = tl.load(q_ptr + batch * q_batch + at, mask=known, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D), tl.float32)
    if VISIBLE:
        visible_ptr += batch * keys
    part = tl.cdiv(tl.cdiv(keys, KEYS), SHARED) * KEYS
    best, total, sums = _attend_to(
        q, query, scale, k_ptr + batch * k_batch, v_ptr + batch * v_batch, visible_ptr, split * part,
        tl.minimum((split + 1) * part, keys), k_token, v_token, best, total, sums, D, KEYS, VISIBLE=VISIBLE,
        STATE_FIRST=False, EXACT=EXACT,
    )  # fmt: skip
    if OWN and split == SPLITS - 1:
        best, total, sums = _attend_to(
            q, query, scale, own_k_ptr + batch * own_k_batch, own_v_ptr + batch * own_v_batch, visible_ptr, 0, own_keys,
            own_k_token, own_v_token, best, total, sums, D, KEYS, VISIBLE=False, STATE_FIRST=STATE_FIRST, EXACT=EXACT,
        )  # fmt: skip
    if SPLITS == 1:
        y = sums / tl.where(total > 0, total, 1.0)[:, None]
        out_at = ((batch * length + query[:, None]) * HEADS + head[:, None]) * D + lane[None, :]
        tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=known)
    else:
        place = (batch * SPLITS + split) * (tl.num_programs(0) * ROWS) + row
        tl.store(sums_ptr + place[:, None] * D + lane[None, :], sums)
        tl.store(parts_ptr + 2 * place, best)
        tl.store(parts_ptr + 2 * place + 1, total)
