"""Kernels on disk: one folder for each architecture, BitBLAS version, patch level and CUDA version."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any, NamedTuple

from openpi_duquant.environment import cache_folder
from openpi_duquant.kernels.bitblas import patches
from openpi_duquant.kernels.files import write_whole


class Entry(NamedTuple):
    """One kernel on disk: its machine code and how it is launched.

    Attributes:
        folder: See `folder`.
        name: Of the operator.
    """

    folder: pathlib.Path
    name: str

    @property
    def path(self) -> pathlib.Path:
        """The file that is written last: where it exists, the kernel is complete."""
        return self.folder / f"{self.name}.json"

    def store(self, code: bytes, launch: Mapping[str, int]) -> None:
        """Writes both files; another process that does the same at the same time does no harm."""
        write_whole(self.path.with_suffix(".cubin"), code)
        write_whole(self.path, json.dumps(launch).encode())

    def read(self) -> tuple[bytes, dict[str, Any]]:
        """What `store` wrote."""
        return self.path.with_suffix(".cubin").read_bytes(), json.loads(self.path.read_text())


def folder(architecture: str, cuda: tuple[int, int]) -> pathlib.Path:
    """Where kernels for an architecture ("sm_90"), built by that version of CUDA, are kept."""
    return _root() / f"{_prefix(architecture)}{cuda[0]}.{cuda[1]}"


def find(name: str, architecture: str, driver: tuple[int, int]) -> Entry | None:
    """The kernel of that name, of the newest CUDA version that a driver for `driver` can load, or None."""
    prefix = _prefix(architecture)
    versions = sorted(_version(path.name.removeprefix(prefix)) for path in _root().glob(f"{prefix}*"))
    for version in reversed(versions):
        entry = Entry(folder(architecture, version), name)
        if version <= driver and entry.path.exists():
            return entry
    return None


def _root() -> pathlib.Path:
    return cache_folder() / "bitblas"


def _prefix(architecture: str) -> str:
    return f"{architecture}-bitblas{patches.VERSION}-patches{patches.PATCHES}-cuda"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)
