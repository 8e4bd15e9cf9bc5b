"""Attention made for Hopper against softmax in fp64; what it takes and when it is left out, without a GPU."""

from collections.abc import Iterator
import logging
import math
import pathlib

import emulated_hopper
import nvcc
import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import attention
from openpi_duquant.kernels import attention_cuda
from openpi_duquant.kernels import driver
from openpi_duquant.kernels import transform

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")
DEVICE = "cuda" if HOPPER else "cpu"
BF16 = torch.bfloat16
SIZES = [(1, 1, 1, 1), (2, 5, 70, 2), (1, 16, 64, 1), (2, 35, 193, 4), (1, 100, 544, 4), (1, 544, 544, 3)]


def operands(batch: int, tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, parts of wider rows, and which keys are visible: in the last observation all are."""
    torch.manual_seed(tokens + keys)
    q = torch.randn(batch, tokens, 10, 256).to(DEVICE, BF16)[:, :, :8]
    k, v = torch.randn(batch, keys, 3, 256).to(DEVICE, BF16)[:, :, 1:].unbind(2)
    visible = torch.rand(batch, keys, device=DEVICE) < 0.6
    visible[-1] = visible[:, 0] = True
    return q, k, v, visible


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """The formula, [B, S, H, D] fp64."""
    scores = torch.einsum("bshd,btd->bhst", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    return torch.einsum("bhst,btd->bshd", scores.softmax(-1), v.double())


def run(parts: int, q: Tensor, *others: Tensor | None, rounded: bool) -> attention_cuda.Outputs:
    """The kernel, into poisoned outputs."""
    function = attention_cuda._kernel(q.device, parts, rounded)
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    if rounded:
        out = tuple(part.fill_(-77) for part in transform.empty(q, len(q) * q.shape[1], 2048))
    attention_cuda._run(function, parts, out, q, *others)
    return out


def check(batch: int, tokens: int, keys: int, parts: int, *, masked: bool) -> None:
    """The kernel, rounded and not, against the formula; and again, to the bit."""
    q, k, v, visible = operands(batch, tokens, keys)
    given = q, k, v, visible if masked else None
    expected = attended(*given)
    out = run(parts, *given, rounded=False)
    assert (out.double() - expected).abs().max() < 2**-7 * expected.abs().max()
    assert (out.double() - expected).norm() < 4e-3 * expected.norm()
    codes, act_scale, row_sum = run(parts, *given, rounded=True)
    rows = out.flatten(2).flatten(0, 1).double()
    torch.testing.assert_close(act_scale.double(), rows.abs().amax(1, keepdim=True) / 127, rtol=1e-6, atol=0)
    assert (codes - rows / act_scale.double()).abs().max() <= 0.5 + 1e-4
    assert torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32))
    assert torch.equal(out, run(parts, *given, rounded=False))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "keys", "parts"), [*SIZES, (1, 968, 968, 2), (3, 130, 1000, 4)])
def test_it_is_the_formula(batch: int, tokens: int, keys: int, parts: int, *, masked: bool) -> None:
    for number in {1, parts}:
        check(batch, tokens, keys, number, masked=masked)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """A CPU, where the instructions of many operands are templates."""
    emulated_hopper.install(monkeypatch, tmp_path)
    monkeypatch.setattr(attention_cuda, "source", attention_cuda._SOURCE.read_text)
    monkeypatch.setattr(attention_cuda, "_difference", lambda *_, **__: 0.0)  # from Triton's, which needs a GPU
    attention_cuda._kernel.cache_clear()
    yield
    attention_cuda._kernel.cache_clear()


@emulated_hopper.only_here
@pytest.mark.parametrize(("batch", "tokens", "keys", "parts"), [(1, 1, 1, 1), (2, 18, 70, 2), (1, 5, 330, 1)])
@pytest.mark.usefixtures("emulated")
def test_it_is_the_formula_on_a_cpu(batch: int, tokens: int, keys: int, parts: int) -> None:
    check(batch, tokens, keys, parts, masked=True)


def check_others() -> None:
    """Who sees nothing has zeros; not a number is in its own token alone; scores may be far apart."""
    q, k, v, visible = operands(2, 9, 130)
    visible[0] = False
    q[1, 2, 3, 4] = torch.nan
    codes, act_scale, row_sum = run(2, q, k, v, visible, rounded=True)
    assert not codes[:9].any()
    assert not row_sum[:9].any()
    assert (act_scale[:9] == 1).all()
    assert act_scale[9:].isnan().flatten().tolist() == [token == 2 for token in range(9)]
    q[1, 2, 3, 4] = 0
    for late in (slice(0, 64), slice(64, 128), slice(128, 130)):
        higher = k.clone()
        higher[1, late] *= 50
        expected = attended(q, higher, v, None)
        for parts in (1, 2):
            out = run(parts, q, higher, v, None, rounded=False)
            assert (out.double() - expected).norm() < 4e-3 * expected.norm()


@emulated_hopper.only_here
@pytest.mark.usefixtures("emulated")
def test_nothing_seen_not_a_number_and_large_scores_on_a_cpu() -> None:
    check_others()


@pytest.mark.gpu
@on_hopper
def test_nothing_seen_not_a_number_and_large_scores() -> None:
    check_others()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rounded", [False, True])
def test_attention_of_many_tokens_goes_there(monkeypatch: pytest.MonkeyPatch, *, rounded: bool) -> None:
    launched = []
    launch = attention_cuda.launch
    monkeypatch.setattr(attention_cuda, "launch", lambda *given: launched.append(given[0]) or launch(*given))
    attend = attention.attend_quantized if rounded else attention.attend
    given = operands(1, 544, 544)
    y = attend(*given)
    assert len(launched) == 1
    y = (y[0] * y[1]).view(given[0].shape) if rounded else y.view(given[0].shape)
    expected = attended(*given)
    assert (y.double() - expected).norm() < 2e-2 * expected.norm()
    q, k, v, visible = operands(1, 10, 544)
    attend(q, k, v, visible)
    attend(*given, own=(given[1], given[2]))
    assert len(launched) == 1


@pytest.mark.parametrize(
    ("tokens", "keys", "batch", "processors", "parts"),
    [
        (544, 544, 1, 132, 3),  # 34 tiles, of which four times as many do not run at the same time
        (968, 968, 1, 132, 2),
        (1056, 1056, 1, 132, 2),
        (544, 544, 4, 132, 1),
        (288, 288, 1, 132, 4),
        (288, 288, 1, 78, 3),
        (80, 4096, 1, 132, 4),
    ],
)
def test_keys_are_shared_out(tokens: int, keys: int, batch: int, processors: int, parts: int) -> None:
    assert attention_cuda.parts_for(tokens, keys, batch, processors) == parts


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"q": torch.empty(1, 544, 4, 256, dtype=BF16, device="meta")},
        {"q": torch.empty(1, 544, 8, 128, dtype=BF16, device="meta")},
        {"q": torch.empty(1, 64, 8, 256, dtype=BF16, device="meta")},
        {"q": torch.empty(1, 544, 8, 256, device="meta")},
        {"q": torch.empty(2, 600, 8, 256, dtype=BF16, device="meta")[:, :544]},
        {"k": torch.empty(1, 4100, 256, dtype=BF16, device="meta")},
        {"k": torch.empty(1, 544, 260, dtype=BF16, device="meta")[:, :, :256]},
        {"v": torch.empty(1, 544, 256, 2, dtype=BF16, device="meta")[..., 0]},
        {"own_k": torch.empty(1, 544, 256, dtype=BF16, device="meta")},
    ],
    ids=lambda changed: next(iter(changed), "nothing"),
)
def test_what_it_takes(changed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(attention_cuda, "processors_of", lambda _: 132)
    monkeypatch.setattr(attention_cuda, "_kernel", lambda *_: object())
    q, k, v = (torch.empty(1, 544, width, 256, dtype=BF16, device="meta") for width in (8, 1, 1))
    given = {"q": q, "k": k[:, :, 0], "v": v[:, :, 0], "own_k": None}
    assert attention_cuda.takes(**(given | changed), rounded=True) == (not changed)
    monkeypatch.setattr(attention_cuda, "architecture", lambda _: "sm_80")
    assert not attention_cuda.takes(**given, rounded=True)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is asked of the compiler and the driver; nothing runs."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(driver, "compile_source", lambda *given: asked.update(source=given[1], macros=given[3]) or b"")
    monkeypatch.setattr(driver, "load", lambda *given: asked.update(memory=given[2]) or object())
    monkeypatch.setattr(attention_cuda, "_difference", lambda *_, **__: asked.get("difference", 0.0))
    attention_cuda._kernel.cache_clear()
    return asked


def make(parts: int, *, rounded: bool = True) -> object:
    """The kernel for one device."""
    return attention_cuda._kernel(torch.device("cuda", 0), parts, rounded)


def test_a_kernel_that_differs_is_left_out(kernel: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    for difference in (0.03, math.nan):
        attention_cuda._kernel.cache_clear()
        kernel["difference"] = difference
        with caplog.at_level(logging.WARNING):
            assert make(2) is None
        assert "differs from Triton's by" in caplog.messages[-1]


@nvcc.needed
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_it_compiles_without_spilling_registers_or_waiting(
    kernel: dict[str, object], tmp_path: pathlib.Path, parts: int, *, rounded: bool
) -> None:
    make(parts, rounded=rounded)
    report = nvcc.report(kernel["source"], "sm_90a", kernel["macros"], tmp_path)
    assert " 0 bytes spill stores" in report
    assert "serialized" not in report, "wgmmas wait for each other"
