"""Recorded observations: what a policy's model saw, and a noise to start from. Calibration and reports read them.

A recording is a folder: `observations.safetensors` with the tensors of every example, named
`<index>.<field>`, and `observations.json` with where they come from. Nothing is pickled.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from safetensors import SafetensorError
import safetensors.torch
import torch
from torch import Tensor

from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint.files import renamed_when_whole
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.observation import CAMERAS
from openpi_duquant.engine.observation import Observation

TENSORS_NAME = "observations.safetensors"
INFO_NAME = "observations.json"
FORMAT_VERSION = 1

_LEVEL = 2.0 / 255.0
"""Distance of neighbouring 8-bit values in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One observation as the model gets it, after all of openpi's transforms, and the noise to denoise.

    Attributes:
        observation: Batch of one, on the CPU.
        noise: [1, action_horizon, action_dim] fp32, on the CPU.

    Raises:
        DuQuantError: On another batch size, shape or dtype.
    """

    observation: Observation
    noise: Tensor

    def __post_init__(self) -> None:
        tensors = _flatten(self)
        batches = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.shape[:1] != (1,)}
        if batches or self.noise.ndim != 3 or self.noise.dtype != torch.float32:
            raise DuQuantError(
                "an example is a batch of one with fp32 noise [1, horizon, action_dim]; "
                f"got noise {self.noise.dtype} {tuple(self.noise.shape)} and other batch sizes {batches}"
            )


@dataclasses.dataclass(frozen=True)
class Recording:
    """What `load_recording` found.

    Attributes:
        examples: In the order in which they were seen.
        info: The content of `observations.json`: "format_version", "count", "sha256" of the tensors' file, "images"
            (height and width by camera), and what `save_recording` was given.
    """

    examples: list[Example]
    info: dict[str, Any]

    @property
    def num_steps(self) -> int:
        """Denoising steps that were taken; openpi's 10 where the recording does not say."""
        return self.info.get("num_steps", 10)

    def require_fit(self, architecture: Architecture) -> None:
        """Raises DuQuantError, naming the first such example, if a policy of these sizes cannot read all of them."""
        for index, example in enumerate(self.examples):
            width, token = example.noise.shape[2], example.observation.tokenized_prompt.max().item()
            if width != architecture.action_dim:
                raise DuQuantError(
                    f"observation {index}: actions are {width} wide, the policy's {architecture.action_dim}; "
                    "record with this policy"
                )
            if token >= architecture.vocab_size:
                raise DuQuantError(
                    f"observation {index}: has token {token}, the policy knows {architecture.vocab_size}; "
                    "record with this policy"
                )


def save_recording(folder: pathlib.Path | str, examples: Sequence[Example], info: Mapping[str, Any]) -> None:
    """Writes a recording; the folder appears when it is whole.

    Images become uint8 where they are 8-bit values (openpi makes floats in [-1, 1] of cameras' bytes: those are found
    again exactly), else they stay as they are. The image of a camera that is masked is left out: no model reads it.

    Args:
        folder: Folder to make.
        examples: At least one.
        info: JSON values that say where they come from.

    Raises:
        DuQuantError: If the folder exists, or there is no example.
    """
    folder = pathlib.Path(folder)
    require_new(folder)
    if not examples:
        raise DuQuantError(f"{folder}: nothing to record: no observation was seen")
    examples = [dataclasses.replace(example, observation=compact(example.observation)) for example in examples]
    tensors = {
        f"{index:05}.{name}": tensor.clone(memory_format=torch.contiguous_format)  # examples may share some
        for index, example in enumerate(examples)
        for name, tensor in _flatten(example).items()
    }
    content = safetensors.torch.save(tensors)
    derived = {
        "format_version": FORMAT_VERSION,
        "count": len(examples),
        "images": _image_sizes(examples),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with renamed_when_whole(folder) as partial:
        (partial / TENSORS_NAME).write_bytes(content)
        (partial / INFO_NAME).write_text(json.dumps(dict(info) | derived, indent=1) + "\n")


def require_new(folder: pathlib.Path) -> None:
    """Raises DuQuantError if the folder exists: a recording is never overwritten."""
    if folder.exists():
        raise DuQuantError(f"{folder}: exists already; name another folder for the recording or remove it")


def load_recording(folder: pathlib.Path | str) -> Recording:
    """Reads a recording.

    Raises:
        DuQuantError: If it is missing, damaged, or of another format version.
    """
    folder = pathlib.Path(folder)
    info = _load_info(folder / INFO_NAME)
    path = folder / TENSORS_NAME
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != info["sha256"]:
            raise DuQuantError(f"{path}: is not as it was written (its sha256 differs); record it again")
        tensors = safetensors.torch.load(content)
        examples = [_unflatten(tensors, f"{index:05}.") for index in range(info["count"])]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DuQuantError(f"{path}: not a recording ({type(error).__name__}: {reason}); record it again") from None
    return Recording(examples, info)


def _load_info(path: pathlib.Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise DuQuantError(f"{path}: is not there; openpi-duquant record-observations makes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DuQuantError(f"{path}: not readable ({type(error).__name__}); record it again") from None
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise DuQuantError(
            f"{path}: format version {version!r}, this openpi-duquant reads {FORMAT_VERSION}; "
            "install a matching version or record it again"
        )
    return info


def _flatten(example: Example) -> dict[str, Tensor]:
    """The tensors of an example, by field."""
    seen = example.observation
    named = {"state": seen.state, "tokenized_prompt": seen.tokenized_prompt, "noise": example.noise}
    named["tokenized_prompt_mask"] = seen.tokenized_prompt_mask
    named |= {f"images.{camera}": image for camera, image in seen.images.items()}
    named |= {f"image_masks.{camera}": mask for camera, mask in seen.image_masks.items()}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _unflatten(tensors: Mapping[str, Tensor], prefix: str) -> Example:
    def by_camera(kind: str) -> dict[str, Tensor]:
        start = f"{prefix}{kind}."
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    observation = Observation(
        images=by_camera("images"),
        image_masks=by_camera("image_masks"),
        tokenized_prompt=tensors[prefix + "tokenized_prompt"],
        tokenized_prompt_mask=tensors[prefix + "tokenized_prompt_mask"],
        state=tensors.get(prefix + "state"),
    )
    return Example(observation, tensors[prefix + "noise"])


def compact(observation: Observation) -> Observation:
    """The same to every model in fewer bytes: no image that is masked, and uint8 where images are 8-bit values."""
    masks = observation.image_masks
    live = [camera for camera in CAMERAS if camera in observation.images and (camera not in masks or masks[camera])]
    images = {camera: as_bytes(observation.images[camera]) for camera in live}
    return dataclasses.replace(observation, images=images)


def as_bytes(image: Tensor) -> Tensor:
    """An image of floats in [-1, 1] as the uint8 that it was made of; itself where it was not made of uint8.

    "Made of" allows a hundredth of a level: libraries round differently.
    """
    if not image.is_floating_point():
        return image
    values = ((image.double() + 1.0) / _LEVEL).clamp(0, 255).round()
    made_of_bytes = (values * _LEVEL - 1.0 - image.double()).abs().max() < 0.01 * _LEVEL
    return values.byte() if made_of_bytes else image


def _image_sizes(examples: Iterable[Example]) -> dict[str, list[int]]:
    """Height and width by camera, of the first image of each."""
    sizes: dict[str, list[int]] = {}
    for example in examples:
        for camera, image in example.observation.images.items():
            sizes.setdefault(camera, list(image.shape[2:] if image.shape[1] == 3 else image.shape[1:3]))
    return sizes
