"""Tiles of the Triton matmul: measured ones where `tiles.json` has the shape and architecture, else a rule."""

import functools
import json
import pathlib
from typing import NamedTuple

PATH = pathlib.Path(__file__).with_name("tiles.json")


class Tile(NamedTuple):
    """How a matmul [M, K] x [N, K] is cut up.

    Attributes:
        rows: Of a program's tile, of M.
        columns: Of a program's tile, of N.
        channels: Of a step, of the weight's stored columns (K/2 for int4).
        group: Row tiles that are gone through before the next column tile.
        warps: Of a program.
        stages: Steps whose loads are in flight.
    """

    rows: int
    columns: int
    channels: int
    group: int
    warps: int
    stages: int


BUCKETS = (16, 32, 64, 128, 256, 512, 640, 1024, 2048, 4096)
"""Numbers of rows M up to which a measured tile is used."""


def bucket(m: int) -> int:
    """The smallest bucket that holds m rows; the largest for more."""
    return next((size for size in BUCKETS if m <= size), BUCKETS[-1])


def tile_for(architecture: str, m: int, n: int, k: int, bits: int) -> Tile:
    """The tile for M x N x K with weights of that many bits on an architecture such as "sm_90"."""
    measured = _measured().get(architecture, {}).get(f"W{bits} {n}x{k}", {}).get(str(bucket(m)))
    return Tile(*measured) if measured else by_rule(m, n, k if bits == 8 else k // 2)


def by_rule(m: int, n: int, stored: int) -> Tile:
    """A sound tile for any shape: as many programs as an H200 has SMs, where the matrix is large enough."""
    rows = min(max(16, 1 << (m - 1).bit_length()), 64)
    if m <= 64:
        columns = 64 if n >= 4096 else 32
        return Tile(rows, columns, 256 if stored >= 256 else 64, 1, 4, 3)
    if n >= 8192:
        return Tile(128, 128, 64, 8, 8, 4)
    return Tile(rows, 128 if n >= 1024 else 64, 128 if stored >= 128 else 64, 8, 4, 3)


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, list[int]]]]:
    """By architecture, by shape, by bucket; written by openpi-duquant tune-tiles."""
    return json.loads(PATH.read_text())
