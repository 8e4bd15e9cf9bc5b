"""tune-tiles: what it tries, and what it writes; what it measures needs a GPU."""

import json
import pathlib

import pytest
import torch

from openpi_duquant.commands import tune_tiles as command
from openpi_duquant.commands.bench_linear import SHAPES
from openpi_duquant.commands.tune_tiles import Case
from openpi_duquant.commands.tune_tiles import candidates
from openpi_duquant.commands.tune_tiles import store
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import tiles
from openpi_duquant.kernels.tiles import Tile


@pytest.mark.parametrize("m", [1, 10, 50, 64, 65, 968])
@pytest.mark.parametrize("shape", sorted(set(SHAPES.values())))
@pytest.mark.parametrize("bits", [4, 8])
def test_candidates_are_distinct_and_the_rule_is_one_of_them(m: int, shape: tuple[int, int], bits: int) -> None:
    case = Case(m, *shape, bits)
    found = candidates(case)
    assert len(found) == len(set(found)) > 8
    assert tiles.by_rule(m, shape[0], shape[1] * bits // 8) in found
    assert all(size >= 16 and size & (size - 1) == 0 for tile in found for size in tile[:3])
    if m <= 64:
        assert {tile.rows for tile in found} == {max(16, 1 << (m - 1).bit_length())}


def test_a_tile_is_written_and_the_others_stay(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tiles.json"
    first, second, third = Tile(16, 32, 64, 1, 4, 3), Tile(64, 128, 64, 8, 8, 4), Tile(16, 64, 256, 1, 4, 2)
    store(path, "sm_90", Case(10, 2048, 1024, 4), first)
    store(path, "sm_80", Case(10, 2048, 1024, 4), second)
    store(path, "sm_90", Case(968, 2048, 1024, 4), second)
    store(path, "sm_90", Case(10, 2048, 1024, 8), second)
    store(path, "sm_90", Case(3, 2048, 1024, 4), third)
    assert json.loads(path.read_text()) == {
        "sm_80": {"W4 2048x1024": {"16": list(second)}},
        "sm_90": {
            "W4 2048x1024": {"16": list(third), "1024": list(second)},
            "W8 2048x1024": {"16": list(second)},
        },
    }


def test_the_shipped_tiles_can_be_read_and_are_used() -> None:
    known = json.loads(tiles.PATH.read_text())
    for architecture, shapes in known.items():
        for shape, by_m in shapes.items():
            bits, n, k = shape[1], *shape[3:].split("x")
            for m, tile in by_m.items():
                assert tiles.tile_for(architecture, int(m), int(n), int(k), bits=int(bits)) == Tile(*tile)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(DuQuantError, match="there is none here"):
        command()
