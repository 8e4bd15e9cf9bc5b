"""The conversion of a checkpoint folder: read tensor by tensor, written beside the target, renamed when it is whole."""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import importlib.metadata
import pathlib
import shutil

import torch

from openpi_duquant.checkpoint.files import WEIGHTS_NAME
from openpi_duquant.checkpoint.files import SafetensorsReader
from openpi_duquant.checkpoint.files import SafetensorsWriter
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.checkpoint.files import renamed_when_whole
from openpi_duquant.checkpoint.manifest import MANIFEST_NAME
from openpi_duquant.checkpoint.manifest import Manifest
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion.calibrated import calibrate_layers
from openpi_duquant.conversion.calibrated import kept_bytes
from openpi_duquant.conversion.calibrated import kept_until_done
from openpi_duquant.conversion.calibrated import layer_tensors
from openpi_duquant.conversion.plan import Plan
from openpi_duquant.conversion.plan import make_plan
from openpi_duquant.conversion.tensors import Progress
from openpi_duquant.conversion.tensors import convert_tensors
from openpi_duquant.folds import decoder_layer
from openpi_duquant.recording import Recording


def convert(
    source: pathlib.Path | str,
    target: pathlib.Path | str,
    config: DuQuantConfig,
    *,
    calibration: Recording | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda _: None,
    observed: Progress = lambda _: None,
) -> Manifest:
    """Converts a checkpoint of openpi into a W4A8 checkpoint.

    The result is written beside the target and renamed when it is whole. A calibrated conversion that was interrupted
    goes on after the last decoder layer that it finished.

    Args:
        source: Folder with `model.safetensors` (or its shards) and `assets/`.
        target: Folder to make.
        config: The configuration.
        calibration: Observations that the weights are rounded for, see `calibration`; None: to the nearest.
        device: Where the arithmetic is done, one decoder layer at a time.
        progress: Called with source bytes as they are done.
        observed: Called with observations as the original has run on them.

    Returns:
        The manifest of the result.

    Raises:
        DuQuantError: On a source that is missing, damaged, already converted, not finite or changed meanwhile; on a
            target that exists; on observations of another policy; or as `make_plan`.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    version = importlib.metadata.version("openpi-duquant")
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(open_source(source))
        plan = make_plan(reader.types, config, calibrated=calibration is not None)
        _check_target(source, target, _disk_needed(target, plan, calibrated=calibration is not None))
        if calibration is not None:
            calibration.require_fit(plan.architecture)
        before = _identities(reader.files)
        found, calibrated = {}, None
        if calibration is not None:
            key = [before, calibration.info, config.to_json(), version, str(device)]
            folder = stack.enter_context(kept_until_done(target, key))
            plan, found = calibrate_layers(folder, reader, plan, calibration, device, progress, observed)
            calibrated = functools.partial(layer_tensors, folder)
        partial = stack.enter_context(renamed_when_whole(target))
        with SafetensorsWriter(partial / WEIGHTS_NAME, plan.types) as writer:
            for name, tensor in convert_tensors(lambda name: reader.read(name).to(device), plan, progress, calibrated):
                writer.write(name, tensor)
        _copy_assets(source, partial)
        manifest = _manifest(reader, plan, partial, version)
        if calibration is not None:
            manifest = dataclasses.replace(manifest, calibration=calibration.info | found)
        manifest.save(partial)
        if _identities(reader.files) != before:
            raise DuQuantError(f"{source}: changed while it was read; convert it again when it is complete")
    return manifest


def _identities(paths: Sequence[pathlib.Path]) -> list[tuple[int, ...]]:
    """What changes when a file is written to or replaced."""
    states = [path.stat() for path in paths]
    return [(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]


def _disk_needed(target: pathlib.Path, plan: Plan, *, calibrated: bool) -> int:
    """Bytes of the result, and of the calibrated layers that lie beside it until it is whole, less what is there."""
    needed = plan.counts()["bytes"]
    if calibrated:
        types = {name: kind for name, kind in plan.types.items() if decoder_layer(name) is not None}
        needed += max(0, sum(iter_bytes(types)) - kept_bytes(target))
    return needed


def _check_target(source: pathlib.Path, target: pathlib.Path, needed: int) -> None:
    if target.exists():
        raise DuQuantError(f"{target}: exists already; name another folder or remove it")
    if source.resolve() in target.resolve().parents:
        raise DuQuantError(f"{target}: lies within the source; name a folder beside it")
    existing = next(folder for folder in target.resolve().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DuQuantError(f"{target}: takes {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB left")


def open_source(source: pathlib.Path) -> SafetensorsReader:
    """The reader of a checkpoint to convert.

    Raises:
        DuQuantError: If it is missing, damaged or already converted.
    """
    if (source / MANIFEST_NAME).exists():
        raise DuQuantError(f"{source}: is converted already; convert the original checkpoint instead")
    return SafetensorsReader(source)


def _copy_assets(source: pathlib.Path, target: pathlib.Path) -> None:
    if (source / "assets").is_dir():
        shutil.copytree(source / "assets", target / "assets")
    if (source / "config.json").is_file():
        shutil.copy(source / "config.json", target)


def _manifest(reader: SafetensorsReader, plan: Plan, target: pathlib.Path, version: str) -> Manifest:
    with SafetensorsReader(target) as written:
        digest = written.digest()
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in plan.source.values()})
    return Manifest(
        tool_version=version,
        config=plan.config,
        architecture=plan.architecture,
        source={
            "sha256": reader.digest(),
            "dtypes": dtypes,
            "bytes": sum(iter_bytes(reader.types)),
        },
        layers=plan.layers,
        folds=[fold.to_json() for fold in plan.folds],
        float_dtypes=plan.float_dtypes,
        counts=plan.counts(),
        sha256=digest,
    )
