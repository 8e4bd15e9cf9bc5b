"""openpi-duquant tune-tiles."""

from collections.abc import Iterator
import itertools
import json
import math
import multiprocessing
import os
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from openpi_duquant.commands.bench_linear import SHAPES
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import require_known
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import reference
from openpi_duquant.kernels import tiles
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.tiles import Tile
from openpi_duquant.kernels.timing import L2_BYTES
from openpi_duquant.kernels.timing import microseconds
from openpi_duquant.packing import unpack
from openpi_duquant.progress import progress_bars
from openpi_duquant.report import markdown_table

TOKENS = (10, 50, 544, 968)
_MOST_LAUNCHES = 64
_SHARED_MEMORY = 227 * 1024  # that a program may have, on sm_90


class Case(NamedTuple):
    """One matmul [M, K] x [N, K] with weights of that many bits."""

    m: int
    n: int
    k: int
    bits: int


def tune_tiles(
    *,
    output: pathlib.Path = tiles.PATH,
    layers: tuple[str, ...] = tuple(SHAPES),
    tokens: tuple[int, ...] = TOKENS,
    bits: int = 4,
) -> None:
    """Find the fastest tile of the Triton matmul for every layer shape on this GPU, and write it to tiles.json.

    Tiles whose sums are not those of integer arithmetic are left out. Each shape is written as soon as it is known.

    Args:
        output: The file; entries of other shapes and architectures are kept.
        layers: Layers of pi0.5 to tune, as bench-linear names them.
        tokens: Numbers of tokens, M; a tile is used up to the next of the sizes 16, 32, ... 4096.
        bits: Of the weights, 4 or 8.
    """
    require_known("layers", layers, SHAPES)
    if not torch.cuda.is_available():
        raise DuQuantError("tune-tiles measures on a GPU, and there is none here")
    shapes = sorted({SHAPES[name] for name in layers})
    cases = [Case(m, n, k, bits) for n, k in shapes for m in tokens]
    jobs = [(case, tile) for case in cases for tile in candidates(case)]
    rows = []
    with progress_bars() as bars, multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        task = bars.add_task("Compiling", total=len(jobs))
        exact = []
        for job, sums_are_right in zip(jobs, pool.imap(_is_exact, jobs, chunksize=2)):
            exact += [job] if sums_are_right else []
            bars.advance(task)
        task = bars.add_task("Timing", total=len(cases))
        for case in cases:
            bars.advance(task)
            times = _times(case, [tile for other, tile in exact if other == case])
            if not times:
                raise DuQuantError(f"no tile for {case} is exact; please report it as an issue of openpi-duquant")
            store(output, architecture(torch.device("cuda")), case, times[0][1])
            rule = tiles.by_rule(case.m, case.n, case.k if bits == 8 else case.k // 2)
            by_rule = next((time for time, tile in times if tile == rule), math.nan)
            best, tile = times[0]
            rows.append((f"{case.n} x {case.k}", case.m, f"{best:.2f}", f"{by_rule:.2f}", list(tile)))
    console.print(markdown_table(("N x K", "M", "best, us", "by rule, us", "tile"), rows))
    console.print(f"{len(jobs) - len(exact)} of {len(jobs)} tiles do not compile or are wrong; wrote {output}")


def candidates(case: Case) -> list[Tile]:
    """Tiles that are worth a try, the rule's among them."""
    stored = case.k if case.bits == 8 else case.k // 2
    found = {tiles.by_rule(case.m, case.n, stored): None}
    for tile in _few_rows(case) if case.m <= 64 else _many_rows():
        fits = tile.channels <= max(64, stored) and tile.columns <= max(16, 2 * case.n)
        if fits and tile.columns * tile.channels <= 64 * 512:
            found[tile] = None
    return list(found)


def _few_rows(case: Case) -> Iterator[Tile]:
    """As many programs as there are SMs, each with long rows of weights in flight."""
    rows = max(16, 1 << (case.m - 1).bit_length())
    for columns, channels, warps, stages in itertools.product((16, 32, 64, 128), (128, 256, 512), (4, 8), (2, 3, 4)):
        if columns >= 4 * warps:
            yield Tile(rows, columns, channels, 1, warps, stages)


def _many_rows() -> Iterator[Tile]:
    """Four warps have 64 columns or more, as wgmma asks for, and a thread at most 128 sums."""
    sizes = (32, 64, 128, 256), (64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4)
    for rows, columns, channels, warps, stages in itertools.product(*sizes):
        in_flight = stages * channels * (columns + 2 * rows)
        if columns >= 16 * warps and 32 <= rows * columns // (32 * warps) <= 128 and in_flight <= _SHARED_MEMORY:
            yield Tile(rows, columns, channels, 16, warps, stages)


def store(path: pathlib.Path, architecture: str, case: Case, tile: Tile) -> None:
    """Writes one tile into a file of tiles, in whose other entries nothing changes."""
    known = json.loads(path.read_text()) if path.exists() else {}
    shape = known.setdefault(architecture, {}).setdefault(f"W{case.bits} {case.n}x{case.k}", {})
    shape[str(tiles.bucket(case.m))] = list(tile)
    lines = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(of)}: {json.dumps(by_m)}" for of, by_m in sorted(shapes.items()))
        + "\n  }"
        for name, shapes in sorted(known.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class _Operands(NamedTuple):
    """Of launches of one case: codes, scales of 1, and copies of the weight, repacked."""

    a: Tensor
    act_scale: Tensor
    weight_scale: Tensor
    weights: list[Tensor]

    @classmethod
    def random(cls, case: Case, copies: int) -> "_Operands":
        """Over the full range of codes."""
        random = torch.Generator("cuda").manual_seed(0)
        shape = (case.n, case.k if case.bits == 8 else case.k // 2)
        dtype = torch.int8 if case.bits == 8 else torch.uint8
        weights = [
            torch.randint(0, 256, shape, generator=random, device="cuda", dtype=torch.uint8).view(dtype)
            for _ in range(copies)
        ]
        a = torch.randint(-127, 128, (case.m, case.k), generator=random, device="cuda", dtype=torch.int8)
        return cls(a, torch.ones(case.m, 1, device="cuda"), torch.ones(case.n, 1, device="cuda"), weights)

    def launch(self, out: Tensor, tile: Tile, index: int = 0) -> None:
        """Multiplies with one of the copies."""
        from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415  triton is there where CUDA is

        weight = self.weights[index % len(self.weights)]
        rest = None, None, 0, None, None, None, None, tile
        matmul_triton.launch(out, self.a, self.act_scale, weight, self.weight_scale, *rest)


def _is_exact(job: tuple[Case, Tile]) -> bool:
    """Whether a tile compiles and its sums are those of integers, as fp32 rounds both.

    Triton's cache then has the kernel that gives bf16, too, which will be timed.
    """
    case, tile = job
    operands = _Operands.random(case, 1)
    out = torch.full((case.m, case.n), torch.nan, device="cuda")
    try:
        operands.launch(out, tile)
        operands.launch(out.to(torch.bfloat16), tile)
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 - a compiler has many ways to refuse
        return False
    problem = Problem(case.n, case.k, case.bits, 8, 1, "none", 0, torch.float32)
    codes = unpack(triton_matmul.canonical(problem, operands.weights[0]))
    return torch.equal(out, reference.integer_matmul(operands.a, codes).float())


def _times(case: Case, among: list[Tile]) -> list[tuple[float, Tile]]:
    """Microseconds of every tile, the fastest first, with weights read past the cache."""
    copies = min(_MOST_LAUNCHES, max(2, math.ceil(L2_BYTES / (case.n * case.k * case.bits // 8))))
    operands = _Operands.random(case, copies)
    out = torch.empty(case.m, case.n, device="cuda", dtype=torch.bfloat16)
    return sorted((microseconds(lambda i, tile=tile: operands.launch(out, tile, i), copies), tile) for tile in among)
