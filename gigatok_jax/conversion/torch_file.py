"""Reads files of `torch.save` without torch, and without running anything in them.

A checkpoint is a pickle beside raw tensor bytes. The pickle may name only what is listed here:
tensors, containers, numbers, strings, argparse.Namespace; any other name is refused before it
is looked up. Tensors are views of the memory-mapped file.
"""

import argparse
import collections
import os
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from gigatok_jax.errors import CheckpointError

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGED = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError),
    *(LookupError, AttributeError, TypeError, ValueError, ImportError, OverflowError),
)


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int  # elements


class _Lazy(NamedTuple):
    """A tensor whose bytes come later in the file, as in the format before torch 1.6."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(path: epath.PathLike) -> Any:
    """The saved object with numpy arrays in place of tensors.

    Args:
        path: a file of `torch.save`, either format; remote paths are read as a whole.

    Returns:
        Dicts, lists, numbers, strings, Namespaces; arrays are read-only views of the file,
        bfloat16 as `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: the file is damaged, of another kind, or holds anything else.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file:
            return _load_zip(path, file) if zipfile.is_zipfile(file) else _load_legacy(path, file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path}: damaged or not a file of torch.save ({error}); get it again"
        ) from error


def load_pickle(path: epath.PathLike) -> Any:
    """The object of a plain pickle, under the same list of allowed names; raises the same."""
    try:
        with epath.Path(path).open("rb") as file:
            return _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _DAMAGED as error:
        raise CheckpointError(f"{path}: damaged or not a pickle ({error}); get it again") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        """What a name in the pickle stands for; the only door, so the list is the guard."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        raise CheckpointError(
            f"holds {module}.{name}, which is not a tensor, container, number or string; refused"
        )

    def persistent_load(self, saved) -> _Storage:
        """A reference to tensor bytes: ("storage", type, key, device, elements, ...)."""
        kind, dtype, key, _, size, *_ = saved
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise CheckpointError(f"refers to {kind!r}, expected the storage of a tensor; refused")
        return _Storage(dtype, key, size)


def _tensor(storage: _Storage, offset: int, shape, strides, *_ignored) -> _Lazy:
    """Stands for torch._utils._rebuild_tensor_v2; gradient flags and hooks are dropped."""
    return _Lazy(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: _Lazy, *_ignored) -> _Lazy:
    return data


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
}


def _load_zip(path: epath.Path, file) -> Any:
    """The format since torch 1.6: an uncompressed zip of one pickle and one file per storage."""
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("is a zip without one data.pkl; expected a file of torch.save")
    root, raw = pickles[0].removesuffix("data.pkl"), _map(path)
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("was saved on a big-endian machine; save it again on another")

    def read(storage: _Storage) -> np.ndarray:
        start = _member_start(raw, archive.getinfo(f"{root}data/{storage.key}"))
        return _view(raw, start, storage)

    with archive.open(pickles[0]) as stream:
        return _resolve(_Unpickler(stream).load(), read)


def _load_legacy(path: epath.Path, file) -> Any:
    """The older format: pickles of header and object, then each storage behind its length."""
    file.seek(0)
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise CheckpointError("is not a file of torch.save")
    _Unpickler(file).load()  # protocol version
    _Unpickler(file).load()  # byte order and integer sizes, the same wherever torch runs
    saved = _Unpickler(file).load()
    keys, raw, start, starts = _Unpickler(file).load(), _map(path), file.tell(), {}
    sizes = {storage.key: storage for storage in _storages(saved)}
    for key in keys:
        starts[key] = start + 8  # past the number of elements
        start += 8 + sizes[key].size * sizes[key].dtype.itemsize
    return _resolve(saved, lambda storage: _view(raw, starts[storage.key], storage))


def _map(path: epath.Path) -> np.ndarray:
    """Bytes of a file: mapped when it is on a local disk."""
    if os.path.exists(path):
        return np.memmap(path, np.uint8, mode="r")
    return np.frombuffer(path.read_bytes(), np.uint8)


def _member_start(raw: np.ndarray, member: zipfile.ZipInfo) -> int:
    """Offset of an uncompressed member's bytes, behind its own header of variable length."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError("has compressed tensors, which torch.save never writes")
    name, extra = struct.unpack("<HH", raw[member.header_offset + 26 :][:4].tobytes())
    return member.header_offset + 30 + name + extra


def _view(raw: np.ndarray, start: int, storage: _Storage) -> np.ndarray:
    data = raw[start : start + storage.size * storage.dtype.itemsize]
    if data.size != storage.size * storage.dtype.itemsize:
        raise CheckpointError("ends in the middle of a tensor; get it again")
    # A copy only where the bytes are not aligned for their type.
    return np.asarray(data).view(storage.dtype)


def _walk(saved: Any, replace) -> Any:
    """`saved` with every tensor replaced, in the containers that `find_class` admits."""
    if isinstance(saved, _Lazy):
        return replace(saved)
    if isinstance(saved, dict):
        return {key: _walk(value, replace) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_walk(value, replace) for value in saved)
    if isinstance(saved, argparse.Namespace):
        return argparse.Namespace(**_walk(vars(saved), replace))
    return saved


def _storages(saved: Any) -> list[_Storage]:
    found = []
    _walk(saved, lambda tensor: found.append(tensor.storage))
    return found


def _resolve(saved: Any, read) -> Any:
    return _walk(saved, lambda tensor: _strided(read(tensor.storage), tensor))


def _strided(data: np.ndarray, tensor: _Lazy) -> np.ndarray:
    """A view of the storage, after checking that it stays inside: the file is not trusted."""
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError(f"has a tensor of shape {shape} and strides {strides}; refused")
    if 0 in shape:
        return np.zeros(shape, data.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= data.size:
        raise CheckpointError(f"has a tensor of shape {shape} larger than its bytes; refused")
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps, writeable=False)
