"""Attention of patches against softmax in fp64; what the kernel made for Hopper takes and when it is left out."""

from collections.abc import Iterator
import logging
import math
import pathlib

import emulated_hopper
import nvcc
import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import driver
from openpi_duquant.kernels import patch_attention
from openpi_duquant.kernels import patch_attention_cuda

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of sm_90")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16


def operands(images: int, patches: int, heads: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one tensor, as a merged layer makes them; scores of patch 3 are far apart."""
    torch.manual_seed(channels)
    qkv = torch.randn(images, patches, 3, heads, channels).to(DEVICE, dtype)
    qkv[:, 3, 0] *= 30
    return qkv.unbind(2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, [B, P, H, D] fp64."""
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.double())


def check(images: int, heads: int) -> None:
    """The kernel, into poisoned outputs, against the formula; and again, to the bit."""
    given = operands(images, 256, heads, 72, BF16)
    function, expected = patch_attention_cuda._kernel(given[0].device), attended(*given)
    out, again = (torch.full(expected.shape, torch.nan, dtype=BF16, device=DEVICE) for _ in range(2))
    for made in (out, again):
        patch_attention_cuda._run(function, made, *given)
    assert (out.double() - expected).abs().max() < 2**-7 * expected.abs().max()
    assert (out.double() - expected).norm() < 4e-3 * expected.norm()
    assert torch.equal(out, again)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("images", "heads"), [(1, 16), (3, 16), (1, 1), (2, 5)])
def test_it_is_the_formula(images: int, heads: int) -> None:
    check(images, heads)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """A CPU, where the instructions of many operands are templates."""
    emulated_hopper.install(monkeypatch, tmp_path)
    monkeypatch.setattr(patch_attention_cuda, "source", patch_attention_cuda._SOURCE.read_text)
    monkeypatch.setattr(patch_attention_cuda, "_difference", lambda *_: 0.0)  # tested here
    patch_attention_cuda._kernel.cache_clear()
    yield
    patch_attention_cuda._kernel.cache_clear()


@emulated_hopper.only_here
@pytest.mark.usefixtures("emulated")
def test_it_is_the_formula_on_a_cpu() -> None:
    check(2, 2)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("patches", "channels"), [(256, 72), (16, 24)])
def test_patches_attend_to_each_other(patches: int, channels: int, dtype: torch.dtype) -> None:
    given = operands(2, patches, 4, channels, dtype)
    expected = attended(*given).flatten(2)
    out = patch_attention.attend_patches(*given)
    assert (out.double() - expected).norm() < (1e-2 if dtype == BF16 else 1e-5) * expected.norm()


@pytest.mark.gpu
@on_hopper
def test_the_tower_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = patch_attention_cuda.launch
    monkeypatch.setattr(patch_attention_cuda, "launch", lambda *given: launched.append(given[0]) or launch(*given))
    patch_attention.attend_patches(*operands(2, 256, 16, 72, BF16))
    assert len(launched) == 1
    patch_attention.attend_patches(*operands(2, 256, 16, 72, torch.float16))
    assert len(launched) == 1


@pytest.mark.parametrize(
    ("changed", "architecture"),
    [
        ({}, "sm_90"),
        ({}, "sm_80"),
        ({"size": (2, 196, 3, 16, 72)}, "sm_90"),
        ({"size": (2, 256, 3, 16, 64)}, "sm_90"),
        ({"dtype": torch.float16}, "sm_90"),
    ],
)
def test_what_it_takes(changed: dict[str, object], architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_attention_cuda, "architecture", lambda _: architecture)
    monkeypatch.setattr(patch_attention_cuda, "_kernel", lambda *_: object())
    qkv = torch.empty(**({"size": (2, 256, 3, 16, 72), "dtype": BF16, "device": "meta"} | changed))
    q, k, v = qkv.unbind(2)
    assert patch_attention_cuda.takes(q, k, v) == (not changed and architecture == "sm_90")
    assert not patch_attention_cuda.takes(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is asked of the compiler and the driver; nothing runs."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(driver, "compile_source", lambda *given: asked.update(source=given[1], macros=given[3]) or b"")
    monkeypatch.setattr(driver, "load", lambda *given: asked.update(memory=given[2]) or object())
    monkeypatch.setattr(patch_attention_cuda, "_difference", lambda *_: asked.get("difference", 0.0))
    patch_attention_cuda._kernel.cache_clear()
    return asked


def make() -> object:
    """The kernel for one device."""
    return patch_attention_cuda._kernel(torch.device("cuda", 0))


def test_a_kernel_that_differs_is_left_out(kernel: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    for difference in (0.03, math.nan):
        patch_attention_cuda._kernel.cache_clear()
        kernel["difference"] = difference
        with caplog.at_level(logging.WARNING):
            assert make() is None
        assert "differs from torch's by" in caplog.messages[-1]


@nvcc.needed
def test_it_compiles_without_spilling_registers_or_waiting(kernel: dict[str, object], tmp_path: pathlib.Path) -> None:
    make()
    assert 2 * (kernel["memory"] + 1024) <= 228 * 1024  # two blocks an SM, which keeps a KB of each
    report = nvcc.report(kernel["source"], "sm_90a", kernel["macros"], tmp_path)
    assert " 0 bytes spill stores" in report
    assert "serialized" not in report, "wgmmas wait for each other"
