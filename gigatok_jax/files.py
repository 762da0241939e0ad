"""Small files that are either whole or not there."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root on, "~" being the home of the user."""
    return epath.Path(path).expanduser().absolute()


@contextlib.contextmanager
def draft(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A file to write to that takes its place once it is whole; its folder exists."""
    path = epath.Path(path)
    beside = path.parent / f"{path.name}.tmp"
    with beside.open("wb") as file:
        yield file
        file.flush()
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # object stores
            os.fsync(file.fileno())
    beside.replace(path)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Replaces a file; a crash at any moment leaves the old one or the new one, never a part.

    Args:
        path: any path that epath knows; its folder exists.
        data: the whole content.
    """
    with draft(path) as file:
        file.write(data)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON through `write_bytes`; its dicts keep their order."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Value of a JSON file; ValueError when it is not JSON, OSError when it cannot be read."""
    return json.loads(epath.Path(path).read_text())
