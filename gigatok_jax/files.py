"""Reading of small files, and writing that leaves a file whole or not at all."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, with "~" replaced by the home of the user."""
    return epath.Path(path).expanduser().absolute()


@contextlib.contextmanager
def draft(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a temporary file for writing that replaces `path` when the context ends without error.

    The folder of `path` has to exist.
    """
    path = epath.Path(path)
    beside = path.parent / f"{path.name}.tmp"
    with beside.open("wb") as file:
        yield file
        file.flush()
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # object stores
            os.fsync(file.fileno())
    beside.replace(path)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes a whole file; a crash at any moment leaves its old or its new content, never a part.

    Args:
        path: any path that epath knows; its folder has to exist.
        data: the whole content of the file.
    """
    with draft(path) as file:
        file.write(data)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` to a whole file as indented JSON; dicts keep the order of their keys."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file and returns its value.

    Raises:
        ValueError: the file is not JSON.
        OSError: the file cannot be read.
    """
    return json.loads(epath.Path(path).read_text())
