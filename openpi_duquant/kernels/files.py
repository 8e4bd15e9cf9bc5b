"""Files in the cache, which several processes may write at the same time."""

import pathlib
import tempfile


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file, and its folder, so that whoever reads finds all of it or none; the last of several writers wins.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = pathlib.Path(folder) / path.name
        partial.write_bytes(content)
        partial.replace(path)
