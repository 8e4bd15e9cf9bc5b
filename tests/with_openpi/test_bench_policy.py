"""bench-policy's rows that run in openpi's own forward pass: they compute what the engine's rows do."""

import json
import os
import pathlib
import sys

import pytest

from openpi_duquant.accuracy import relative_error
from openpi_duquant.commands import main
from openpi_duquant.commands.policy_timing import decode

ROWS = ("module", "w4a8-reference", "bf16-eager", "openpi-eager")


@pytest.mark.openpi
def test_openpis_rows_agree_with_the_engines(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["OPENPI_SRC"]  # noqa: TID251
    options = "--output", tmp_path, "--checkpoint", source, "--device", "cpu", "--num-steps", 2, "--calls", 3
    monkeypatch.setattr(sys, "argv", ["openpi-duquant", "bench-policy", *map(str, options), "--rows", *ROWS])
    main()
    rows = json.loads((tmp_path / "policy.json").read_text())["rows"]
    actions = {name: decode(rows[name]["actions"]) for name in ROWS}
    quantization = relative_error(actions["w4a8-reference"], actions["bf16-eager"])
    assert relative_error(actions["openpi-eager"], actions["bf16-eager"]) < 0.2 * quantization
    assert relative_error(actions["module"], actions["w4a8-reference"]) < 0.5 * quantization
