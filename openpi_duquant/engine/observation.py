"""What a policy sees, and the preprocessing that openpi does inside its model."""

from collections.abc import Mapping
import dataclasses

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import IMAGE_SIZE
from openpi_duquant.architecture import PATCHES
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.placement import staging

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
FRAME = IMAGE_SIZE, IMAGE_SIZE, 3


@dataclasses.dataclass(frozen=True)
class Observation:
    """A batch of observations, in openpi's terms.

    Attributes:
        images: By camera name, [B, H, W, 3] or [B, 3, H, W]; uint8, or floating point in [-1, 1].
        image_masks: By camera name, [B] bool; a camera without a mask is live. A camera whose mask is False
            everywhere needs no image.
        tokenized_prompt: [B, L] int token ids.
        tokenized_prompt_mask: [B, L] bool, False on padding.
        state: [B, S] fp32 or None; pi0.5 reads it from the prompt, if at all.
    """

    images: Mapping[str, Tensor]
    image_masks: Mapping[str, Tensor]
    tokenized_prompt: Tensor
    tokenized_prompt_mask: Tensor
    state: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What the language model reads: nothing that is masked in the whole batch.

    Attributes:
        images: Of the cameras that are live anywhere in the batch: [B, C, 224, 224, 3] uint8 if all of them are given
            as that, else [B, C, 3, 224, 224] fp32 in [-1, 1]. On the host or the device; the rest is on the host.
        image_mask: [B, C] bool.
        tokens: [B, L] int64, cut behind the longest prompt of the batch.
        token_mask: [B, L] bool.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor


def preprocess(observation: Observation, device: torch.device | None = None) -> Prefix:
    """Brings images to 224 x 224 and drops what is masked.

    Args:
        observation: B observations.
        device: Where images go, and where they are prepared unless they are bytes of 224 x 224; where they are if not
            given.

    Raises:
        DuQuantError: As `live_images` and `live_masks`.
    """
    masks = live_masks(observation)
    return Prefix(live_images(observation, device), *masks)


def live_images(observation: Observation, device: torch.device | None = None) -> Tensor:
    """The images of a `Prefix`; `device` as of `preprocess`.

    Raises:
        DuQuantError: On a live camera without an image, an image of a wrong shape or dtype, or no live camera at all.
    """
    masks = [observation.image_masks.get(camera) for camera in CAMERAS]
    cameras = [camera for camera, mask in zip(CAMERAS, masks, strict=True) if mask is None or _mask(mask).any()]
    for camera in cameras:
        image = observation.images.get(camera)
        if image is None:
            raise DuQuantError(f"camera {camera} has no image: give one, or set image_masks[{camera!r}] to False")
        if image.ndim == 4 and len(image) != len(observation.tokenized_prompt):
            raise DuQuantError(f"camera {camera}: {len(image)} images, {len(observation.tokenized_prompt)} prompts")
    if not cameras:
        raise DuQuantError(f"every camera is masked: at least one of {', '.join(CAMERAS)} must be live")
    return gather_images({camera: observation.images[camera] for camera in cameras}, device)


def live_masks(observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Prefix` has but images.

    Raises:
        DuQuantError: On parts of different batches.
    """
    _check_masks(observation)
    tokens, token_mask = observation.tokenized_prompt.cpu().long().numpy(), _mask(observation.tokenized_prompt_mask)
    known = np.ones(len(tokens), np.bool_)
    given = [observation.image_masks.get(camera) for camera in CAMERAS]
    masks = np.stack([known if mask is None else _mask(mask) for mask in given], 1)
    used = token_mask.any(0)
    image_mask, tokens, token_mask = map(
        torch.from_numpy, (masks[:, masks.any(0)], tokens[:, used], token_mask[:, used])
    )
    return image_mask, tokens, token_mask


def layout(prefix: Prefix, suffix: int) -> tuple[Tensor, Tensor]:
    """Where the language model and the expert read what.

    Args:
        prefix: Of B observations, with I patches of images and prompts of L tokens.
        suffix: S, tokens that the expert reads.

    Returns:
        visible [B, I + L] bool, which patches and tokens are valid; places [B, I + L + S] int64, positions of these and
        of the suffix, which count only what is valid.
    """
    image_mask, token_mask = prefix.image_mask.numpy(), prefix.token_mask.numpy()
    visible = np.concatenate((image_mask.repeat(PATCHES, 1), token_mask), 1)
    known = np.pad(visible, ((0, 0), (0, suffix)), constant_values=True)
    return torch.from_numpy(visible), torch.from_numpy(np.maximum(known.cumsum(1) - 1, 0))


def _check_masks(observation: Observation) -> None:
    """Raises DuQuantError unless masks have the shape that the prompts ask for."""
    prompts = observation.tokenized_prompt.shape
    masks = {f"image_masks[{camera!r}]": observation.image_masks.get(camera) for camera in CAMERAS}
    for name, mask in {"tokenized_prompt_mask": observation.tokenized_prompt_mask, **masks}.items():
        expected = prompts[:1] if name in masks else prompts
        if mask is not None and mask.shape != expected:
            shape = list(mask.shape), list(expected)
            raise DuQuantError(f"{name} is {shape[0]}, must be {shape[1]}: tokenized_prompt is {list(prompts)}")


def _mask(given: Tensor) -> np.ndarray:
    return given.cpu().bool().numpy()


def gather_images(images: Mapping[str, Tensor], device: torch.device | None = None) -> Tensor:
    """Images of all those cameras in one tensor, see `Prefix`; those on the host stay there if they are what it takes.

    Raises:
        DuQuantError: As `prepare_image`.
    """
    given = images.values()
    frames = all(image.dtype == torch.uint8 and image.shape[1:] == FRAME for image in given)
    if frames and all(image.is_cpu and image.is_contiguous() for image in given):
        gathered = staging((len(next(iter(given))), len(given), *FRAME), torch.uint8, device)
        places = gathered.numpy()
        for index, image in enumerate(given):
            places[:, index] = image.numpy()
        return gathered
    # not non_blocking: the caller may refill page-locked memory of his own as soon as a call returns
    there = {camera: image.to(device or image.device) for camera, image in images.items()}
    return torch.stack([image if frames else prepare_image(camera, image) for camera, image in there.items()], 1)


def prepare_image(camera: str, image: Tensor) -> Tensor:
    """One camera's images as [B, 3, 224, 224] fp32 in [-1, 1], resized with black padding where they must be.

    Args:
        camera: Its name, for messages.
        image: [B, H, W, 3] or [B, 3, H, W]; uint8, or floating point in [-1, 1].

    Raises:
        DuQuantError: On another shape or dtype.
    """
    if image.ndim != 4 or 3 not in (image.shape[1], image.shape[3]):
        raise DuQuantError(f"camera {camera}: images {tuple(image.shape)} are neither [B, H, W, 3] nor [B, 3, H, W]")
    if image.dtype == torch.uint8:
        image = as_floats(image)
    elif not image.is_floating_point():
        raise DuQuantError(f"camera {camera}: images are {image.dtype}; give uint8, or floating point in [-1, 1]")
    channels_first = image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)
    return resize_with_padding(channels_first.float())


def as_floats(image: Tensor) -> Tensor:
    """Bytes as fp32 in [-1, 1], rounded where openpi rounds."""
    return image.float().div_(255.0).mul_(2.0).sub_(1.0)


def resize_with_padding(image: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Scales [B, 3, H, W] to fit size x size (bilinear) and centres it on black (-1); as openpi does."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    ratio = max(height / size, width / size)
    fitted = int(height / ratio), int(width / ratio)
    image = F.interpolate(image, size=fitted, mode="bilinear", align_corners=False).clamp(-1.0, 1.0)
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    return F.pad(image, (left, size - fitted[1] - left, top, size - fitted[0] - top), value=-1.0)
