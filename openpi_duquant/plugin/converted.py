"""The conversion of an original checkpoint that a quantized config is given: made once, kept, found again."""

import hashlib
import importlib.metadata
import json
import logging
import pathlib

import torch

from openpi_duquant import kernels
from openpi_duquant.checkpoint import MANIFEST_NAME
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import convert
from openpi_duquant.conversion import make_plan
from openpi_duquant.conversion import open_source
from openpi_duquant.environment import cache_folder
from openpi_duquant.plugin.quantization import Quantization
from openpi_duquant.progress import progress_bar
from openpi_duquant.recording import Recording
from openpi_duquant.recording import load_recording

logger = logging.getLogger("openpi_duquant")


def converted_folder(folder: pathlib.Path, quantization: Quantization) -> pathlib.Path:
    """The folder itself if it is converted, else that of its conversion, which is made where it is missing."""
    if (folder / MANIFEST_NAME).exists():
        _require_as_asked(folder, Manifest.load(folder).config, quantization)
        return folder
    config, environment = quantization.config, quantization.environment
    recording = environment.calibration and load_recording(environment.calibration)
    with open_source(folder) as reader:
        layers = make_plan(reader.types, config, calibrated=recording is not None).layers.values()
        problems = [spec.problem(torch.bfloat16) for spec in layers]
        kernels.require(environment.backend, problems, torch.device(quantization.place))  # before minutes of work
        key = conversion_key(reader, config, recording)
        total = sum(iter_bytes(reader.types))
    target = (environment.packdir or cache_folder()) / f"{folder.resolve().name}-{key}"
    if target.exists():
        logger.info("%s is converted already: %s", folder, target)
        return target
    logger.warning("%s is not converted; converting it once, to %s", folder, target)
    try:
        with progress_bar(f"Converting {folder.name}", total) as progress:
            convert(folder, target, config, calibration=recording, device=quantization.place, progress=progress)
    except DuQuantError:
        if not target.exists():  # else another process has converted it meanwhile
            raise
    return target


def conversion_key(reader: SafetensorsReader, config: DuQuantConfig, recording: Recording | None = None) -> str:
    """What a conversion depends on, as 16 hexadecimal digits: the bytes of source and recording, config and version."""
    version = importlib.metadata.version("openpi-duquant")
    content = json.dumps([reader.digest(), recording and recording.info, config.to_json(), version], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _require_as_asked(folder: pathlib.Path, config: DuQuantConfig, quantization: Quantization) -> None:
    for field in quantization.asked:
        has, wanted = getattr(config, field), getattr(quantization.config, field)
        if has != wanted:
            raise DuQuantError(
                f"{folder}: was converted with {field}={has!r}, and {wanted!r} is asked for; give the original "
                "checkpoint, or do not ask"
            )
