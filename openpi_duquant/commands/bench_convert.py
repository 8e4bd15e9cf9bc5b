"""openpi-duquant bench-convert."""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import tyro

from openpi_duquant.checkpoint import Manifest
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import refuse_variables
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantError
from openpi_duquant.config import preset as preset_config
from openpi_duquant.report import markdown_stamp
from openpi_duquant.report import markdown_table
from openpi_duquant.report import stamp
from openpi_duquant.report import write_json

_POLL_SECONDS = 0.1


def bench_convert(
    source: tyro.conf.Positional[pathlib.Path],
    *,
    output: pathlib.Path = pathlib.Path("out/bench-convert"),
    presets: tuple[str, ...] = tuple(PRESETS),
) -> None:
    """Convert a checkpoint with every preset, each in its own process: time, memory and size (Linux).

    Writes conversion.md and conversion.json; the converted checkpoints are deleted.

    Args:
        source: Folder with model.safetensors.
        output: Folder for the results.
        presets: Presets to convert with.
    """
    refuse_variables("bench-convert")
    if not presets:
        raise DuQuantError("presets: name at least one")
    for name in presets:
        preset_config(name)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in presets:
        with tempfile.TemporaryDirectory(prefix="converted-", dir=output) as scratch:
            rows.append(_measure(source, pathlib.Path(scratch) / name, name))
        console.print(f"{name}: {rows[-1]['seconds']:.0f} s")
        results = {"source_bytes": rows[0]["source_bytes"], "presets": rows, "stamp": stamp()}
        write_json(output / "conversion.json", results)
        (output / "conversion.md").write_text(_markdown(results))
    console.print(_markdown(results))


def _measure(source: pathlib.Path, target: pathlib.Path, preset: str) -> dict[str, Any]:
    """Runs one conversion and watches its memory."""
    command = [sys.executable, "-m", "openpi_duquant", "convert-checkpoint", str(source), str(target)]
    start = time.monotonic()
    process = subprocess.Popen([*command, "--preset", preset])
    anonymous = mapped = 0
    try:
        while process.poll() is None:
            memory = _resident(process.pid)
            anonymous, mapped = max(anonymous, memory["RssAnon"]), max(mapped, memory["RssFile"])
            time.sleep(_POLL_SECONDS)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise DuQuantError(f"converting with {preset} failed; its message is above")
    manifest = Manifest.load(target)
    return {
        "preset": preset,
        "seconds": time.monotonic() - start,
        "peak_anonymous_bytes": anonymous,
        "peak_mapped_bytes": mapped,
        "source_bytes": manifest.source["bytes"],
        **manifest.counts,
    }


def _resident(pid: int) -> dict[str, int]:
    """Resident bytes of a process: anonymous ones, and pages of mapped files, which the kernel can drop at any time."""
    memory = {"RssAnon": 0, "RssFile": 0}
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return memory
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: 1024 * int(fields[name].split()[0]) if name in fields else 0 for name in memory}


def _markdown(results: dict[str, Any]) -> str:
    header = (
        "preset", "quantized layers", "GB", "of the source", "quantized weights, of bf16", "seconds",
        "peak anonymous GB", "peak mapped GB",
    )  # fmt: skip
    rows = [
        (
            row["preset"],
            row["layers"],
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['bytes'] / row['source_bytes']:.3f}",
            f"{row['quantized_bytes'] / row['quantized_bytes_bf16']:.3f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_anonymous_bytes'] / 1e9:.2f}",
            f"{row['peak_mapped_bytes'] / 1e9:.2f}",
        )
        for row in results["presets"]
    ]
    return f"{markdown_table(header, rows)}\n\n{markdown_stamp(results['stamp'])}\n"
