"""The transform made for Hopper against the formula in fp64; what it takes and when it is left out, without a GPU."""

import pathlib

from by_formula import DEVICE
from by_formula import PROLOGUES
from by_formula import by_formula
from by_formula import check
from by_formula import inputs
from by_formula import prologue_of
from by_formula import sylvester
import emulated_hopper
import interpreted
import nvcc
import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import driver
from openpi_duquant.kernels import transform
from openpi_duquant.kernels import transform_cuda
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.kernels.transform_cuda import Kind
from openpi_duquant.transforms import Transform

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")
BF16 = torch.bfloat16


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """The kernels that run, in their order."""
    kinds: list[Kind] = []
    run = transform_cuda._run
    monkeypatch.setattr(transform_cuda, "_run", lambda *given: kinds.append(given[1]) or run(*given))
    transform_cuda._kernel.cache_clear()
    return kinds


def fused(x: Tensor, prologue: Prologue, permutation: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Through the operator."""
    return transform.fused_transform(x, Transform(None, permutation, block or None), prologue)


NARROW = [(512, 0), (512, 16), (1024, 128), (1536, 32), (2048, 64), (8192, 64)]
WIDE = [(9216, 0), (9216, 16), (16384, 64), (16384, 128)]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 3, 1400])  # the last: more than there are blocks
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("width", "block"), NARROW + WIDE)
def test_it_is_its_definition(
    launched: list[Kind], rows: int, name: str, width: int, block: int, *, permuted: bool
) -> None:
    prologue = prologue_of(name, width)
    if width > 8192 and (permuted or prologue.norm):
        pytest.skip("Triton's")
    permutation = torch.randperm(width, device=DEVICE) if permuted else None
    made = check_rows(rows, prologue, width, permutation, block)
    assert len(launched) == 2  # before its first use it is compared with its definition
    for again, first in zip(check_rows(rows, prologue, width, permutation, block), made, strict=True):
        assert torch.equal(again, first)


def check_rows(
    rows: int, prologue: Prologue, width: int, permutation: Tensor | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is made of random rows, always the same, once it is found to be what the formula says."""
    torch.manual_seed(rows + width)
    x = inputs(rows, width, BF16, geglu=prologue.geglu)
    made = fused(x, prologue, permutation, block)
    check(*made, by_formula(x, prologue, permutation, [sylvester(block)] * (width // block) if block else None))
    return made


@emulated_hopper.only_here
@pytest.mark.parametrize(
    ("rows", "width", "block", "name", "permuted"),
    [
        (3, 512, 16, "norm", True),
        (1, 512, 0, "none", True),
        (5, 2048, 64, "modulated", True),
        (3, 1024, 128, "geglu", True),
        (3, 1536, 32, "geglu norm", False),
        (3, 8192, 64, "gain", False),
        (3, 9216, 16, "none", False),
        (3, 16384, 128, "geglu", False),
    ],
)
def test_it_is_its_definition_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    launched: list[Kind],
    rows: int,
    width: int,
    block: int,
    name: str,
    *,
    permuted: bool,
) -> None:
    emulated_hopper.install(monkeypatch, tmp_path)
    monkeypatch.setattr(transform, "fused_transform", interpreted.fused_transform)
    permutation = torch.randperm(width) if permuted else None
    with torch.library._scoped_library("openpi_duquant", "FRAGMENT") as library:
        library.impl("fused_transform", transform._on_gpu, "CPU")
        check_rows(rows, prologue_of(name, width), width, permutation, block)
    assert len(launched) == 2
    transform_cuda._kernel.cache_clear()


@pytest.mark.gpu
@on_hopper
def test_factors_may_be_of_16_bits(launched: list[Kind]) -> None:
    x, (scale, shift) = inputs(5, 1024, BF16, geglu=False), torch.randn(2, 1024, device=DEVICE).to(BF16)
    prologue = Prologue(norm=True, scale=scale, shift=shift)
    check(*fused(x, prologue, None, 64), by_formula(x, prologue, None, [sylvester(64)] * 16))
    assert launched[-1].factor == BF16


@pytest.mark.gpu
@on_hopper
def test_rows_may_lie_apart(launched: list[Kind]) -> None:
    x = torch.randn(6, 1040, device=DEVICE).to(BF16)[::2, :1024]
    check(*fused(x, Prologue(), None, 32), by_formula(x, Prologue(), None, [sylvester(32)] * 32))
    assert launched


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("block", [0, 64])
def test_what_is_no_number_is_seen_in_its_row_alone(launched: list[Kind], value: float, block: int) -> None:
    x = torch.randn(3, 2048, device=DEVICE).to(BF16)
    x[1, 77] = value
    _, act_scale, _ = fused(x, Prologue(), None, block)
    assert act_scale.isfinite().flatten().tolist() == [True, False, True]
    assert act_scale[1].isnan() or value == value
    assert launched


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"x": torch.empty(5, 2048, device="meta")},
        {"x": torch.empty(5, 2064, device="meta", dtype=BF16)},
        {"x": torch.empty(0, 2048, device="meta", dtype=BF16)},
        {"x": torch.empty(5, 2052, device="meta", dtype=BF16)[:, :2048]},
        {"x": torch.empty(5, 16384, device="meta", dtype=BF16)},
        {"scale": torch.empty(2048, device="meta", dtype=torch.float64)},
        {"shift": torch.empty(2048, device="meta", dtype=BF16)},
        {"matrices": torch.empty(32, 64, 64, device="meta")},
    ],
    ids=lambda changed: next(iter(changed), "nothing"),
)
def test_what_it_takes(changed: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_cuda, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(transform_cuda, "_kernel", lambda *_: object())
    given = dict.fromkeys(("shift", "permutation", "matrices")) | {
        "x": torch.empty(5, 2048, device="meta", dtype=BF16),
        "scale": torch.empty(2048, device="meta"),
        "hadamard": 64,
    }
    kind = transform_cuda.kind_for(**(given | changed), geglu=False, norm=True)
    assert (kind is None) == bool(changed)


def test_rows_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what the kernel is given."""
    given: list[tuple[object, ...]] = []
    monkeypatch.setattr(transform_cuda, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(transform_cuda, "processors_of", lambda _: 132)
    monkeypatch.setattr(transform_cuda, "_kernel", lambda *_: lambda *all_: given.append(all_))
    x, scale, permutation = torch.zeros(900, 2080, dtype=BF16)[:, :2048], torch.zeros(2048), torch.arange(2048)
    what = 64, False, True  # a Hadamard; no GeGLU; a norm
    outputs = transform._on_gpu(x, scale, None, permutation, None, *what)
    grid, threads, (arguments,) = given[0]
    assert grid == (6 * 132, 1, 1)
    assert threads == 128
    pointers = (arguments.x, arguments.scale, arguments.shift, arguments.permutation, arguments.codes)
    assert pointers == (x.data_ptr(), scale.data_ptr(), None, permutation.data_ptr(), outputs[0].data_ptr())
    assert (arguments.act_scale, arguments.row_sum) == (outputs[1].data_ptr(), outputs[2].data_ptr())
    assert (arguments.stride, arguments.rows) == (2 * 2080, 900)


def test_other_gpus_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_cuda, "_kernel", lambda *_: pytest.fail("compiled"))
    for architecture in ("sm_80", "sm_89", "sm_100"):
        monkeypatch.setattr(transform_cuda, "architecture", lambda _, here=architecture: here)
        x = torch.empty(5, 2048, device="meta", dtype=BF16)
        assert transform_cuda.kind_for(x, None, None, None, None, 64, geglu=False, norm=False) is None


def kinds() -> list[Kind]:
    """What the models have, what needs most registers, and both ends of the widths."""
    fp32 = torch.float32
    return [
        Kind(2048, 64, geglu=False, norm=True, scale=True, shift=False, permuted=True, factor=fp32),
        Kind(1024, 64, geglu=False, norm=True, scale=True, shift=True, permuted=True, factor=fp32),
        Kind(16384, 64, geglu=False, norm=False, scale=False, shift=False, permuted=False, factor=fp32),
        Kind(16384, 128, geglu=True, norm=False, scale=False, shift=False, permuted=False, factor=fp32),
        Kind(8192, 128, geglu=True, norm=True, scale=True, shift=True, permuted=True, factor=BF16),
        Kind(512, 0, geglu=False, norm=False, scale=False, shift=False, permuted=False, factor=fp32),
    ]


@pytest.mark.parametrize("kind", kinds(), ids=str)
def test_blocks_fit_an_sm(kind: Kind) -> None:
    assert kind.threads % 32 == 0
    assert kind.threads <= 1024
    assert kind.blocks * kind.shared_memory <= 224 * 1024


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is asked of the compiler; nothing runs."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(driver, "compile_source", lambda *given: asked.update(macros=given[3]) or b"")
    monkeypatch.setattr(driver, "load", lambda *_: object())
    monkeypatch.setattr(transform_cuda, "_fault", lambda *_: asked.get("fault"))
    transform_cuda._kernel.cache_clear()
    return asked


def test_a_kernel_that_errs_is_left_out(asked: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    asked["fault"] = "rounded 7 of 9 codes otherwise"
    assert transform_cuda._kernel(torch.device("cuda", 0), kinds()[0]) is None
    assert "rounded 7 of 9 codes otherwise; please report" in caplog.messages[-1]


@pytest.mark.gpu
@on_hopper
def test_faults_are_found(launched: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel that is given another permutation than its definition."""
    run = transform_cuda._run

    def permute_otherwise(*given: object) -> None:
        *before, permutation, outputs = given
        run(*before, permutation.flip(0), outputs)

    monkeypatch.setattr(transform_cuda, "_run", permute_otherwise)
    assert transform_cuda._kernel(torch.device("cuda", 0), kinds()[0]) is None
    assert launched


@nvcc.needed
@pytest.mark.parametrize("kind", kinds(), ids=str)
def test_it_compiles_without_spilling_registers(asked: dict[str, object], tmp_path: pathlib.Path, kind: Kind) -> None:
    assert transform_cuda._kernel(torch.device("cuda", 0), kind) is not None
    report = nvcc.report(transform_cuda._SOURCE.read_text(), "sm_90a", asked["macros"], tmp_path)
    assert " 0 bytes spill stores" in report
