"""Tensors in and out of safetensors files, one at a time: no checkpoint is ever held whole in memory."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import hashlib
import json
import math
import pathlib
import shutil
import sys
import tempfile
from types import TracebackType
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors import safe_open
import torch
from torch import Tensor

from openpi_duquant.config import DuQuantError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

TensorType = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class SafetensorsReader(contextlib.AbstractContextManager, Mapping[str, Tensor]):
    """The tensors of a checkpoint folder: `model.safetensors`, or the shards its index names.

    The library checks the files; tensors are then read, not memory-mapped: a file that shrinks under a map kills the
    process, a short read is an error that can be told.

    Args:
        folder: The checkpoint.

    Raises:
        DuQuantError: If there is no such folder, no weights in it, or a file is truncated or foreign.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.files = _weight_files(folder)
        self.types: dict[str, TensorType] = {}
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        with contextlib.ExitStack() as stack:
            for path in self.files:
                self._open(path, stack)
            self._stack = stack.pop_all()

    def _open(self, path: pathlib.Path, stack: contextlib.ExitStack) -> None:
        try:
            with safe_open(path, framework="pt"):
                file = stack.enter_context(path.open("rb"))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if name in self.types:
                    raise DuQuantError(f"{path}: tensor {name} is in another shard too; fetch the checkpoint again")
                if max(entry["shape"], default=0) > sys.maxsize:
                    raise KeyError(f"a dimension of {name}")
                self.types[name] = DTYPES[entry["dtype"]], tuple(entry["shape"])
                self._places[name] = file, 8 + length + entry["data_offsets"][0]
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DuQuantError(f"{path}: not a readable safetensors file ({reason}); fetch it again") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {name: shape for name, (_, shape) in self.types.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, as stored.

        Raises:
            DuQuantError: If the file has shrunk or can no longer be read.
        """
        dtype, shape = self.types[name]
        file, offset = self._places[name]
        tensor = torch.empty(shape, dtype=dtype)
        content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        file.seek(offset)
        if file.readinto(content) != len(content):
            raise DuQuantError(f"{file.name}: ends within tensor {name}; it was truncated while it was read")
        return tensor

    def __getitem__(self, name: str) -> Tensor:
        """As `read`."""
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; reads nothing."""
        return name in self.types

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self.types)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.types)

    def digest(self) -> str:
        """SHA-256 over the bytes of all files."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the files."""
        self._stack.close()


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        raise DuQuantError(f"{folder}: no such folder; give the folder that holds {WEIGHTS_NAME}")
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if (folder / "params").is_dir():
        raise DuQuantError(
            f"{folder}: a JAX checkpoint; convert it with openpi's examples/convert_jax_model_to_pytorch.py "
            f"--checkpoint_dir {folder} --config_name <config> --output_path <folder>, then convert that folder"
        )
    if not (folder / INDEX_NAME).is_file():
        raise DuQuantError(f"{folder}: holds no {WEIGHTS_NAME}; is it a PyTorch checkpoint of openpi?")
    try:
        names = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
        shards = [folder / name for name in sorted(names) if name.encode()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DuQuantError(f"{folder / INDEX_NAME}: not an index of shards ({type(error).__name__})") from None
    if not shards:
        raise DuQuantError(f"{folder / INDEX_NAME}: names no shards; fetch the checkpoint again")
    return shards


class SafetensorsWriter(contextlib.AbstractContextManager):
    """Writes a safetensors file whose tensors arrive one by one, in any order.

    The safetensors library writes only what is in memory all at once; the format (a JSON header of dtypes, shapes and
    offsets, then the bytes: https://huggingface.co/docs/safetensors) lets a known header come first.

    Args:
        path: The file to make.
        types: Dtype and shape of every tensor that will be written.
    """

    def __init__(self, path: pathlib.Path, types: Mapping[str, TensorType]) -> None:
        self._types = dict(types)
        self._missing = set(types)
        self._offsets, header = {}, {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in types.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._offsets[name] = begin
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor.

        Raises:
            ValueError: If it is not one that was announced, or was written before.
            DuQuantError: If the disk is full or fails.
        """
        if name not in self._missing or (tensor.dtype, tuple(tensor.shape)) != self._types[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not announced as such, or comes twice")
        self._missing.remove(name)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            self._file.seek(self._begin + self._offsets[name])
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise DuQuantError(f"{self._file.name}: cannot be written ({error.strerror})") from None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the file; ValueError if a tensor that was announced never came."""
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):  # the first error is told
            self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"never written: {sorted(self._missing)}")


def iter_bytes(types: Mapping[str, TensorType]) -> Iterator[int]:
    """Bytes of each tensor."""
    return (math.prod(shape) * dtype.itemsize for dtype, shape in types.values())


@contextlib.contextmanager
def renamed_when_whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside the target that becomes the target, or vanishes with whatever interrupts.

    Raises:
        DuQuantError: If something else has made the target meanwhile.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    with contextlib.ExitStack() as cleanup:
        for folder in reversed(missing):
            cleanup.callback(_remove_if_empty, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial
        partial.chmod(0o755)
        try:
            if target.exists():
                raise FileExistsError(errno.EEXIST, "exists")
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise DuQuantError(f"{target}: was made by something else meanwhile; it is left as it is") from None


def _remove_if_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
