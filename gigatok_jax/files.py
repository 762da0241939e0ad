"""Small files that are either whole or not there."""

import contextlib
import io
import json
import os
from typing import Any

from etils import epath


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Replaces a file; a crash at any moment leaves the old one or the new one, never a part.

    Args:
        path: any path that epath knows; its folder exists.
        data: the whole content.
    """
    path = epath.Path(path)
    draft = path.parent / f"{path.name}.tmp"
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # object stores
            os.fsync(file.fileno())
    draft.replace(path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON through `write_bytes`; its dicts keep their order."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Value of a JSON file; ValueError when it is not JSON, OSError when it cannot be read."""
    return json.loads(epath.Path(path).read_text())
