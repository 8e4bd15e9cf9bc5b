"""Where actions come from: what cannot be had is said in one line."""

from collections.abc import Callable
import pathlib
import socket

import pytest

from openpi_duquant import PRESETS
from openpi_duquant import DuQuantError
from openpi_duquant.libero.policies import ServerPolicy
from openpi_duquant.libero.policies import check_checkpoint
from openpi_duquant.libero.policies import check_served


def test_a_floating_point_policy_is_not_asked_of_a_quantized_checkpoint(
    source: pathlib.Path, converted: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (source, converted("default")):
        check_checkpoint(folder, "pi05_libero_duquant")
    check_checkpoint(source, "pi05_libero")
    with pytest.raises(DuQuantError, match="is quantized; pi05_libero is a floating-point policy"):
        check_checkpoint(converted("default"), "pi05_libero")
    monkeypatch.setenv("OPENPI_DUQUANT_BACKEND", "fake")
    check_checkpoint(source, "pi05_libero_duquant")
    with pytest.raises(DuQuantError, match="unset the OPENPI_DUQUANT"):
        check_checkpoint(source, "pi05_libero")


def test_a_server_must_run_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"config": PRESETS["optimized"].to_json()}
    for config in ("pi05_libero_duquant", None):
        check_served(facts, config)
    for config in ("pi05_libero", None):
        check_served(None, config)
    with pytest.raises(DuQuantError, match="is in floating point, and not quantized"):
        check_served(None, "pi05_libero_duquant")
    with pytest.raises(DuQuantError, match="is quantized, and not in floating point"):
        check_served(facts, "pi05_libero")
    monkeypatch.setenv("OPENPI_DUQUANT_BLOCK", "16")
    check_served(facts, None)
    monkeypatch.setenv("OPENPI_DUQUANT_BLOCK", "64")
    with pytest.raises(DuQuantError, match=r"rotation_block 16, OPENPI_DUQUANT_\* asks for 64"):
        check_served(facts, None)


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openpi_client")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(DuQuantError, match=f"no policy server answers at 127.0.0.1:{port} within 0.1 s: .*refused"):
        ServerPolicy("127.0.0.1", port, timeout_s=0.1)
