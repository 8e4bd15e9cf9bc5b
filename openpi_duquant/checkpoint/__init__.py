"""Checkpoint folders: openpi's as a source, ours as a source and a target."""

from openpi_duquant.checkpoint.files import SafetensorsReader
from openpi_duquant.checkpoint.files import SafetensorsWriter
from openpi_duquant.checkpoint.manifest import MANIFEST_NAME
from openpi_duquant.checkpoint.manifest import Manifest

__all__ = ["MANIFEST_NAME", "Manifest", "SafetensorsReader", "SafetensorsWriter"]
