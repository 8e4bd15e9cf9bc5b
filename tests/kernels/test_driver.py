"""Machine code is kept, and made again whenever anything that it depends on has changed; what fails is left out."""

from collections.abc import Callable
import ctypes
import logging
import pathlib
import types

import pytest
import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import attention_cuda
from openpi_duquant.kernels import driver
from openpi_duquant.kernels import matmul_cuda
from openpi_duquant.kernels import patch_attention_cuda
from openpi_duquant.kernels import transform_cuda
from openpi_duquant.kernels.matmul_cuda import Shape
from openpi_duquant.kernels.transform_cuda import Kind


class Compiler:
    """Stands for NVRTC: its code says how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.version = 0, (13, 0)
        library = types.SimpleNamespace(nvrtcVersion=self._tell)
        monkeypatch.setattr(driver, "_nvrtc", lambda: library)
        monkeypatch.setattr(driver, "_compiled", self._compile)

    def _tell(self, *numbers: object) -> int:
        for number, value in zip(numbers, self.version, strict=True):
            ctypes.cast(number, ctypes.POINTER(ctypes.c_int))[0] = value
        return 0

    def _compile(self, *_: object) -> bytes:
        self.asked += 1
        return f"code {self.asked}".encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Compiler:
    """A compiler, and a cache and a folder of headers of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "_FOLDER", tmp_path)
    (tmp_path / "numbers.cuh").write_text("int two() { return 2; }")
    return Compiler(monkeypatch)


def compiled(source: str = "kernel", architecture: str = "sm_90", **constants: int) -> bytes:
    """What there is to load."""
    return driver.compile_source("matmul.cu", source, architecture, constants)


def test_code_is_made_once(compiler: Compiler, tmp_path: pathlib.Path) -> None:
    assert compiled(TOKENS=64) == compiled(TOKENS=64) == b"code 1"
    (kept,) = (tmp_path / "cache" / "openpi-duquant" / "cuda").iterdir()
    assert kept.read_bytes() == b"code 1"


def test_code_of_anything_else_is_made_anew(compiler: Compiler, tmp_path: pathlib.Path) -> None:
    compiled(TOKENS=64)
    assert compiled(TOKENS=80) == b"code 2"
    assert compiled("other kernel", TOKENS=64) == b"code 3"
    assert compiled(architecture="sm_90a", TOKENS=64) == b"code 4"
    compiler.version = (13, 1)
    assert compiled(TOKENS=64) == b"code 5"
    compiler.version = (13, 0)
    (tmp_path / "numbers.cuh").write_text("int two() { return 3; }")
    assert compiled(TOKENS=64) == b"code 6"


def test_where_nothing_can_be_kept_it_is_made_every_time(
    compiler: Compiler, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert (compiled(), compiled()) == (b"code 1", b"code 2")
    assert "matmul.cu cannot be kept compiled" in caplog.text


KIND = Kind(2048, 64, geglu=False, norm=False, scale=False, shift=False, permuted=False, factor=torch.float32)


@pytest.mark.parametrize(
    ("kernel", "given", "others"),
    [
        (matmul_cuda._kernel, (Shape(64, 128, 1), matmul_cuda._Macros(4, geglu=False, residual=False)), "matmuls run"),
        (attention_cuda._kernel, (2, True), "attention runs"),
        (patch_attention_cuda._kernel, (), "patches are attended to"),
        (transform_cuda._kernel, (KIND,), "inputs are transformed"),
    ],
    ids=["matmul", "attention", "patches", "transform"],
)
def test_a_kernel_that_does_not_compile_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kernel: Callable[..., object],
    given: tuple[object, ...],
    others: str,
) -> None:
    def refuse(*_: object) -> bytes:
        raise DuQuantError("no compiler")

    monkeypatch.setattr(driver, "compile_source", refuse)
    kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernel(torch.device("cuda", 0), *given) is None
    assert caplog.messages == [f"{others} without the kernel made for Hopper: no compiler"]
    kernel.cache_clear()
