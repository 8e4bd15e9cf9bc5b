"""Kernels as Triton compiles them for sm_80 and sm_90; needs no GPU."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import openpi_duquant

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """PTX of every kernel, for sm_80 and sm_90."""
    here = pathlib.Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # noqa: TID251
    environment["PYTHONPATH"] = str(pathlib.Path(openpi_duquant.__file__).parents[1])
    command = [sys.executable, str(here / "compile_kernels.py")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(answer.stdout)


def test_every_kernel_is_compiled(compiled: dict[str, list[str]]) -> None:
    package = pathlib.Path(openpi_duquant.__file__).parent
    launched = {
        name
        for path in package.rglob("*_triton.py")
        for name in re.findall(r"^    +(_\w+)\[", path.read_text(), re.MULTILINE)
    }
    assert {re.search(r"\.entry (\w+)\(", text)[1] for texts in compiled.values() for text in texts} == launched


def test_a_row_stays_in_registers(compiled: dict[str, list[str]]) -> None:
    """A sum over the layout that butterflies leave would take it through shared memory, in some versions of Triton."""
    for ptx in compiled["row"]:
        assert len(re.findall(r"\bst\.shared", ptx)) < 32
