"""Calibrated decoder layers, each kept as soon as it is done: an interrupted conversion does not begin anew."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shutil
from typing import Any

from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from openpi_duquant.calibration import Calibrator
from openpi_duquant.calibration import record_states
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion.plan import Plan
from openpi_duquant.conversion.tensors import Progress
from openpi_duquant.conversion.tensors import folded_unit
from openpi_duquant.conversion.tensors import kept
from openpi_duquant.conversion.tensors import source_bytes
from openpi_duquant.conversion.tensors import units
from openpi_duquant.engine.load import assemble
from openpi_duquant.folds import decoder_layer
from openpi_duquant.recording import Recording


@contextlib.contextmanager
def kept_until_done(target: pathlib.Path, key: object) -> Iterator[pathlib.Path]:
    """A hidden folder beside the target that outlives an interruption; removed at the end.

    Args:
        target: The folder that will be made.
        key: What the layers depend on, JSON; those of another key are discarded.

    Raises:
        DuQuantError: If another process has the folder.
    """
    folder = _folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DuQuantError(f"{target}: another calibrated conversion is making it; wait until it is done") from None
        content, path = json.dumps(key, sort_keys=True), folder / "key.json"
        if not path.exists() or path.read_text() != content:
            for file in folder.glob("*.safetensors"):
                file.unlink()
            path.write_text(content)
        yield folder
        shutil.rmtree(folder)


def kept_bytes(target: pathlib.Path) -> int:
    """Bytes of the layers that an interrupted conversion has left beside its target."""
    return sum(path.stat().st_size for path in _folder(target).glob("*.safetensors"))


def _folder(target: pathlib.Path) -> pathlib.Path:
    return target.parent / f".{target.name}.calibration"


def calibrate_layers(
    folder: pathlib.Path,
    source: Mapping[str, Tensor],
    plan: Plan,
    recording: Recording,
    device: torch.device | str,
    progress: Progress,
    observed: Progress,
) -> tuple[Plan, dict[str, Any]]:
    """Calibrates the decoder layers of both models; those that the folder holds already are only run.

    Args:
        folder: Where what is done is kept, see `kept_until_done`.
        source: The tensors of the original, looked up one by one.
        plan: The plan.
        recording: The observations.
        device: Where it is done: in bf16 on a GPU, else in fp32.
        progress: Called with source bytes as they are done.
        observed: Called with observations as the original has run on them.

    Returns:
        The plan with the bits that the layers got, and what was found, `Calibrator.errors` and `.corrections`.

    Raises:
        DuQuantError: On an observation that the policy cannot read, or as `Calibrator.quantize`.
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    policy = assemble(plan.architecture, source, {}, backend="reference", dtype=dtype, device=device)
    schedule = policy.tabulated(recording.num_steps)
    states = record_states(policy, recording.examples, schedule, observed)
    calibrator = Calibrator(plan.architecture, plan.config, plan.layers, states, schedule, dtype)
    del policy, states  # the calibrator's move on
    for names in units(plan):
        if (index := decoder_layer(names[0])) is None:
            continue
        weights = folded_unit(lambda name: source[name].to(device), plan, names)
        path = _path(folder, index)
        if path.exists():
            calibrator.restore(index, weights, load_file(path, str(device)), _record(path))
        else:
            quantized = calibrator.quantize(index, weights)
            plan = dataclasses.replace(plan, layers=calibrator.specs)
            _save(path, dict(kept(weights, quantized.items(), plan)), calibrator.record(index))
        progress(source_bytes(names, plan))
    found = {"errors": calibrator.errors, "corrections": calibrator.corrections}
    return dataclasses.replace(plan, layers=calibrator.specs), found


def layer_tensors(folder: pathlib.Path, index: int) -> dict[str, Tensor]:
    """What the result keeps of a decoder layer of both models."""
    return load_file(_path(folder, index))


def _path(folder: pathlib.Path, index: int) -> pathlib.Path:
    return folder / f"layer_{index:02}.safetensors"


def _save(path: pathlib.Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, partial, {"record": json.dumps(record)})
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise DuQuantError(f"{path}: cannot be written ({error}); the layers before it are kept") from None
    partial.rename(path)


def _record(path: pathlib.Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["record"])
