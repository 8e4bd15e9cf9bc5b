"""The manifest: it comes back as it was, and no damage to it gets past as anything but our error, in one line."""

from collections.abc import Callable, Iterator
import copy
import json
import pathlib
from typing import Any

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from openpi_duquant import PRESETS
from openpi_duquant import DuQuantError
from openpi_duquant import Manifest
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import MANIFEST_NAME

Path = tuple[str | int, ...]


@pytest.fixture(scope="module")
def record(converted: Callable[[str], pathlib.Path]) -> Any:  # noqa: ANN401
    """The JSON of the manifest of `optimized`, which has matrices, folds and output rotations; not to be changed."""
    return json.loads((converted("optimized") / MANIFEST_NAME).read_text())


def damaged(record: Any, path: Path, value: object) -> Any:  # noqa: ANN401
    """The record with another value at that path; without what is there, when the value is `...`."""
    if not path:
        return value
    result = copy.deepcopy(record)
    node = result
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return result


def first_layer(record: dict[str, Any]) -> str:
    """The name of a quantized layer."""
    return next(iter(record["layers"]))


def message_of_loading(folder: pathlib.Path, content: str) -> str:
    """What our error says when this is the manifest; nothing when it loads."""
    (folder / MANIFEST_NAME).write_text(content)
    try:
        Manifest.load(folder)
    except DuQuantError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("preset", ["default", "simple", "optimized"])
def test_it_loads_as_it_was_saved(
    converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, tiny: Architecture, preset: str
) -> None:
    manifest = Manifest.load(converted(preset))
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (tmp_path / MANIFEST_NAME).read_bytes() == (converted(preset) / MANIFEST_NAME).read_bytes()
    assert manifest.config == PRESETS[preset]
    assert manifest.architecture == tiny


def test_a_manifest_that_is_missing_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match=MANIFEST_NAME):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "nonsense", "[]", "[1]", "3", "null", '"text"', "{}", pytest.param("[" * 99999, id="deep"), "\udcff"],
)
def test_what_is_no_manifest_at_all_is_refused(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DuQuantError, match=MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_a_manifest_without_one_of_its_parts_is_refused(record: dict[str, Any], tmp_path: pathlib.Path) -> None:
    for key in record:
        message = message_of_loading(tmp_path, json.dumps(damaged(record, (key,), ...)))
        assert ("format version None" if key == "format_version" else "sha256 differs") in message


@pytest.mark.parametrize("version", [0, 2, "1", None, "1\n2", [1]])
def test_another_format_version_is_refused_and_named(record: Any, tmp_path: pathlib.Path, version: object) -> None:  # noqa: ANN401
    message = message_of_loading(tmp_path, json.dumps(damaged(record, ("format_version",), version)))
    assert "format version" in message
    assert len(message.splitlines()) == 1


def test_the_order_of_fields_does_not_matter(record: dict[str, Any], tmp_path: pathlib.Path) -> None:
    assert not message_of_loading(tmp_path, json.dumps(record, sort_keys=True))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("unknown",), 1),
        (("config", "unknown"), 1),
        (("config", "permute"), ...),
        (("config", "weight_bits"), 3),
        (("config", "include"), "("),
        (("config", "include"), 5),
        (("config", "smoothing"), "much"),
        (("config", "rotation_block"), "6\n4"),
        (("architecture", "vision"), ...),
        (("architecture", "vision"), 5),
        (("architecture", "language", "depth"), "2"),
        (("architecture", "language", "depth"), 3),
        (("architecture", "language", "unknown"), 3),
        (("layers", "LAYER", "unknown"), 1),
        (("layers", "LAYER", "permute"), ...),
        (("layers", "LAYER"), 3),
        (("layers", "LAYER", "in_features"), "64"),
        (("layers", "LAYER", "in_features"), 0),
        (("layers", "LAYER", "rotation_block"), 0),
        (("layers", "LAYER", "output_rotation_block"), 0),
        (("layers", "LAYER", "weight_bits"), 5),
        (("layers", "LAYER", "activation_bits"), 4),
        (("layers", "LAYER", "rotation"), "hadammard"),
        (("layers", "LAYER", "output_rotation"), None),
        (("layers", "LAYER", "rotation_block"), 48),
        (("layers", "LAYER", "group"), "nobody"),
        (("layers",), []),
        (("folds",), 5),
        (("folds", 0, "kind"), "unknown"),
        (("float_dtypes",), 3),
        (("float_dtypes", "action_in_proj.weight"), ...),
        (("float_dtypes", "action_in_proj.weight"), "nn"),
        (("float_dtypes", "action_in_proj.weight"), "float\n32"),
        (("sha256",), None),
    ],
    ids=str,
)
def test_damage_in_one_place_is_refused_in_one_line(
    record: Any,  # noqa: ANN401
    tmp_path: pathlib.Path,
    path: Path,
    value: object,
) -> None:
    path = tuple(first_layer(record) if key == "LAYER" else key for key in path)
    message = message_of_loading(tmp_path, json.dumps(damaged(record, path, value)))
    assert message.startswith(str(tmp_path / MANIFEST_NAME))
    assert len(message.splitlines()) == 1


def places(node: object, path: Path = ()) -> Iterator[Path]:
    """The paths of a JSON value and of all values in it."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


LEAF = st.none() | st.booleans() | st.integers(-999, 999) | st.floats() | st.text() | st.sampled_from(["float32", "1"])
VALUE = st.recursive(LEAF, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data(), value=VALUE)
@example(data=None, value=[1])
def test_whatever_stands_anywhere_only_our_error_comes_out_in_one_line(
    record: Any,  # noqa: ANN401
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject | None,
    value: object,
) -> None:
    depth = data.draw(st.integers(0, 5)) if data else 0
    candidates = [path for path in places(record) if len(path) <= depth]
    path = data.draw(st.sampled_from(candidates)) if data else ()
    message = message_of_loading(tmp_path_factory.getbasetemp(), json.dumps(damaged(record, path, value)))
    assert len(message.splitlines()) <= 1
