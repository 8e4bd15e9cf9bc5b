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

SMALL = 64
"""Up to so many tokens the tile for few tokens is used, above the one for many."""


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


def operators(problem: Problem) -> tuple[Operator, Operator]:
    """The operators for few tokens (M <= SMALL) and for many."""
    kind, n, k = kind_of(problem), problem.out_features, padded(problem.in_features)
    few, many = _tiles(kind, n, k)
    return Operator(kind, n, k, few), Operator(kind, n, k, many)


def _tiles(kind: str, n: int, k: int) -> tuple[Tile, Tile]:
    """Tiles for few and for many tokens."""
    chunk = next(c for c in (128, 64) if k % c == 0)
    if kind == "w4a16":
        return Tile(1, 1, 16, 16, 64, 2), Tile(2, 1, 32, 16, 64, 2)
    columns = next(c for c in (128, 64, 32, 16) if n % c == 0)
    widest = next(c for c in (256, 128, 64) if k % c == 0)
    few = Tile(4, 1, 16, 16, widest, 3) if widest > 64 else Tile(2, 1, 16, 16, 64, 3)
    return few, Tile(2, 2 if columns > 16 else 1, 64, columns // 2 if columns > 16 else 16, chunk, 2)


def wants_row_sum(problem: Problem) -> bool:
    """W4A8 multiplies w + 8, for which decoding is fast and right; 8 * sum(a) is subtracted later."""
    return kind_of(problem) == "w4a8"


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
