"""Kernels as compiled for sm_90 (no GPU needed): what comes before the wait of a dependent launch, and what after."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import openpi_duquant

pytestmark = pytest.mark.triton
KERNELS = (
    "row",
    "block",
    "matmul, few",
    "matmul, many",
    "matmul, rotary",
    "rotary",
    "layer norm",
    "attend",
    "combine",
    "combine and round",
)
MEMORY = re.compile(r"\b(ld|st|red|atom)\.(\w+\.)*global|\bcp\.|\bld\.const|\bmultimem")
JUMP = re.compile(r"\b(bra|ret|exit|brx)\b")


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[list[str]]]:
    """Instructions of every kernel, launched dependently and not."""
    from openpi_duquant.kernels import pdl_triton  # noqa: PLC0415

    if not pdl_triton.KNOWN:
        pytest.skip("this Triton has no programmatic dependent launch")
    here = pathlib.Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # noqa: TID251
    environment["PYTHONPATH"] = str(pathlib.Path(openpi_duquant.__file__).parents[1])
    command = [sys.executable, str(here / "compile_kernels.py")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(answer.stdout)
    assert tuple(found) == KERNELS
    return {name: [_instructions(text) for text in both] for name, both in found.items()}


def _instructions(ptx: str) -> list[str]:
    lines = (line.partition("//")[0].strip() for line in ptx[ptx.index(".entry") :].splitlines())
    return [line for line in lines if line.endswith(";") and not line.startswith(".")]


def places(lines: list[str], pattern: str | re.Pattern[str]) -> list[int]:
    return [place for place, line in enumerate(lines) if re.search(pattern, line)]


@pytest.mark.parametrize("name", KERNELS)
def test_every_program_waits_before_it_touches_memory(compiled: dict[str, list[list[str]]], name: str) -> None:
    lines, _ = compiled[name]
    (starts,), (waits,) = (places(lines, rf"griddepcontrol\.{what}") for what in ("launch_dependents", "wait"))
    assert starts < waits < min(places(lines, MEMORY))
    assert starts < min(places(lines, r"\bprefetch"), default=waits)
    assert not any(line.startswith("@") for line in (lines[starts], lines[waits]))
    assert not places(lines[:waits], JUMP)


@pytest.mark.parametrize("name", KERNELS)
def test_only_weights_of_few_tokens_are_asked_for_ahead(compiled: dict[str, list[list[str]]], name: str) -> None:
    lines, _ = compiled[name]
    assert bool(places(lines, r"prefetch\.global\.L2")) == (name in ("matmul, few", "matmul, rotary"))


@pytest.mark.parametrize("name", KERNELS)
def test_elsewhere_kernels_are_as_they_were(compiled: dict[str, list[list[str]]], name: str) -> None:
    assert not places(compiled[name][1], r"griddepcontrol|prefetch")


def test_a_row_stays_in_registers(compiled: dict[str, list[list[str]]]) -> None:
    """A sum over the layout that butterflies leave would take it through shared memory, in some versions of Triton."""
    for lines in compiled["row"]:
        assert len(places(lines, r"\bst\.shared")) < 32


@pytest.mark.parametrize(
    ("known", "capability", "on"), [(True, (9, 0), True), (True, (8, 9), False), (False, (9, 0), False)]
)
def test_it_is_on_where_gpu_and_triton_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, known: bool, on: bool
) -> None:
    from openpi_duquant.kernels import pdl_triton  # noqa: PLC0415

    monkeypatch.setattr(pdl_triton, "KNOWN", known)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    pdl_triton._supported.cache_clear()
    assert pdl_triton._supported(0) is on
    pdl_triton._supported.cache_clear()
    assert pdl_triton.options(torch.empty(1)) == {"PDL": False}


def test_a_program_asks_for_a_part_of_its_rows() -> None:
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415
    from openpi_duquant.kernels.tiles import Tile  # noqa: PLC0415

    assert matmul_triton._lines(10, 512, Tile(16, 64, 128, 1, 4, 4)) == 4  # the whole row
    assert matmul_triton._lines(10, 2048, Tile(16, 16, 512, 1, 4, 3)) == 16
    assert matmul_triton._lines(10, 8192, Tile(16, 64, 512, 1, 4, 3)) == 8  # 512 lines in all
    assert matmul_triton._lines(64, 100, Tile(16, 32, 512, 1, 4, 3)) == 1
    assert matmul_triton._lines(65, 512, Tile(16, 64, 128, 1, 4, 4)) == 0
