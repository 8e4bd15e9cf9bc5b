"""The BitBLAS backend, as far as it goes without a GPU: layouts, tiles, reasons, patches, cache, building."""

import dataclasses
import importlib.metadata
import json
import pathlib
import stat

import pytest
import torch

from openpi_duquant import kernels
from openpi_duquant import packing
from openpi_duquant.commands.bench_linear import SHAPES
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import Problem
from openpi_duquant.kernels import driver
from openpi_duquant.kernels.bitblas import build
from openpi_duquant.kernels.bitblas import cache
from openpi_duquant.kernels.bitblas import launch
from openpi_duquant.kernels.bitblas import loading
from openpi_duquant.kernels.bitblas import operators
from openpi_duquant.kernels.bitblas import patches
from openpi_duquant.kernels.bitblas.operators import Operator
from openpi_duquant.kernels.bitblas.operators import Tile

W4A8 = Problem(64, 128, 4, 8, 1, "none", 0, torch.bfloat16)
SIGLIP = [(1152, 1152), (4304, 1152), (1152, 4304)]
SMALLEST_SHARED_MEMORY = 99 * 1024  # sm_86 and sm_89


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weight(problem: Problem) -> torch.Tensor:
    bits = problem.weight_bits
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (problem.out_features, problem.in_features))
    return packing.pack(codes.to(torch.int8), bits)


@pytest.mark.parametrize("k", [64, 128, 136, 4304])
@pytest.mark.parametrize("kind", [(4, 8), (8, 8), (4, 16)])
def test_a_repacked_weight_is_canonical_again(kind: tuple[int, int], k: int) -> None:
    problem = dataclasses.replace(W4A8, in_features=k, weight_bits=kind[0], activation_bits=kind[1])
    original = weight(problem)
    repacked = operators.repack(problem, original)
    assert (repacked.dtype, repacked.shape[1] * 8 // kind[0]) == (original.dtype, -(-k // 64) * 64)
    again = operators.canonical(problem, repacked)
    assert again.is_contiguous()
    assert torch.equal(again, original)


@pytest.mark.parametrize("k", [64, 72])
def test_a_w4a8_weight_lies_as_the_tensor_core_takes_it(k: int) -> None:
    """PTX, mma.m16n8k32, B fragment: lane 4g + t holds column n = g, rows k = 4t..4t+3 and 16 + 4t..16 + 4t + 3."""
    problem = dataclasses.replace(W4A8, out_features=32, in_features=k)
    original = weight(problem)
    codes = torch.nn.functional.pad(packing.unpack(original), (0, -k % 64)).tolist()
    stored = iter(operators.repack(problem, original).flatten().tolist())
    for n_block in range(0, 32, 16):
        for k_block in range(0, len(codes[0]), 32):
            for lane in range(32):
                for half in (0, 8):
                    for byte in range(4):
                        row, column = codes[n_block + half + lane // 4], k_block + lane % 4 * 4 + byte
                        assert next(stored) == row[column] + 8 | row[column + 16] + 8 << 4


def test_a_w4a16_weight_is_offset_and_in_order() -> None:
    problem = dataclasses.replace(W4A8, out_features=16, in_features=64, activation_bits=16)
    original = weight(problem)
    codes = packing.unpack(original).to(torch.int16) + 8
    assert torch.equal(operators.repack(problem, original).to(torch.int16), codes[:, 0::2] + 16 * codes[:, 1::2])


@pytest.mark.parametrize("kind", [(4, 8), (8, 8), (4, 16)])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *SIGLIP, (16, 64), (48, 192), (4096, 72)])
def test_tiles_fit_the_layer_and_the_smallest_gpu(shape: tuple[int, int], kind: tuple[int, int]) -> None:
    problem = Problem(*shape, *kind, 1, "none", 0, torch.bfloat16)
    for operator in operators.operators(problem):
        tile = operator.tile
        assert operator.k == -(-shape[1] // 64) * 64
        assert operator.n % tile.columns == 0
        assert operator.k % tile.chunk == 0
        width = 2 if kind[1] == 16 else 1
        moved = tile.rows * tile.chunk * width + tile.columns * tile.chunk * kind[0] // 8
        decoded = tile.columns * tile.chunk * width if kind[1] == 16 else 0
        assert moved * tile.stages + decoded <= SMALLEST_SHARED_MEMORY


def test_buckets_meet_without_a_gap() -> None:
    assert [operators.bucket(m) for m in (1, 64, 65, 640, 641, 4096)] == [0, 0, 1, 1, 2, 2]


def test_names_tell_operators_apart() -> None:
    problems = [
        Problem(*shape, *kind, 1, "none", 0, torch.half) for shape in SHAPES.values() for kind in ((4, 8), (8, 8))
    ]
    every = {operator for problem in problems for operator in operators.operators(problem)}
    assert len({operator.name for operator in every}) == len(every)
    assert all(operator.name.isidentifier() for operator in every)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_bits": 8, "activation_bits": 16}, "no W8A16"),
        ({"activation_bits": 16, "dtype": torch.float32}, "float16"),
        ({"scale_groups": 2}, "group_size"),
        ({"out_features": 72}, "out_features 72 is no multiple of 16"),
        ({"output_rotation": "matrix", "output_block": 256}, "at most 128, the layer's are 256"),
    ],
)
def test_every_reason_against_a_layer_is_given(changes: dict[str, object], reason: str) -> None:
    runs, reasons = loading.can_run(dataclasses.replace(W4A8, **changes), torch.device("cpu"))
    assert not runs
    assert any(reason in given for given in reasons)
    assert any("CUDA device, not cpu" in given for given in reasons)
    with pytest.raises(DuQuantError, match=reason):
        kernels.resolve("bitblas", dataclasses.replace(W4A8, **changes), torch.device("cpu"))


def test_a_layer_it_can_run_has_no_reason_of_its_own() -> None:
    assert loading.unsupported(W4A8) == []


def test_another_version_of_bitblas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1.1")
    (reason,) = patches.unsupported()
    assert "0.1.1" in reason
    assert "bitblas==0.1.0.post1" in reason
    with pytest.raises(RuntimeError, match=r"BitBLAS is 0\.1\.1"):
        patches.import_bitblas()


def test_a_missing_bitblas_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert patches.unsupported() == ["BitBLAS is not installed (pip install bitblas==0.1.0.post1)"]


LOOP = """for (int i = 0; i < 2; ++i) {
  clear(i);
}
tl::cp_async_gs<16>(first);
tl::cp_async_commit();
for (int ko = 0; ko < 5; ++ko) {
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row < m) {
      tl::cp_async_gs_conditional<16>(a);
    }
  }
  tl::cp_async_gs<16>(b);
  tl::cp_async_commit();
  tl::cp_async_wait<1>();
  __syncthreads();
  mma();
}
__syncthreads();
tl::cp_async_gs<16>(guarded);
mma();
#pragma unroll
for (int i = 0; i < 8; ++i) {
  tl::cp_async_gs<16>(unrolled);
}"""


def test_a_barrier_stands_before_every_copy_that_follows_reads() -> None:
    lines = [line.strip() for line in patches.mend_barriers(LOOP).split("\n")]
    before = {line: lines[index - 1] for index, line in enumerate(lines) if index}
    assert before["tl::cp_async_gs<16>(first);"] == "__syncthreads();"
    loop = lines.index("for (int ko = 0; ko < 5; ++ko) {")
    assert lines[loop + 1 : loop + 3] == ["__syncthreads();", "#pragma unroll"]  # in the loop, outside the condition
    assert lines[-5:-3] == ["__syncthreads();", "#pragma unroll"]
    assert lines.count("__syncthreads();") == 5
    assert [line for line in lines if line != "__syncthreads();"] == [
        line.strip() for line in LOOP.split("\n") if "__syncthreads" not in line
    ]


def test_the_cache_gives_the_newest_kernel_that_the_driver_can_load() -> None:
    for version in ((12, 9), (13, 0), (13, 1)):
        cache.Entry(cache.folder("sm_90", version), "k").store(f"{version}".encode(), {"rows": version[1]})
    assert cache.find("k", "sm_90", (13, 0)).read() == (b"(13, 0)", {"rows": 0})
    assert cache.find("k", "sm_90", (12, 9)).read() == (b"(12, 9)", {"rows": 9})
    assert cache.find("k", "sm_90", (12, 4)) is None
    assert cache.find("k", "sm_89", (13, 0)) is None
    assert cache.find("other", "sm_90", (13, 0)) is None


def test_the_caches_key_names_architecture_and_versions() -> None:
    name = cache.folder("sm_90", (13, 0)).name
    assert name == f"sm_90-bitblas{patches.VERSION}-patches{patches.PATCHES}-cuda13.0"


OPERATORS = [Operator("w4a8", n, 64, Tile(4, 1, 16, 16, 64, 3)) for n in (16, 32)]


@pytest.fixture
def generator(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A machine on which operators can be built, by a program that the test writes."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.93\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(patches, "unsupported", list)
    monkeypatch.setattr(build, "_GENERATE", "stand_in_generator")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "stand_in_generator.py"


BUILDS = """
import json, pathlib, sys
job = json.load(sys.stdin)
for operator in job["operators"]:
    tile = "x".join(map(str, operator["tile"].values()))
    name = f"bitblas_{operator['kind']}_n{operator['n']}_k{operator['k']}_{tile}"
    pathlib.Path(job["folder"], name + ".json").write_text(json.dumps([job["nvcc"], job["architecture"]]))
    print(name, flush=True)
"""


def test_only_what_is_missing_is_built(generator: pathlib.Path) -> None:
    generator.write_text(BUILDS)
    folder = build.build(OPERATORS[:1], "sm_90")
    assert folder == cache.folder("sm_90", (12, 8))
    first = folder / f"{OPERATORS[0].name}.json"
    assert json.loads(first.read_text())[1] == "sm_90"
    first.write_text("untouched")
    assert build.build(OPERATORS, "sm_90") == folder
    assert first.read_text() == "untouched"
    assert (folder / f"{OPERATORS[1].name}.json").exists()
    generator.write_text("raise SystemExit(1)")
    build.build(OPERATORS, "sm_90")


@pytest.mark.parametrize("program", ["import sys; sys.exit('ptxas: out of registers')", "pass"])
def test_a_compiler_that_fails_is_quoted(generator: pathlib.Path, program: str) -> None:
    generator.write_text(program)
    with pytest.raises(DuQuantError, match=r"Building 2 BitBLAS kernels .* failed after 0: (ptxas: out|no output)"):
        build.build(OPERATORS, "sm_90")


def test_obstacles_stop_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(patches, "unsupported", lambda: ["BitBLAS is away"])
    with pytest.raises(DuQuantError, match="BitBLAS is away; nvcc is not on the PATH"):
        build.build(OPERATORS, "sm_90")


def test_float16_cannot_overflow() -> None:
    a = torch.tensor([[1e30, -3e38, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1e-30, 2e-30, 0.0, -1e-31]])
    half, scale = launch._as_float16(a)
    assert half.isfinite().all()
    assert half.abs().max() <= 1
    torch.testing.assert_close(half.double() * scale.double(), a.double(), rtol=1e-3, atol=1e30)
    torch.testing.assert_close((half.double() * scale.double())[2], a[2].double(), rtol=1e-3, atol=1e-36)


def test_a_build_that_failed_is_not_tried_again_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(wanted: list[Operator], architecture: str) -> None:
        tried.append((len(wanted), architecture))
        raise DuQuantError("ptxas: out of registers")

    monkeypatch.setattr(loading, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(driver, "version", lambda: (13, 0))
    monkeypatch.setattr(build, "build", fail)
    monkeypatch.setattr(loading, "_faults", {})
    for _ in range(3):
        with pytest.raises(DuQuantError, match="ptxas: out of registers"):
            loading.load([W4A8], torch.device("cuda", 0))
    assert tried == [(3, "sm_90")]
