"""Recorded observations: what is kept, and what is refused."""

import dataclasses
import json
import pathlib

import pytest
from tiny import TINY
import torch

from openpi_duquant import synthetic
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.observation import prepare_image
from openpi_duquant.recording import INFO_NAME
from openpi_duquant.recording import TENSORS_NAME
from openpi_duquant.recording import Example
from openpi_duquant.recording import as_bytes
from openpi_duquant.recording import load_recording
from openpi_duquant.recording import save_recording


def made(seed: int = 0, **changed: object) -> Example:
    observation, noise = synthetic.libero_like_observation(TINY, seed=seed)
    return Example(dataclasses.replace(observation, **changed), noise)


def as_openpi_gives_it(image: torch.Tensor) -> torch.Tensor:
    """uint8 [1, H, W, 3] -> what `openpi.models.model.Observation.from_dict` makes of it."""
    return image.to(torch.float32).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0


def test_an_observation_is_the_same_to_a_model_afterwards(tmp_path: pathlib.Path) -> None:
    first, second = made(0), made(1)
    images = {camera: as_openpi_gives_it(image) for camera, image in second.observation.images.items()}
    second = dataclasses.replace(second, observation=dataclasses.replace(second.observation, images=images))
    only = dict.fromkeys(first.observation.images, torch.tensor([False])) | {"base_0_rgb": torch.tensor([True])}
    third = made(2, image_masks=only, state=None)
    save_recording(tmp_path / "r", [first, second, third], {"config": "pi05_libero", "source": "test"})
    recording = load_recording(tmp_path / "r")
    assert recording.info["config"] == "pi05_libero"
    assert recording.info["count"] == 3
    assert recording.info["images"] == {"base_0_rgb": [224, 224], "left_wrist_0_rgb": [224, 224]}
    for before, after in zip((first, second, third), recording.examples, strict=True):
        assert torch.equal(before.noise, after.noise)
        for field in ("tokenized_prompt", "tokenized_prompt_mask"):
            assert torch.equal(getattr(before.observation, field), getattr(after.observation, field))
        assert before.observation.image_masks == after.observation.image_masks
        live = [camera for camera, mask in before.observation.image_masks.items() if mask]
        assert sorted(after.observation.images) == sorted(live)
        for camera in live:
            image = after.observation.images[camera]
            assert image.dtype == torch.uint8
            assert torch.equal(prepare_image(camera, image), prepare_image(camera, before.observation.images[camera]))
    assert recording.examples[2].observation.state is None
    assert torch.equal(recording.examples[1].observation.state, second.observation.state)


def test_64_observations_are_small(tmp_path: pathlib.Path) -> None:
    example = made()
    images = {camera: as_openpi_gives_it(image) for camera, image in example.observation.images.items()}
    save_recording(tmp_path / "r", [made(images=images)] * 64, {})
    assert (tmp_path / "r" / TENSORS_NAME).stat().st_size < 64 * 2.1 * 224 * 224 * 3


def test_images_between_8_bit_values_stay_as_they_are() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256, 1).expand(1, 1, 256, 3)
    floats = as_openpi_gives_it(every)
    assert torch.equal(as_bytes(floats), every.permute(0, 3, 1, 2))
    assert torch.equal(as_bytes(every), every)
    assert as_bytes(floats + 0.2 / 255) is not floats
    assert torch.equal(as_bytes(floats * 0.9), floats * 0.9)
    assert torch.equal(as_bytes(floats + 0.2 / 255), floats + 0.2 / 255)


def test_what_is_no_example_is_refused() -> None:
    observation, noise = synthetic.libero_like_observation(TINY)
    with pytest.raises(DuQuantError, match="batch of one"):
        Example(observation, noise.expand(2, -1, -1))
    with pytest.raises(DuQuantError, match="float16"):
        Example(observation, noise.half())
    with pytest.raises(DuQuantError, match="noise"):
        Example(observation, noise[:, 0])


def test_a_recording_is_never_overwritten_and_never_empty(tmp_path: pathlib.Path) -> None:
    save_recording(tmp_path / "r", [made()], {})
    before = (tmp_path / "r" / TENSORS_NAME).read_bytes()
    with pytest.raises(DuQuantError, match="exists already"):
        save_recording(tmp_path / "r", [made(1)], {})
    assert (tmp_path / "r" / TENSORS_NAME).read_bytes() == before
    with pytest.raises(DuQuantError, match="no observation"):
        save_recording(tmp_path / "empty", [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (INFO_NAME, None, "is not there"),
        (INFO_NAME, "{", "not readable"),
        (INFO_NAME, "[]", "format version None"),
        (INFO_NAME, '{"format_version": 9}', "format version 9"),
        (INFO_NAME, '{"format_version": 1}', "KeyError"),
        (TENSORS_NAME, None, "FileNotFoundError"),
        (TENSORS_NAME, "x", "sha256 differs"),
    ],
)
def test_damage_is_one_line(tmp_path: pathlib.Path, name: str, damage: str | None, message: str) -> None:
    save_recording(tmp_path / "r", [made()], {})
    path = tmp_path / "r" / name
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(DuQuantError, match=message) as caught:
        load_recording(tmp_path / "r")
    assert str(path) in str(caught.value) or str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_count_that_is_too_large_is_damage(tmp_path: pathlib.Path) -> None:
    save_recording(tmp_path / "r", [made()], {})
    info = json.loads((tmp_path / "r" / INFO_NAME).read_text())
    (tmp_path / "r" / INFO_NAME).write_text(json.dumps(info | {"count": 2}))
    with pytest.raises(DuQuantError, match="tokenized_prompt"):
        load_recording(tmp_path / "r")
