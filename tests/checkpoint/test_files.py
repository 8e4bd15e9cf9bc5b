"""Safetensors files, against the safetensors library and the format's definition."""

from collections.abc import Sequence
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import struct
from typing import Any

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
from torch import Tensor

from openpi_duquant import DuQuantError
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint import SafetensorsWriter

SHAPES = ((), (0,), (3,), (5, 7), (2, 3, 4))
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Tensors of every dtype and shape, of random bits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            high = 2 if dtype == torch.bool else 256
            bits = torch.randint(high, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
            tensors[f"{dtype}.{len(shape)}.{'x'.join(map(str, shape))}"] = bits.view(dtype).reshape(shape)
    return tensors


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """All that a tensor is; unlike `torch.equal`, true of a NaN and false of -0.0 against 0.0."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: pathlib.Path, tensors: dict[str, Tensor], order: Sequence[str]) -> None:
    """Announces `tensors` and writes those of `order`."""
    types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, types) as writer:
        for name in order:
            writer.write(name, tensors[name])


def read(folder: pathlib.Path) -> dict[str, Tensor]:
    """All tensors, checked against the types and shapes that the reader announces."""
    with SafetensorsReader(folder) as reader:
        tensors = {name: reader.read(name) for name in reader.types}
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == reader.types
    return tensors


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_in_any_order_the_library_reads_bit_for_bit(tmp_path: pathlib.Path, seed: int) -> None:
    tensors = random_tensors(seed)
    order = random.Random(seed).sample(list(tensors), len(tensors))
    write(tmp_path / "model.safetensors", tensors, order)
    expected = {name: bits(tensor) for name, tensor in tensors.items()}
    assert {name: bits(tensor) for name, tensor in load_file(tmp_path / "model.safetensors").items()} == expected
    assert {name: bits(tensor) for name, tensor in read(tmp_path).items()} == expected


def test_the_header_is_the_formats(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = random_tensors(0)
    write(path, tensors, list(tensors))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}  # transformers refuses a file without it
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] == len(content) - 8 - length


def test_a_view_is_written_as_it_looks(tmp_path: pathlib.Path) -> None:
    view = torch.arange(24.0).reshape(4, 6).T[::2]
    write(tmp_path / "model.safetensors", {"view": view}, ["view"])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["view"], view)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a", torch.zeros(3)),  # a second time
        ("b", torch.zeros(4)),
        ("b", torch.zeros(3, 1)),
        ("b", torch.zeros(3, dtype=torch.int32)),
        ("c", torch.zeros(3)),
    ],
)
def test_a_tensor_that_was_not_announced_as_such_is_refused(tmp_path: pathlib.Path, name: str, tensor: Tensor) -> None:
    with SafetensorsWriter(tmp_path / "file", dict.fromkeys("ab", (torch.float32, (3,)))) as writer:
        writer.write("a", torch.ones(3))
        with pytest.raises(ValueError, match=f"^{name}: "):
            writer.write(name, tensor)
        writer.write("b", torch.full((3,), 2.0))
    assert [tensor.tolist() for tensor in load_file(tmp_path / "file").values()] == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_error_though_closing_fails_too() -> None:
    with pytest.raises(DuQuantError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write(pathlib.Path("/dev/full"), {"a": torch.zeros(3)}, ["a"])


def test_a_file_that_lacks_a_tensor_is_an_error_that_names_it(tmp_path: pathlib.Path) -> None:
    tensors = {"here": torch.zeros(3), "forgotten": torch.zeros(3)}
    with pytest.raises(ValueError, match="forgotten"):
        write(tmp_path / "file", tensors, ["here"])
    with pytest.raises(KeyError, match="unknown"):  # and hides no other error
        write(tmp_path / "file", tensors, ["unknown"])


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with three small tensors, written by the library."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: pathlib.Path, names: dict[str, str]) -> None:
    """Distributes the tensors of `model.safetensors` over the files that `names` gives them, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards_read_as_one_file(folder: pathlib.Path) -> None:
    expected = {name: bits(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    shard(folder, {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": "model-1-of-2.safetensors"})
    assert {name: bits(tensor) for name, tensor in read(folder).items()} == expected


def test_a_tensor_in_two_shards_is_refused(folder: pathlib.Path) -> None:
    shard(folder, {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, folder / "2.safetensors")
    with pytest.raises(DuQuantError, match=r"\ba\b"):
        SafetensorsReader(folder)


def test_the_digest_is_sha256_and_tells_every_byte(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    digests = set()
    for place in range(len(content) - 14, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with SafetensorsReader(folder) as reader:
            digests.add(reader.digest())
        assert reader.digest() == hashlib.sha256(hashlib.sha256(path.read_bytes()).digest()).hexdigest()
    assert len(digests) == 14


def test_a_folder_that_is_not_there_or_holds_no_weights_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match="no such folder"):
        SafetensorsReader(tmp_path / "gone")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")  # a pickle: never opened
    with pytest.raises(DuQuantError, match=r"holds no model\.safetensors"):
        SafetensorsReader(tmp_path)
    with pytest.raises(DuQuantError, match="no such folder"):
        SafetensorsReader(tmp_path / "pytorch_model.bin")


def test_a_file_cut_anywhere_is_an_error_that_names_it(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DuQuantError, match=r"model\.safetensors: not a readable"):
            SafetensorsReader(folder)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: pathlib.Path) -> None:
    save_file({"long": torch.zeros(99999)}, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 99999)
        with pytest.raises(DuQuantError, match="tensor long"):
            reader.read("long")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 99, b"\x80\x04." * 99, b"<!DOCTYPE html>" * 9, bytes(99)])
def test_a_foreign_file_is_an_error_that_names_it(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DuQuantError, match=r"model\.safetensors: not a readable"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": ["x"]}}', b'{"weight_map": {"a": "gone.safetensors"}}', b'{"weight_map": {"a": "."}}',
        b'{"weight_map": {"a": "\\u0000"}}', b'{"weight_map": {"a": "\\ud800"}}', b'{"weight_map": {}}',
        pytest.param(b"[" * 99999, id="deep"),
    ],
)  # fmt: skip
def test_an_index_that_names_no_readable_shards_is_an_error(tmp_path: pathlib.Path, index: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(DuQuantError, match=str(tmp_path)):
        SafetensorsReader(tmp_path)


LEAF = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text()
JSON = st.recursive(LEAF, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
VALID = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
ENTRY = st.fixed_dictionaries({name: st.just(value) | JSON for name, value in VALID.items()})


@settings(max_examples=150, deadline=None, database=None)
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3),
    flips=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 255)), max_size=3),
    shift=st.sampled_from([0, 0, 0, 1, -1, 2**62]),
    size=st.sampled_from([24, 24, 0]),
)
@example(header={"a": VALID | {"dtype": "C64", "shape": [3]}}, flips=[], shift=0, size=24)
@example(header={"": ["\n"]}, flips=[], shift=0, size=24)
@example(header={"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, flips=[], shift=0, size=0)
def test_whatever_the_header_says_only_our_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory,
    header: dict[str, Any],
    flips: list[tuple[int, int]],
    shift: int,
    size: int,
) -> None:
    text = json.dumps(header).encode()
    content = bytearray(struct.pack("<Q", max(0, len(text) + shift)) + text + bytes(size))
    for place, flip in flips:
        content[place % len(content)] ^= flip
    (tmp_path_factory.getbasetemp() / "model.safetensors").write_bytes(content)
    message = ""
    try:
        read(tmp_path_factory.getbasetemp())
    except DuQuantError as error:
        message = str(error)
    assert "\n" not in message


def test_asking_for_names_reads_nothing(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SafetensorsReader(folder) as reader:
        monkeypatch.setattr(SafetensorsReader, "read", None)
        assert set(reader) == {"a", "b", "c"}
        assert (len(reader), "a" in reader, "d" in reader) == (3, True, False)
