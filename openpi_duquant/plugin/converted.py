"""The conversion of an original checkpoint that a quantized config is given: made once, kept, found again."""

import hashlib
import importlib.metadata
import json
import logging
import pathlib

import torch

from openpi_duquant.checkpoint import MANIFEST_NAME
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import convert
from openpi_duquant.conversion import open_source
from openpi_duquant.plugin.quantization import Quantization
from openpi_duquant.progress import progress_bar

logger = logging.getLogger("openpi_duquant")


def converted_folder(folder: pathlib.Path, quantization: Quantization) -> pathlib.Path:
    """The folder itself if it is converted, else that of its conversion, which is made where it is missing."""
    if (folder / MANIFEST_NAME).exists():
        _require_as_asked(folder, Manifest.load(folder).config, quantization)
        return folder
    config, packdir = quantization.config, quantization.environment.packdir
    with open_source(folder) as reader:
        key = conversion_key(reader, config)
        total = sum(iter_bytes(reader.types))
    target = (packdir or pathlib.Path.home() / ".cache" / "openpi-duquant") / f"{folder.resolve().name}-{key}"
    if target.exists():
        logger.info("%s is converted already: %s", folder, target)
        return target
    logger.warning("%s is not converted; converting it once, to %s", folder, target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with progress_bar(f"Converting {folder.name}", total) as progress:
            convert(folder, target, config, device=device, progress=progress)
    except DuQuantError:
        if not target.exists():  # else another process has converted it meanwhile
            raise
    return target


def conversion_key(reader: SafetensorsReader, config: DuQuantConfig) -> str:
    """What a conversion depends on, as 16 hexadecimal digits: the source's bytes, the config, this version."""
    version = importlib.metadata.version("openpi-duquant")
    content = json.dumps([reader.digest(), config.to_json(), version], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _require_as_asked(folder: pathlib.Path, config: DuQuantConfig, quantization: Quantization) -> None:
    for field in quantization.asked:
        has, wanted = getattr(config, field), getattr(quantization.config, field)
        if has != wanted:
            raise DuQuantError(
                f"{folder}: was converted with {field}={has!r}, and {wanted!r} is asked for; give the original "
                "checkpoint, or do not ask"
            )
