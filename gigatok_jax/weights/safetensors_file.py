"""Reads and writes `.safetensors` tensor by tensor.

The safetensors library reads the tensors after the header is checked here; it maps local files
alone. It cannot write promises, so files are written here.
"""

import functools
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from gigatok_jax.errors import CheckpointError
from gigatok_jax.weights.names import Promise, value_of

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError),
    safetensors.SafetensorError,
)


def load(path: epath.PathLike) -> tuple[dict[str, Promise], dict[str, str]]:
    """Opens a `.safetensors`; returns promises of its tensors by name, and the strings beside them.

    The header is checked here, then the safetensors library reads each tensor when it is needed.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    path = epath.Path(path)
    try:
        header, size = _header(path)
        metadata = header.pop("__metadata__", {})
        types = {name: _checked(size, name, entry) for name, entry in header.items()}
        read = _reader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _DAMAGE as error:
        reason = f"damaged or not safetensors ({error}); get it again"
        raise CheckpointError(f"{path}: {reason}") from error
    return {name: Promise(*types[name], functools.partial(read, name)) for name in types}, metadata


def _reader(path: epath.Path) -> Callable[[str], np.ndarray]:
    """Returns a function that reads a tensor of a `.safetensors` by name.

    A file that is not on a local disk is read as a whole at once.
    """
    if os.path.exists(path):
        return safetensors.safe_open(path, framework="numpy").get_tensor
    tensors = dict(safetensors.deserialize(path.read_bytes()))  # its numpy module lacks bfloat16

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        return np.ndarray(tuple(tensor["shape"]), _DTYPES[tensor["dtype"]], tensor["data"])

    return read


def _header(path: epath.Path) -> tuple[dict[str, Any], int]:
    """Reads a `.safetensors` header; returns its table and the number of bytes of all tensors."""
    size = path.stat().length
    if not size:
        raise CheckpointError("is empty; get it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError("is cut short or not safetensors; get it again")
        return json.loads(file.read(length), object_pairs_hook=_once), size - 8 - length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of the pairs of a JSON object; raises CheckpointError if a name comes twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"has {double} twice; which is meant? Get it again")
    return dict(pairs)


def _checked(size: int, name: str, entry: Mapping[str, Any]) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the type of a tensor from its entry in the header of a file.

    Raises CheckpointError if the type is unknown, or the tensor's bytes do not fit its shape or the
    file.
    """
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{name} is {entry['dtype']}, which is not read here")
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if any(type(n) is not int or n < 0 for n in (*shape, first, last)):
        raise CheckpointError(f"{name} has shape {shape} at {first} to {last}; refused")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{name} has {last - first} bytes for shape {shape}; refused")
    if last > size:
        raise CheckpointError(f"ends before {name} does; get it again")
    return tuple(shape), dtype


def save(
    path: epath.PathLike,
    tensors: Mapping[str, np.ndarray | Promise],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes arrays and promises of them to a `.safetensors`, one after the other.

    Args:
        path: path of the file, which is replaced if it exists.
        tensors: arrays and promises by name; they are written sorted by `order`.
        metadata: strings kept beside the tensors.
        progress: called with the number of bytes of each tensor once it is written.

    Raises:
        CheckpointError: an array has a type that the format does not have.
    """
    names = sorted(tensors, key=lambda name: getattr(tensors[name], "order", 0))
    header, at = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        tensor = tensors[name]
        if np.dtype(tensor.dtype) not in _NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors does not have")
        offsets = [at, at + tensor.nbytes]
        kind = _NAMES[np.dtype(tensor.dtype)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with epath.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = np.ascontiguousarray(value_of(tensors[name]))
            file.write(array.reshape(-1).view(np.uint8).data)
            if progress:
                progress(array.nbytes)
