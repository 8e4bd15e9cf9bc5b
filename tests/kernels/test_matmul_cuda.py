"""The large matmul for Hopper against integers of 64 bits; how it is cut up and chosen, without a GPU."""

from collections.abc import Iterator
import logging
import pathlib

import emulated_hopper
import nvcc
import pytest
import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant import packing
from openpi_duquant.kernels import driver
from openpi_duquant.kernels import matmul_cuda
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.matmul_cuda import Shape

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"
BF16 = torch.bfloat16


def operands(m: int, k: int, n: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [M, K] and weights [N, K] over their full range, both ends among them, and scales."""
    torch.manual_seed(m + k + n)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    a, w = torch.randint(-127, 128, (m, k)), torch.randint(low, high, (n, k))
    a[0], w[0], w[-1, : k // 2], w[-1, k // 2 :] = 127, low, high - 1, low  # the largest sums
    scales = torch.rand(m, 1) / 10 + 0.1, torch.rand(n, 1) / 10 + 0.1
    return a.to(DEVICE), w.to(DEVICE), *(scale.to(DEVICE) for scale in scales)


def packed(w: Tensor, bits: int) -> Tensor:
    """As the backend holds it."""
    problem = Problem(64, 64, bits, 8, 1, "none", 0, BF16)
    return triton_matmul.repack(problem, packing.pack(w.to(torch.int8), bits))


def check(m: int, k: int, n: int, bits: int, after: str, shapes: list[Shape]) -> None:
    """The kernel in these shapes against its definition."""
    a, w, act_scale, weight_scale = operands(m, k, n, bits)
    y = (a.double() @ w.double().T) * act_scale.double() * weight_scale.double().T
    residual = (torch.randn(m, n, device=DEVICE) * y.std()).to(BF16) if after == "residual" else None
    if after == "geglu":
        act_scale /= y.std()  # where GELU bends
        gate, up = (y / y.std()).to(BF16).double().chunk(2, dim=1)
        y = F.gelu(gate, approximate="tanh") * up
    elif after == "residual":
        y += residual.double()
    for shape in shapes:
        out = torch.full((m, y.shape[1]), torch.nan, device=DEVICE, dtype=BF16)
        given = out, a.to(torch.int8), act_scale, packed(w, bits), weight_scale, residual
        matmul_cuda.launch(*given, geglu=after == "geglu", shape=shape)
        assert (out.double() - y).abs().max() < 2**-7 * y.abs().max()
        assert (out.double() - y).norm() < 4e-3 * y.norm()  # a bf16 is half of 2**-8 from what it stands for at most
        again = torch.full_like(out, torch.nan)
        matmul_cuda.launch(again, *given[1:], geglu=after == "geglu", shape=shape)
        assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")
@pytest.mark.parametrize("after", ["nothing", "residual", "geglu"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 64, 8), (33, 320, 72), (144, 1024, 256), (145, 1056, 264), (321, 2080, 392), (700, 4096, 1024)],
)
def test_it_is_its_definition(m: int, k: int, n: int, bits: int, after: str) -> None:
    steps = -(-k * bits // 8 // 128)
    shapes = [Shape(64, 256, 1), Shape(144, 256, 1)]
    if after != "geglu":
        shapes += Shape(64, 128, 1), Shape(176, 128, 1), Shape(96, 128, min(3, steps)), Shape(144, 128, min(8, steps))
    check(m, k, n, bits, after, shapes)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """Two SMs on a CPU; the instruction of many operands is a template there."""
    emulated_hopper.install(monkeypatch, tmp_path)
    monkeypatch.setattr(matmul_cuda, "source", lambda _: matmul_cuda._SOURCE.read_text())
    monkeypatch.setattr(matmul_cuda, "_difference", lambda *_: 0.0)  # from Triton's, which needs a GPU
    matmul_cuda._kernel.cache_clear()
    yield
    matmul_cuda._kernel.cache_clear()


@emulated_hopper.only_here
@pytest.mark.parametrize(
    ("m", "k", "n", "bits", "after", "shape"),
    [
        (1, 64, 8, 4, "nothing", Shape(64, 128, 1)),
        (33, 320, 72, 4, "geglu", Shape(64, 256, 1)),
        (33, 320, 72, 8, "geglu", Shape(144, 256, 1)),
        (145, 1056, 264, 4, "residual", Shape(96, 128, 3)),
        (145, 1056, 264, 4, "nothing", Shape(64, 256, 1)),
        (145, 1056, 264, 8, "residual", Shape(144, 128, 8)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("emulated")
def test_it_is_its_definition_on_a_cpu(m: int, k: int, n: int, bits: int, after: str, shape: Shape) -> None:
    check(m, k, n, bits, after, [shape])


@emulated_hopper.only_here
@pytest.mark.parametrize(("parts", "bits"), [(1, 8), (2, 4)])
@pytest.mark.usefixtures("emulated")
def test_sums_are_exact_on_a_cpu(parts: int, bits: int) -> None:
    check_sums(parts, bits)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("parts", [1, 2])
def test_sums_are_exact(parts: int, bits: int) -> None:
    check_sums(parts, bits)


def check_sums(parts: int, bits: int) -> None:
    """Products of the whole range cancel each other, all but a few: what is left is a number of bf16."""
    a, w, _, _ = operands(130, 512, 264, bits)
    w[:, :8] = torch.randint(-1, 2, (264, 8))
    a[:, :8] = torch.randint(-9, 10, (130, 8))
    w[:, 260:] = -w[:, 8:260].clamp(min=-(2 ** (bits - 1)) + 1)
    w[:, 8:260] = -w[:, 260:]
    a[:, 260:] = a[:, 8:260]
    sums = a.double() @ w.double().T
    assert 20 < sums.abs().max() < 256
    out = torch.empty(130, 264, device=DEVICE, dtype=BF16)
    ones = torch.ones(130, 1, device=DEVICE), torch.ones(264, 1, device=DEVICE)
    given = out, a.to(torch.int8), ones[0], packed(w, bits), ones[1], None
    matmul_cuda.launch(*given, geglu=False, shape=Shape(144, 128, parts))
    assert torch.equal(out.double(), sums)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")
def test_large_matmuls_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = matmul_cuda.launch
    monkeypatch.setattr(matmul_cuda, "launch", lambda *given, **more: launched.append(more) or launch(*given, **more))
    a, w, act_scale, weight_scale = operands(544, 2048, 8192, 4)
    weight, y = packed(w, 4), (a.double() @ w.double().T) * act_scale.double() * weight_scale.double().T
    out = triton_matmul.matmul(a.to(torch.int8), act_scale, weight, weight_scale, None, None, BF16)
    assert launched == [{"geglu": False}]
    assert (out.double() - y).norm() / y.norm() < 2.5e-3
    triton_matmul.matmul(a[:10].to(torch.int8), act_scale[:10], weight, weight_scale, None, None, BF16)
    assert len(launched) == 1


def every_shape() -> list[tuple[int, int, Shape]]:
    """Weight bits, bytes of a row, and the shape chosen, for what the models have and others."""
    sizes = [(32768, 2048), (2048, 16384), (2560, 2048), (8192, 1024), (1024, 4096), (264, 320), (8, 64)]
    return [
        (bits, k * bits // 8, matmul_cuda.shape_for(m, n, k * bits // 8, bits, processors, geglu=geglu))
        for m in (1, 100, 288, 544, 968, 4352)
        for n, k in sizes
        for bits in (4, 8)
        for processors in (78, 132)
        for geglu in (False, True)
    ]


def test_every_shape_fits() -> None:
    for bits, stored, shape in every_shape():
        stages, memory = matmul_cuda.memory_for(shape, bits)
        assert stages >= 3
        assert memory <= 227 * 1024
        assert shape.parts <= -(-stored // 128)
        stage = 128 * (shape.rows + 8 // bits * shape.tokens)
        if shape.parts > 1:  # all sums lie where the stages lay
            assert shape.tokens * shape.rows * 4 <= stages * stage


def test_few_tiles_are_shared_out() -> None:
    """544 tokens of `down` are 64 tiles, for 132 SMs; gate and up are 512."""
    shared = matmul_cuda.shape_for(544, 2048, 8192, 4, 132, geglu=False)
    assert shared.parts > 1
    assert -(-544 // shared.tokens) * (2048 // shared.rows) * shared.parts <= 132
    assert matmul_cuda.shape_for(544, 32768, 1024, 4, 132, geglu=False).parts == 1


def test_tiles_of_q_k_v_are_as_high_as_one_round_needs() -> None:
    """Of 968 tokens: 7 tiles of 144 by 20 would be more than there are SMs."""
    shape = matmul_cuda.shape_for(968, 2560, 1024, 4, 132, geglu=False)
    assert shape.parts == 1
    assert -(-968 // shape.tokens) * (2560 // shape.rows) <= 132


def test_a_tile_has_gate_and_up_of_many_channels() -> None:
    for m in (8, 128, 968):
        shape = matmul_cuda.shape_for(m, 2048, 8192, 4, 132, geglu=True)
        assert shape[1:] == (256, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"a": torch.empty(64, 2048, device="meta")},
        {"out": torch.empty(544, 16384, device="meta")},
        {"residual": torch.empty(544, 16384, device="meta")},
        {"bias": torch.empty(16384, device="meta")},
        {"matrices": torch.empty(256, 64, 64, device="meta")},
        {"hadamard": 64},
        {"cos": torch.empty(544, 256, device="meta")},
        {"gate": torch.empty(16384, device="meta")},
        {"weight": torch.empty(16384, 1032, device="meta")},
    ],
    ids=lambda changed: next(iter(changed), "nothing"),
)
def test_what_it_takes(changed: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_cuda, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(matmul_cuda, "processors_of", lambda _: 132)
    monkeypatch.setattr(matmul_cuda, "_kernel", lambda *_: object())
    nothing = dict.fromkeys(("bias", "matrices", "cos", "residual", "gate"))
    given = nothing | {
        "out": torch.empty(544, 16384, device="meta", dtype=BF16),
        "a": torch.empty(544, 2048, device="meta"),
        "weight": torch.empty(16384, 1024, device="meta"),
        "hadamard": 0,
    }
    assert matmul_cuda.takes(**(given | changed), geglu=False) == (not changed)


def test_other_gpus_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_cuda, "_kernel", lambda *_: pytest.fail("compiled"))
    for architecture in ("sm_80", "sm_89", "sm_100"):
        monkeypatch.setattr(matmul_cuda, "architecture", lambda _, here=architecture: here)
        large = torch.empty(4096, 2048, device="meta"), torch.empty(16384, 1024, device="meta")
        out = torch.empty(4096, 16384, device="meta", dtype=BF16)
        assert not matmul_cuda.takes(out, *large, None, None, 0, None, None, None, geglu=False)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is asked of the compiler and the driver; nothing runs."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(driver, "compile_source", lambda *given: asked.update(source=given[1], macros=given[3]) or b"")
    monkeypatch.setattr(driver, "load", lambda *given: asked.update(memory=given[2]) or object())
    monkeypatch.setattr(matmul_cuda, "_difference", lambda *_: asked.get("difference", 0.0))
    matmul_cuda._kernel.cache_clear()
    return asked


def make(shape: Shape, bits: int = 4, *, geglu: bool = False, residual: bool = False) -> object:
    """The kernel for one device."""
    return matmul_cuda._kernel(torch.device("cuda", 0), shape, matmul_cuda._Macros(bits, geglu, residual))


def test_a_kernel_that_differs_is_left_out(kernel: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    for difference in (0.01, float("nan")):
        matmul_cuda._kernel.cache_clear()
        kernel["difference"] = difference
        with caplog.at_level(logging.WARNING):
            assert make(Shape(64, 128, 1)) is None
        assert "differs from Triton's by" in caplog.messages[-1]


@nvcc.needed
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "after"),
    [
        (Shape(144, 256, 1), "geglu"),
        (Shape(144, 128, 2), "residual"),
        (Shape(128, 128, 1), "residual"),
        (Shape(64, 128, 8), ""),
    ],
)
def test_it_compiles_without_spilling_registers_or_waiting(
    kernel: dict[str, object], tmp_path: pathlib.Path, shape: Shape, after: str, bits: int
) -> None:
    make(shape, bits, geglu=after == "geglu", residual=after == "residual")
    report = nvcc.report(kernel["source"], "sm_90a", kernel["macros"], tmp_path)
    assert " 0 bytes spill stores" in report
    assert "serialized" not in report, "wgmmas wait for each other"
