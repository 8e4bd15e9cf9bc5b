"""The operators of BitBLAS that a layer needs, with the tiles they are built with, and the layouts of their weights."""

import dataclasses

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant.kernels.backend import Problem

K_MULTIPLE = 64
"""In channels are padded with zeros to a multiple of this."""

N_MULTIPLE = 16
"""Out channels must be a multiple of this: that of the narrowest tile."""

BUCKETS = (64, 640)
"""Most tokens of the operators for few and for some; beyond, there is one for many."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a matmul is cut: warps along M and N, rows and columns a warp, channels a step, steps in flight."""

    row_warps: int
    column_warps: int
    warp_rows: int
    warp_columns: int
    chunk: int
    stages: int

    @property
    def rows(self) -> int:
        """Tokens a block."""
        return self.row_warps * self.warp_rows

    @property
    def columns(self) -> int:
        """Out channels a block."""
        return self.column_warps * self.warp_columns

    @property
    def threads(self) -> int:
        """Threads a block."""
        return 32 * self.row_warps * self.column_warps


@dataclasses.dataclass(frozen=True)
class Operator:
    """One kernel: accumulators [M, N] of activations [M, K] and weights [N, K], for any M.

    Attributes:
        kind: "w4a8", "w8a8" (int8 activations, int32 accumulators) or "w4a16" (float16 activations, fp32 accumulators).
        n: Out channels.
        k: In channels, padded.
        tile: How it is cut.
    """

    kind: str
    n: int
    k: int
    tile: Tile

    @property
    def name(self) -> str:
        """Unique among operators; the name of its files and of the kernel that a profiler shows."""
        tile = "x".join(map(str, dataclasses.astuple(self.tile)))
        return f"bitblas_{self.kind}_n{self.n}_k{self.k}_{tile}"


def padded(k: int) -> int:
    """In channels with their padding."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE


def kind_of(problem: Problem) -> str:
    """The kind of operator that a problem needs."""
    return f"w{problem.weight_bits}a{problem.activation_bits}"


def operators(problem: Problem) -> tuple[Operator, Operator, Operator]:
    """The operators for few, some and many tokens (see `BUCKETS`); some of them may be the same."""
    kind, n, k = kind_of(problem), problem.out_features, padded(problem.in_features)
    tiles = _FLOAT16 if kind == "w4a16" else _tiles(kind, n, k)
    few, some, many = (Operator(kind, n, k, _fit(choice, n, k)) for choice in tiles)
    return few, some, many


def bucket(tokens: int) -> int:
    """Index of the operator for that many tokens."""
    return (tokens > BUCKETS[0]) + (tokens > BUCKETS[1])


# Measured on an H200 at the shapes of pi0.5, M = 10 and 50, 536, 968: see docs/kernels.md.
_NARROW = Tile(4, 1, 16, 16, 256, 4)
_WIDE = Tile(1, 4, 16, 16, 256, 4)
_WIDE_AND_DEEP = Tile(1, 4, 16, 16, 256, 5)
_SLIM = Tile(2, 2, 32, 16, 256, 3)
_SQUARE = Tile(2, 2, 32, 32, 128, 3)
_LARGE = Tile(2, 4, 64, 32, 128, 3)
_FLOAT16 = (Tile(1, 1, 16, 16, 64, 2),), (Tile(2, 1, 32, 16, 64, 2),), (Tile(2, 1, 32, 16, 64, 2),)
_SQUARE_FOR_MANY = (2560, 2048)  # q, k and v together: large tiles would make two waves, the second almost empty


def _tiles(kind: str, n: int, k: int) -> tuple[tuple[Tile, ...], ...]:
    """For few, some and many tokens: tiles in order of preference, of which the last divides any N."""
    if n <= 512:
        return (_NARROW,), (_SLIM, _NARROW), (_SLIM, _NARROW)
    deep = kind == "w4a8" and n < 8192  # int8 weights of five steps do not fit a small GPU's shared memory
    few = _WIDE_AND_DEEP if deep else _WIDE, _NARROW
    some = _SQUARE, _SLIM, _NARROW
    return few, some, some if (n, k) == _SQUARE_FOR_MANY else (_LARGE, *some)


def _fit(choice: tuple[Tile, ...], n: int, k: int) -> Tile:
    """The first tile whose columns divide N, with steps that divide K."""
    tile = next(tile for tile in choice if n % tile.columns == 0)
    return dataclasses.replace(tile, chunk=next(c for c in (256, 128, 64) if c <= tile.chunk and k % c == 0))


def repack(problem: Problem, weight: Tensor) -> Tensor:
    """The canonical weight, [N, K/2] uint8 or [N, K] int8, in the operator's layout; in channels are padded.

    int4 codes are stored as w + 8. W4A8 stores the 16 x 32 blocks of a tensor-core instruction one after the other,
    and in a block what one thread multiplies: n = 16a + 8h + g, k = 32b + 16r + 4t + i is at [a, b, g, t, h, i], in the
    low nibble for r = 0, in the high one for r = 1.
    """
    missing = padded(problem.in_features) - problem.in_features
    if problem.weight_bits == 8:
        return torch.nn.functional.pad(weight, (0, missing))
    codes = torch.nn.functional.pad(packing.unpack(weight), (0, missing)).view(torch.uint8) + 8 & 0xF
    if problem.activation_bits == 8:
        low, high = codes.reshape(-1, 2, 8, codes.shape[1] // 32, 2, 4, 4).permute(4, 0, 3, 2, 5, 1, 6)
    else:
        low, high = codes.unflatten(1, (-1, 2)).unbind(-1)
    return (low | high << 4).reshape(len(weight), -1)


def canonical(problem: Problem, weight: Tensor) -> Tensor:
    """Inverse of `repack`."""
    if problem.weight_bits == 8:
        return weight[:, : problem.in_features].contiguous()
    halves = torch.stack((weight & 0xF, weight >> 4))
    if problem.activation_bits == 8:
        blocks = halves.reshape(2, len(weight) // 16, -1, 8, 4, 2, 4)
        codes = blocks.permute(1, 5, 3, 2, 0, 4, 6).reshape(len(weight), -1)
    else:
        codes = halves.permute(1, 2, 0).flatten(1)
    return packing.pack((codes.view(torch.int8) - 8)[:, : problem.in_features].contiguous(), 4)
