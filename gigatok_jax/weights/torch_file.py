"""Reads and writes files of `torch.save` without torch; no code in them is run.

A checkpoint is a pickle beside raw tensor bytes. The pickle may name only what is listed here:
tensors, containers, numbers, strings, argparse.Namespace; any other name raises CheckpointError
before it is looked up. Tensors are views of the memory-mapped file.
"""

import argparse
import collections
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from gigatok_jax.errors import CheckpointError
from gigatok_jax.weights.names import Promise, value_of

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
_STORAGES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE = 1 << 28  # bytes; a training checkpoint of 2.9B parameters has under 2 MB
_ALIGNED = 64  # bytes, where torch.save starts each tensor
_DAMAGED = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError),
    *(LookupError, AttributeError, TypeError, ValueError, ImportError, OverflowError),
    *(MemoryError, RecursionError, NotImplementedError),  # what a crafted file may ask for
)


class _Storage(NamedTuple):
    """Record that refers to a storage, the bytes of tensors, in a file of `torch.save`."""

    dtype: np.dtype
    key: str
    size: int  # elements


class _Lazy(NamedTuple):
    """Record of a tensor as a view of a storage, whose bytes are read after the pickle."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(path: epath.PathLike) -> Any:
    """Loads the object in a file of `torch.save`, with numpy arrays instead of tensors.

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
            if not file.read(1):
                raise CheckpointError("is empty; get it again")
            return _load_zip(path, file) if zipfile.is_zipfile(file) else _load_legacy(path, file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, expected a file of torch.save") from None
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path}: damaged or not a file of torch.save ({error}); get it again"
        ) from error


def load_pickle(path: epath.PathLike) -> Any:
    """Loads a plain pickle of containers, numbers, strings and numpy arrays; runs no code in it.

    Raises:
        CheckpointError: the file is damaged, of another kind, or holds anything else.
    """
    try:
        with epath.Path(path).open("rb") as file:
            return _unpickle(file, _ALLOWED | _ALLOWED_ARRAYS)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _DAMAGED as error:
        raise CheckpointError(f"{path}: damaged or not a pickle ({error}); get it again") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, allowed):
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str):
        """Returns the object for a name in a pickle; raises CheckpointError if not allowed.

        All names in a pickle pass here, so the list of allowed names guards the reader.
        """
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        raise CheckpointError(
            f"holds {module}.{name}, which is not a tensor, container, number or string; refused"
        )

    def persistent_load(self, saved) -> _Storage:
        """Returns the `_Storage` for a pickle's reference to the bytes of a tensor.

        Raises CheckpointError unless it is ("storage", type, key, device, elements, ...).
        """
        kind, dtype, key, _, size, *_ = saved
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise CheckpointError(f"refers to {kind!r}, expected the storage of a tensor; refused")
        if type(size) is not int or size < 0:
            raise CheckpointError(f"has a storage of {size!r} numbers; refused")
        return _Storage(dtype, str(key), size)


def _unpickle(file, allowed=None) -> Any:
    """Reads one pickle of a stream, after checking the numbers of its remembered objects.

    Python's reader allocates as many objects as the largest number says, so a number that exceeds
    the length of the pickle before it raises CheckpointError.
    """
    start = file.tell()
    for code, argument, position in pickletools.genops(file):
        if "PUT" in code.name and int(argument) > position - start:
            raise CheckpointError(f"remembers object {argument} of a pickle of {position} bytes")
    file.seek(start)
    return _Unpickler(file, _ALLOWED if allowed is None else allowed).load()


def _tensor(storage: _Storage, offset: int, shape, strides, *_ignored) -> _Lazy:
    """Makes a `_Lazy` in place of torch._utils._rebuild_tensor_v2; drops gradient flags, hooks."""
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
}
_ALLOWED_ARRAYS = {  # in plain pickles only: these allocate shapes without a bound
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
}


def _load_zip(path: epath.Path, file) -> Any:
    """Loads a file of torch since 1.6: an uncompressed zip of a pickle and a member per storage."""
    archive = zipfile.ZipFile(file)
    _check_members(archive)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("is a zip without one data.pkl; expected a file of torch.save")
    root, raw = pickles[0].removesuffix("data.pkl"), _map(path)
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("was saved on a big-endian machine; save it again on another")

    def read(storage: _Storage) -> np.ndarray:
        member = archive.getinfo(f"{root}data/{storage.key}")
        end = member.file_size if member.compress_type == zipfile.ZIP_STORED else 0
        start = _member_start(raw, member)
        return _view(raw[: start + end], start, storage)

    return _resolve(_unpickle(io.BytesIO(archive.read(pickles[0]))), read)


def _check_members(archive: zipfile.ZipFile) -> None:
    """Raises CheckpointError if a zip has a name twice, or a pickle too large once unpacked."""
    count = collections.Counter(archive.namelist())
    if double := [name for name, times in count.items() if times > 1]:
        raise CheckpointError(f"has {double[0]} twice; which is meant? Get it again")
    for member in archive.infolist():
        if member.filename.endswith("/data.pkl") and member.file_size > _LARGEST_PICKLE:
            raise CheckpointError(f"has a pickle of {member.file_size} bytes; refused")


def _load_legacy(path: epath.Path, file) -> Any:
    """Loads a file of older torch: pickles, then each storage after its number of elements."""
    file.seek(0)
    if _unpickle(file) != _LEGACY_MAGIC:
        raise CheckpointError("is not a file of torch.save")
    _unpickle(file)  # protocol version
    _unpickle(file)  # byte order and integer sizes, the same wherever torch runs
    saved = _unpickle(file)
    keys, raw, start, starts = _unpickle(file), _map(path), file.tell(), {}
    sizes = {storage.key: storage for storage in _storages(saved)}
    for key in keys:
        starts[key] = start + 8  # past the number of elements
        start += 8 + sizes[key].size * sizes[key].dtype.itemsize
    return _resolve(saved, lambda storage: _view(raw, starts[storage.key], storage))


def _map(path: epath.Path) -> np.ndarray:
    """Returns the content of a file as uint8, mapped into memory if it is on a local disk."""
    if os.path.exists(path):
        return np.memmap(path, np.uint8, mode="r")
    return np.frombuffer(path.read_bytes(), np.uint8)


def _member_start(raw: np.ndarray, member: zipfile.ZipInfo) -> int:
    """Returns the offset in a zip of an uncompressed member's content, past the member's header."""
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


def _walk(saved: Any, replace: Callable[["_Lazy"], Any], done: dict | None = None) -> Any:
    """Copies nested dicts, lists, tuples and Namespaces, with `replace` applied to every tensor.

    An object that is referred to twice is walked through once: a small pickle can name the same
    list a billion times.
    """
    done = {} if done is None else done
    if id(saved) not in done:
        done[id(saved)] = saved  # an entry for now: a list may contain itself
        done[id(saved)] = _walk_one(saved, replace, done)
    return done[id(saved)]


def _walk_one(saved: Any, replace: Callable, done: dict) -> Any:
    if isinstance(saved, _Lazy):
        return replace(saved)
    if isinstance(saved, dict):
        return {key: _walk(value, replace, done) for key, value in saved.items()}
    if type(saved) in (list, tuple):
        return type(saved)(_walk(value, replace, done) for value in saved)
    if isinstance(saved, argparse.Namespace):
        return argparse.Namespace(**_walk(vars(saved), replace, done))
    return saved


def _storages(saved: Any) -> list[_Storage]:
    storages = []
    _walk(saved, lambda tensor: storages.append(tensor.storage))
    return storages


def _resolve(saved: Any, read) -> Any:
    return _walk(saved, lambda tensor: _strided(read(tensor.storage), tensor))


def _strided(data: np.ndarray, tensor: _Lazy) -> np.ndarray:
    """Returns a view of a storage as a tensor, by offset, shape and strides.

    Raises CheckpointError if the view leaves the storage, as files may lie.
    """
    if not isinstance(tensor.storage, _Storage):
        raise CheckpointError("has a tensor without bytes; refused")
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError(f"has a tensor of shape {shape} and strides {strides}; refused")
    if 0 in shape:
        return np.zeros(shape, data.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= data.size or math.prod(shape) > data.size:  # repeated numbers are no weights
        raise CheckpointError(f"has a tensor of shape {shape} larger than its bytes; refused")
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps, writeable=False)


# Writing.


def save(path: epath.PathLike, saved: dict, progress: Callable[[int], None] | None = None) -> None:
    """Writes an object to a file for `torch.load(weights_only=True)`, with arrays as tensors.

    Args:
        path: path of the file, which is replaced if it exists.
        saved: nested dicts, lists and tuples of numbers, strings, None, arrays and promises of
            them. Promises are read one at a time, sorted by `order`.
        progress: called with the number of bytes of each tensor once it is written.

    Raises:
        CheckpointError: a value has another type.
    """
    arrays: list[np.ndarray | Promise] = []
    pickled = b"\x80\x02" + _pickled(saved, arrays) + b"."
    keys = sorted(range(len(arrays)), key=lambda i: getattr(arrays[i], "order", 0))
    with epath.Path(path).open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for key in keys:
            _write_member(archive, file.tell(), f"archive/data/{key}", value_of(arrays[key]))
            if progress:
                progress(arrays[key].nbytes)


def _write_member(archive: zipfile.ZipFile, start: int, name: str, array: np.ndarray) -> None:
    """Writes a tensor as a zip member at an aligned offset, for readers that map the file."""
    member = zipfile.ZipInfo(name)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    member.file_size = data.size
    long = data.size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile then adds a field of 20 bytes
    header = 30 + len(name) + 4 + (20 if long else 0)
    padding = -(start + header) % _ALIGNED
    member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(member, "w") as stream:
        stream.write(data.data)


def _pickled(value: Any, arrays: list) -> bytes:
    """Returns the pickle opcodes of protocol 2 for a value; appends its arrays to `arrays`."""
    if isinstance(value, dict):
        pairs = b"".join(_pickled(k, arrays) + _pickled(v, arrays) for k, v in value.items())
        return b"}(" + pairs + b"u"
    if isinstance(value, list | tuple) and not isinstance(value, Promise):
        items = b"".join(_pickled(item, arrays) for item in value)
        return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
    if isinstance(value, np.ndarray | Promise):
        arrays.append(value)
        return _pickled_tensor(value, len(arrays) - 1)
    if value is None or type(value) in (bool, int, float):
        return pickle.dumps(value, protocol=2)[2:-1]
    if type(value) is str:
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    raise CheckpointError(f"cannot write a {type(value).__name__} for PyTorch")


def _pickled_tensor(array: "np.ndarray | Promise", key: int) -> bytes:
    if np.dtype(array.dtype) not in _STORAGES:
        raise CheckpointError(f"cannot write {array.dtype} for PyTorch")
    number = lambda n: pickle.dumps(n, protocol=2)[2:-1]  # noqa: E731
    numbers = lambda shape: b"(" + b"".join(map(number, shape)) + b"t"  # noqa: E731
    strides = [math.prod(array.shape[i + 1 :]) for i in range(len(array.shape))]
    storage = b"".join(
        [
            b"(" + _pickled("storage", []),
            f"ctorch\n{_STORAGES[np.dtype(array.dtype)]}\n".encode(),
            _pickled(str(key), []) + _pickled("cpu", []) + number(array.size),
            b"tQ",
        ]
    )
    rest = number(0) + numbers(array.shape) + numbers(strides)
    hooks = b"\x89ccollections\nOrderedDict\n)R"  # no gradient, no hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + hooks + b"tR"
