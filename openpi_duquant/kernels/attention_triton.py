"""The kernels of `attention`."""

from typing import NamedTuple

import torch
from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels import pdl_triton
from openpi_duquant.kernels.pdl_triton import begin


class Shape(NamedTuple):
    """How an attention is cut up.

    Attributes:
        rows: Pairs of a query and a head that a program has.
        keys: That a step looks at.
        splits: Parts of the keys; each has a program of its own, and another launch puts them together.
        warps: Of a program.
    """

    rows: int
    keys: int
    splits: int
    warps: int


def shape_for(rows: int, keys: int, *, exact: bool, shared_memory: int) -> Shape:
    """Few queries (a denoising step) wait for the keys, which are shared out; many (a prefix) fill the GPU.

    Args:
        rows: Pairs of a query and a head.
        keys: Cached keys.
        exact: Whether fp32 is multiplied, which takes twice the room.
        shared_memory: Bytes that a program may have: 227 KB on sm_90, 99 KB on sm_86 and sm_89.
    """
    step = (32 if exact else 64) // (1 if shared_memory >= 128 * 1024 else 2)
    if rows <= 512:
        return Shape(16, step, min(triton.cdiv(keys, 64), 16), 4)
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
    if shape is None:
        shared_memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        shape = shape_for(length * heads, k.shape[1], exact=exact, shared_memory=shared_memory)
    own = k if own_k is None else own_k, v if own_v is None else own_v
    tiles = triton.cdiv(length * heads, shape.rows)
    parts, sums = out, out
    if shape.splits > 1:  # partial sums, and under each its highest score and its total
        sums = out.new_empty(batch, shape.splits, tiles * shape.rows, size, dtype=torch.float32)
        parts = out.new_empty(batch, shape.splits, tiles * shape.rows, 2, dtype=torch.float32)
    _attend[(tiles, shape.splits, batch)](
        out, sums, parts, q, k, v, visible, *own, length, k.shape[1], 0 if own_k is None else own_k.shape[1],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        own[0].stride(0), own[0].stride(1), own[1].stride(0), own[1].stride(1), size**-0.5 * 1.4426950408889634,
        HEADS=heads, D=size, ROWS=shape.rows, KEYS=shape.keys, SPLITS=shape.splits, VISIBLE=visible is not None,
        OWN=own_k is not None, STATE_FIRST=state_first, EXACT=exact, **pdl_triton.options(q),
        num_warps=shape.warps, num_stages=2,
    )  # fmt: skip
    if shape.splits > 1:
        _combine[(length * heads, batch)](
            out, sums, parts, tiles * shape.rows, length * heads,
            SPLITS=shape.splits, PADDED=triton.next_power_of_2(shape.splits), D=size,
            **pdl_triton.options(q), num_warps=2,
        )  # fmt: skip


@triton.jit
def _combine(
    out_ptr, sums_ptr, parts_ptr, padded_rows, rows, SPLITS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row from its partial sums (as FlashDecoding, Dao et al. 2023)."""
    begin(PDL)
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, lane = tl.arange(0, PADDED), tl.arange(0, D)
    known = split < SPLITS
    at = (batch * SPLITS + split) * padded_rows + row
    best = tl.load(parts_ptr + 2 * at, mask=known, other=float("-inf"))
    total = tl.load(parts_ptr + 2 * at + 1, mask=known, other=0.0)
    highest = tl.max(best, 0)
    weight = tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    sums = tl.load(sums_ptr + at[:, None] * D + lane[None, :], mask=known[:, None], other=0.0)
    total = tl.sum(total * weight, 0)
    y = tl.sum(sums * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (batch * rows + row) * D + lane, y.to(out_ptr.dtype.element_ty))


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
        if EXACT:
            scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k))
        scores = tl.where(seen, scores * scale, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(best - shift)
        total = total * decay + tl.sum(weights, 1)
        if EXACT:
            sums = sums * decay[:, None] + tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None])
        best = highest
    return best, total, sums


@triton.jit
def _attend(
    out_ptr, sums_ptr, parts_ptr, q_ptr, k_ptr, v_ptr, visible_ptr, own_k_ptr, own_v_ptr, length, keys, own_keys,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, own_k_batch, own_k_token, own_v_batch, own_v_token, scale,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    VISIBLE: tl.constexpr, OWN: tl.constexpr, STATE_FIRST: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows are pairs of a query and a head: all of them read the same keys and values. The last part of the keys has
    the queries' own as well."""
    begin(PDL)
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
    part = tl.cdiv(tl.cdiv(keys, KEYS), SPLITS) * KEYS
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
