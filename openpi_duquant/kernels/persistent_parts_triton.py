"""The operations that `persistent_triton` runs one after the other, and how programs wait for each other.

Those that read what is not computed in the same launch read it ahead: the values are given to what follows the wait.
"""

import triton
import triton.language as tl

from openpi_duquant.kernels.attention_triton import scores_of
from openpi_duquant.kernels.attention_triton import weighted
from openpi_duquant.kernels.matmul_triton import columns_of
from openpi_duquant.kernels.matmul_triton import read_angles
from openpi_duquant.kernels.matmul_triton import read_weights
from openpi_duquant.kernels.matmul_triton import sums_of
from openpi_duquant.kernels.matmul_triton import turned
from openpi_duquant.kernels.rows_triton import modulate
from openpi_duquant.kernels.rows_triton import transform_rows


@triton.jit
def arrive(counter_ptr):
    """Counts this program; what it wrote before can be read by all who wait for it."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(counter_ptr, arrivals):
    """Returns once so many arrivals are counted."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def prefetch(rows_ptr, first, rows, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Asks for rows first, ..., first + ROWS - 1, of so many bytes, into L2, where memory is coherent: a hint."""
    row = (first + tl.arange(0, ROWS))[:, None]
    line = tl.arange(0, (BYTES + 127) // 128)[None, :] * 128
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [rows_ptr + row * BYTES + line, ((row < rows) & (line >= 0)).to(tl.int32)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def as_bytes(ptr):
    return ptr.to(tl.pointer_type(tl.uint8))


@triton.jit
def read_permutation(permutation_ptr, layer, K: tl.constexpr, PERMUTE: tl.constexpr):
    """Which channels come where, in a layer."""
    k = tl.arange(0, K)[None, :]
    return tl.load(permutation_ptr + layer * K + k) if PERMUTE else k


@triton.jit
def norm_row(
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
def round_row(
    row, x, codes_ptr, act_scale_ptr, tokens, K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Hadamard and rounding of a row x [1, K]."""
    B: tl.constexpr = BLOCK if BLOCK > 0 else K
    transform_rows(
        row + tl.arange(0, 1), x, 0.0, 0.0, codes_ptr, act_scale_ptr, act_scale_ptr, tokens, 1, K // B, B,
        HADAMARD=BLOCK > 0, BUTTERFLY=not EXACT, NORM=False, SHIFT=False, FLOAT32=EXACT, EPS=0.0, K=K, ROW_SUM=False,
    )  # fmt: skip


@triton.jit
def read_factors(scale_ptr, gate_ptr, layer, channel, W: tl.constexpr, GATE: tl.constexpr):
    """What the sums of a layer's matrix are multiplied by: its scales, and a gate; zeros before the first layer."""
    known = channel < tl.minimum(layer + 1, 1) * W
    factor = tl.load(scale_ptr + layer * W + channel, mask=known, other=0.0)
    gate = tl.load(gate_ptr + channel, mask=known, other=0.0).to(tl.float32) if GATE else 1.0
    return factor, gate


@triton.jit
def add_sums(
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
def read_part(weight_ptr, unit, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """Of a unit: a part of the channels, of a tile of the columns; zeros where there is none."""
    n = unit // PARTS * BN + tl.arange(0, BN)
    return read_weights(weight_ptr, n, N, unit % PARTS, K // 2, K // 2 // PARTS)


@triton.jit
def read_ahead(
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
def multiply(
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
            first, second = turned(y, cos, sin, BM, BN)
            y = tl.reshape(tl.join(first, second), (BM, BN))
        n = columns_of(tile * BN, BN, HEAD)
        inside = (m < tokens)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + m[:, None] * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
        w, scale, cos, sin = read_ahead(
            weight_ptr, scale_ptr, cos_ptr, sin_ptr, tile + programs, tokens, N, K, BM, BN, HEAD
        )  # fmt: skip


@triton.jit
def read_keys(
    keys_ptr, values_ptr, visible_ptr, unit, batches, blocks, splits, prefix, D: tl.constexpr, KEYS: tl.constexpr,
    VISIBLE: tl.constexpr,
):  # fmt: skip
    """Cached keys and values [KEYS, D] of a unit, if there is such a unit, and which of them are seen; the prefix has
    no more than the splits before those of the queries' own keys."""
    key, element = unit // blocks % splits * KEYS + tl.arange(0, KEYS), unit // (blocks * splits)
    token = element * prefix + key
    at = token[:, None] * D + tl.arange(0, D)[None, :]
    known = key < tl.where(element < batches, prefix, 0)
    k = tl.load(keys_ptr + at, mask=known[:, None], other=0.0)
    v = tl.load(values_ptr + at, mask=known[:, None], other=0.0)
    return k, v, (tl.load(visible_ptr + token, mask=known, other=0) != 0) if VISIBLE else known


@triton.jit
def attend(
    k, v, seen, heads_ptr, sums_ptr, parts_ptr, unit, blocks, splits, shared, length, scale, HEADS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, STATE_FIRST: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Softmax over one part of the keys, for some pairs of a query and a head, see `attention_triton`."""
    WIDTH: tl.constexpr = (HEADS + 2) * D
    block, split, element = unit % blocks, unit // blocks % splits, unit // (blocks * splits)
    row, lane = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    query = row // HEADS
    tokens_ptr = heads_ptr + element * length * WIDTH
    at = query[:, None] * WIDTH + (row % HEADS)[:, None] * D + lane[None, :]
    q = tl.load(tokens_ptr + at, mask=(query < length)[:, None], other=0.0)
    seen = seen[None, :] & (query < length)[:, None]
    if split >= shared:
        key = (split - shared) * KEYS + tl.arange(0, KEYS)
        own = tokens_ptr + key[:, None] * WIDTH + HEADS * D + lane[None, :]
        k = tl.load(own, mask=(key < length)[:, None], other=0.0)
        v = tl.load(own + D, mask=(key < length)[:, None], other=0.0)
        seen = (key < length)[None, :] & (query < length)[:, None]
        if STATE_FIRST:
            seen = seen & ((query[:, None] > 0) | (key[None, :] == 0))
    scores = tl.where(seen, scores_of(q, k, EXACT) * scale, float("-inf"))
    best = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(best == float("-inf"), 0.0, best)[:, None])
    place = (element * SPLITS + split) * (blocks * ROWS) + row
    tl.store(sums_ptr + place[:, None] * D + lane[None, :], weighted(weights, v, EXACT))
    tl.store(parts_ptr + 2 * place, best)
    tl.store(parts_ptr + 2 * place + 1, tl.sum(weights, 1))


@triton.jit
def sum_up(
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
        w = read_part(weight_ptr, unit + programs, N, K, BN, PARTS)
