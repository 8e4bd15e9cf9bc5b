"""Preprocessing of observations."""

from collections.abc import Callable
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.observation import CAMERAS
from openpi_duquant.engine.observation import Observation
from openpi_duquant.engine.observation import gather_images
from openpi_duquant.engine.observation import layout
from openpi_duquant.engine.observation import prepare_image
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.observation import resize_with_padding

BASE, LEFT, RIGHT = CAMERAS


def observation(*, masks: dict[str, list[bool]], lengths: tuple[int, ...] = (3, 5)) -> Observation:
    """Grey images of all cameras, prompts of these lengths padded to 8."""
    batch = len(lengths)
    return Observation(
        images={name: torch.full((batch, 224, 224, 3), index, dtype=torch.uint8) for index, name in enumerate(CAMERAS)},
        image_masks={name: torch.tensor(mask) for name, mask in masks.items()},
        tokenized_prompt=torch.arange(batch * 8, dtype=torch.int32).reshape(batch, 8),
        tokenized_prompt_mask=torch.arange(8)[None] < torch.tensor(lengths)[:, None],
    )


def test_uint8_spans_minus_one_to_one() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 224, 224, 3)
    prepared = prepare_image(BASE, image)
    assert prepared.shape == (1, 3, 224, 224)
    torch.testing.assert_close(prepared[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    assert image[0, 0, 0].tolist() == [0, 51, 255]


def test_channels_may_come_first_or_last() -> None:
    image = torch.rand(2, 3, 224, 224) * 2 - 1
    assert torch.equal(prepare_image(BASE, image), prepare_image(BASE, image.permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (100, 200, (56, 168), (0, 224)),
        (480, 240, (0, 224), (56, 168)),
        (448, 448, (0, 224), (0, 224)),
        (90, 224, (67, 157), (0, 224)),
        (224, 101, (0, 224), (61, 162)),  # an odd margin: the smaller half comes first
    ],
)
def test_resizing_keeps_the_aspect_and_centres_on_black(
    height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    resized = resize_with_padding(torch.full((1, 3, height, width), 0.25))
    expected = torch.full((1, 3, 224, 224), -1.0)
    expected[..., slice(*rows), slice(*columns)] = 0.25
    torch.testing.assert_close(resized, expected)


def test_halving_averages_pairs_of_pixels() -> None:
    image = torch.rand(1, 3, 448, 448) * 2 - 1
    torch.testing.assert_close(resize_with_padding(image), torch.nn.functional.avg_pool2d(image, 2))


@pytest.mark.parametrize("image", [torch.zeros(1, 224, 224), torch.zeros(1, 4, 224, 224), torch.zeros(1, 224, 224, 1)])
def test_other_shapes_are_refused(image: Tensor) -> None:
    with pytest.raises(DuQuantError, match=r"camera base_0_rgb: images \(1, "):
        prepare_image(BASE, image)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(DuQuantError, match=r"camera base_0_rgb: images are torch\.int32"):
        prepare_image(BASE, torch.zeros(1, 3, 224, 224, dtype=torch.int32))


def test_what_is_masked_in_the_whole_batch_is_dropped() -> None:
    prefix = preprocess(observation(masks={LEFT: [False, False], RIGHT: [True, False]}))
    assert prefix.images.shape == (2, 2, 224, 224, 3)
    assert prefix.images.dtype == torch.uint8
    assert (prefix.images[:, 1] == 2).all()  # the right camera
    assert prefix.image_mask.tolist() == [[True, True], [True, False]]
    assert prefix.tokens.tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12]]
    assert prefix.token_mask.sum(1).tolist() == [3, 5]


def test_places_count_what_is_valid() -> None:
    """A camera that one of two observations lacks, prompts of three and five tokens, a suffix of two."""
    visible, places = layout(preprocess(observation(masks={LEFT: [False, False], RIGHT: [True, False]})), 2)
    assert visible.shape == (2, 512 + 5)
    assert visible.sum(1).tolist() == [512 + 3, 256 + 5]
    assert not visible[1, 256:512].any()
    assert places.shape == (2, 512 + 5 + 2)
    for row, seen, last in zip(places, visible, (515, 261), strict=True):
        assert row[:-2][seen].tolist() == list(range(last))
        assert row[-2:].tolist() == [last, last + 1]


def test_no_place_is_negative() -> None:
    """Also where what is masked comes first."""
    prefix = preprocess(observation(masks={BASE: [True, False], RIGHT: [False, False]}))
    assert layout(prefix, 1)[1].min() == 0


@pytest.mark.parametrize("size", [224, 100])
def test_images_are_prepared_where_they_are_wanted_and_masks_on_the_host(size: int) -> None:
    given = observation(masks={RIGHT: [False, False]})
    images = {name: image[:, :size].to("meta") for name, image in given.images.items() if name != RIGHT}
    here = {name: image[:, :size] for name, image in given.images.items()}
    there = preprocess(dataclasses.replace(given, images=images))
    assert there.images.is_meta
    for prefix in (there, preprocess(dataclasses.replace(given, images=here), torch.device("meta"))):
        assert prefix.images.device.type == ("cpu" if size == 224 and prefix is not there else "meta")
        assert prefix.images.shape == ((2, 2, 224, 224, 3) if size == 224 else (2, 2, 3, 224, 224))
        assert prefix.image_mask.tolist() == [[True, True]] * 2
        assert prefix.tokens.tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12]]


def test_bytes_are_gathered_as_they_are_unless_a_camera_gives_something_else() -> None:
    base, left = torch.randint(256, (2, 2, 224, 224, 3), dtype=torch.uint8)
    strided = left.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    for other in (left, strided):
        assert torch.equal(gather_images({BASE: base, LEFT: other}), torch.stack((base, left), 1))
    for other in (left.permute(0, 3, 1, 2), left[:, :100], prepare_image(LEFT, left)):
        expected = torch.stack((prepare_image(BASE, base), prepare_image(LEFT, other)), 1)
        assert torch.equal(gather_images({BASE: base, LEFT: other}), expected)


def test_a_masked_camera_needs_no_image() -> None:
    complete = observation(masks={RIGHT: [False, False]})
    images = {name: image for name, image in complete.images.items() if name != RIGHT}
    partial = Observation(images, complete.image_masks, complete.tokenized_prompt, complete.tokenized_prompt_mask)
    assert torch.equal(preprocess(partial).images, preprocess(complete).images)


def test_a_live_camera_without_an_image_is_named() -> None:
    complete = observation(masks={})
    images = {name: image for name, image in complete.images.items() if name != LEFT}
    with pytest.raises(DuQuantError, match="camera left_wrist_0_rgb has no image"):
        preprocess(Observation(images, {}, complete.tokenized_prompt, complete.tokenized_prompt_mask))


def test_one_camera_must_be_live() -> None:
    with pytest.raises(DuQuantError, match="every camera is masked"):
        preprocess(observation(masks={name: [False, False] for name in CAMERAS}))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("tokenized_prompt_mask", torch.ones(2, 3, dtype=torch.bool), r"_mask is \[2, 3\], must be \[2, 8\]: "),
        ("image_masks", {BASE: torch.tensor(data=True)}, r"image_masks\['base_0_rgb'\] is \[\], must be \[2\]: "),
        (
            "image_masks",
            {LEFT: torch.ones(1, dtype=torch.bool)},
            r"is \[1\], must be \[2\]: tokenized_prompt is \[2, 8\]",
        ),
        ("images", dict.fromkeys(CAMERAS, torch.zeros(3, 224, 224, 3)), "camera base_0_rgb: 3 images, 2 prompts"),
    ],
)
def test_parts_of_another_batch_are_refused(part: str, value: object, said: str) -> None:
    with pytest.raises(DuQuantError, match=said):
        preprocess(dataclasses.replace(observation(masks={}), **{part: value}))


def test_of_a_masked_camera_anything_is_taken() -> None:
    given = observation(masks={RIGHT: [False, False]})
    placeholder = {**given.images, RIGHT: torch.zeros(1, 3, 8, 8)}
    assert torch.equal(preprocess(dataclasses.replace(given, images=placeholder)).images, preprocess(given).images)


def test_memory_of_the_caller_is_not_read_after_the_call() -> None:
    class Copies(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., object], _: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            waits.append(not (kwargs or {}).get("non_blocking"))
            return function(*args, **(kwargs or {}))

    waits: list[bool] = []
    with Copies():
        gather_images({BASE: torch.zeros(1, 3, 8, 8)}, torch.device("cpu"))
    assert waits
    assert all(waits)
