"""Results as JSON and Markdown, stamped with what produced them."""

from collections.abc import Mapping, Sequence
import datetime as dt
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any

import torch

_PACKAGES = ("openpi-duquant", "numpy", "safetensors")


def stamp() -> dict[str, Any]:
    """Date, versions, machine type, GPU (None without one) and the commit of this package (None outside a checkout)."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _commit() -> str | None:
    folder = pathlib.Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [all(_is_number(cell) for cell in column[1:]) and len(column) > 1 for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right)]
    return "\n".join(map(line, (cells[0], rule, *cells[1:])))


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-~" or not cell


def markdown_stamp(stamp: Mapping[str, Any]) -> str:
    """The stamp as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    return f"{stamp['date']}; commit {stamp['commit']}; GPU {stamp['gpu']}; {stamp['machine']}; {versions}"


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes values as indented JSON."""
    path.write_text(json.dumps(values, indent=1) + "\n")
