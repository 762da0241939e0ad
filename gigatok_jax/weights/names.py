"""Converts a PyTorch state dict to our parameters and back, by a table of names.

The table of a model is a list of `Entry`. `from_torch` and `to_torch` convert arrays in memory;
`leaves` and `tensors` convert promises, which are read when they are written, for states larger
than the memory.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from gigatok_jax import trees
from gigatok_jax.errors import CheckpointError


class Entry(NamedTuple):
    """Record that pairs a tensor of PyTorch with the parameter of ours that it becomes.

    A third of the tensor, or all of it, becomes a piece of the parameter, or all of it.
    """

    path: str  # of our parameter, separated by "/"
    name: str  # of the tensor of PyTorch
    layout: str = "same"  # a key of LAYOUTS
    part: int | None = None  # third of a fused query-key-value tensor
    layer: int | None = None  # index on the leading axis of a scanned stack
    half: int | None = None  # of a parameter of ours whose last axis joins two tensors


class Promise(NamedTuple):
    """Record of an array that is computed or read only when `read` is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    order: int = 0  # the same for promises that read the same data

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


# Functions from a PyTorch tensor to our array, and back.
LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "dense": (lambda x: x.T, lambda x: x.T),  # [out in] and [in out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW, HWIO
    "conv1x1": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),  # a linear layer
    "conv1d": (lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)),  # OIW and WIO
    "sequence": (lambda x: x[:, 0], lambda x: x[:, None]),  # [n 1 c] and [n c]
    "table": (lambda x: x[0, 0], lambda x: x[None, None]),  # [1 1 n c] and [n c]
}


def under(entries: Iterable[Entry], path: str, name: str, layer: int | None = None) -> list[Entry]:
    """Puts prefixes before the path and the name of each `Entry` of a table.

    A `layer` becomes the entries' index in a scanned stack.
    """
    own = {} if layer is None else {"layer": layer}
    return [e._replace(path=path + e.path, name=name + e.name, **own) for e in entries]


def layer_pair(path: str, name: str, layout: str, bias: bool = True) -> list[Entry]:
    """Returns the `Entry` of the kernel and, with `bias`, of the bias of a linear or conv layer."""
    kernel = [Entry(f"{path}/kernel", f"{name}.weight", layout)]
    return kernel + ([Entry(f"{path}/bias", f"{name}.bias")] if bias else [])


def norm_pair(path: str, name: str) -> list[Entry]:
    """Returns the `Entry` of the scale and that of the bias of a normalisation layer."""
    return [Entry(f"{path}/scale", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")]


def below(arrays: Mapping, prefix: str) -> dict:
    """Selects the arrays whose paths begin with a prefix such as "params/"; removes the prefix."""
    return {path.removeprefix(prefix): x for path, x in arrays.items() if path.startswith(prefix)}


def from_torch(state: Mapping, entries: list[Entry]) -> dict:
    """Converts a PyTorch state dict to our parameters, nested numpy arrays; reads each tensor once.

    Raises:
        CheckpointError: names are missing; the message lists the first of them.
    """
    check_names(state, entries)
    depths, arrays = _stack_depths(entries), {}
    for name, group in _grouped(entries, "name").items():
        tensor = np.asarray(state[name])
        for entry in group:
            value = _from_tensor(tensor, entry)
            if entry.path not in arrays:
                arrays[entry.path] = np.empty(_whole_shape(entry, value.shape, depths), value.dtype)
            _piece(arrays[entry.path], entry)[...] = value
    return trees.unflatten(arrays)


def check_names(state: Mapping, entries: list[Entry]) -> None:
    """Raises CheckpointError if a state dict lacks a tensor that a table of names lists."""
    missing = sorted({entry.name for entry in entries} - set(state))
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}: is this a state"
            " dict of another model?"
        )


def to_torch(params: Mapping, entries: list[Entry]) -> dict[str, np.ndarray]:
    """Converts our parameters to a PyTorch state dict of numpy arrays, in the entries' order."""
    promises = tensors(trees.flatten(params), entries)
    return {name: promise.read() for name, promise in promises.items()}


def leaves(state: Mapping[str, "np.ndarray | Promise"], entries: list[Entry]) -> dict[str, Promise]:
    """Converts PyTorch tensors or promises to promises, read later, of our parameters by path.

    Raises:
        CheckpointError: names are missing.
    """
    check_names(state, entries)
    return {path: _leaf(state, group) for path, group in _grouped(entries, "path").items()}


def tensors(params: Mapping[str, "np.ndarray | Promise"], entries: list[Entry]) -> dict:
    """Converts our parameters or promises to promises, read later, of PyTorch tensors by name."""
    # A tensor joins at most three parameters, and a parameter holds tensors of many layers.
    read = functools.lru_cache(maxsize=3)(lambda path: value_of(params[path]))
    return {name: _tensor(params, group, read) for name, group in _grouped(entries, "name").items()}


def value_of(array: "np.ndarray | Promise") -> np.ndarray:
    """Returns an array as it is, or reads it if it is a `Promise`."""
    return array.read() if isinstance(array, Promise) else np.asarray(array)


def _grouped(entries: list[Entry], field: str) -> dict[str, list[Entry]]:
    groups = {}
    for entry in entries:
        groups.setdefault(getattr(entry, field), []).append(entry)
    return groups


def _outline(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of a shape that takes no memory, to compute the shape after a layout."""
    return np.broadcast_to(False, shape)


def _leaf(state: Mapping, group: list[Entry]) -> Promise:
    first, depths = group[0], _stack_depths(group)
    source = state[first.name]
    shape = tuple(source.shape)
    shape = shape if first.part is None else (shape[0] // 3, *shape[1:])
    shape = _whole_shape(first, LAYOUTS[first.layout][0](_outline(shape)).shape, depths)

    def read() -> np.ndarray:
        array = np.empty(shape, source.dtype)
        for entry in group:
            _piece(array, entry)[...] = _from_tensor(value_of(state[entry.name]), entry)
        return array

    return Promise(shape, np.dtype(source.dtype), read)


def _tensor(params: Mapping, group: list[Entry], read: Callable) -> Promise:
    source = params[group[0].path]
    shape = LAYOUTS[group[0].layout][1](_piece(_outline(tuple(source.shape)), group[0])).shape
    if len(group) > 1:  # parts of a fused tensor
        shape = (len(group) * shape[0], *shape[1:])

    def joined() -> np.ndarray:
        pieces = [LAYOUTS[e.layout][1](_piece(read(e.path), e)) for e in group]
        return np.asarray(np.concatenate(pieces) if len(pieces) > 1 else pieces[0], order="C")

    return Promise(shape, np.dtype(source.dtype), joined, getattr(source, "order", 0))


def _from_tensor(tensor: np.ndarray, entry: Entry) -> np.ndarray:
    """Converts the part of a PyTorch tensor that an entry names to our layout of axes."""
    return LAYOUTS[entry.layout][0](
        tensor if entry.part is None else np.split(tensor, 3)[entry.part]
    )


def _whole_shape(entry: Entry, shape: tuple[int, ...], depths: Mapping[str, int]) -> tuple:
    """Computes the shape of a whole parameter from the shape of the piece that an entry names."""
    shape = shape if entry.half is None else (*shape[:-1], 2 * shape[-1])
    return shape if entry.layer is None else (depths[entry.path], *shape)


def _piece(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns a view of the piece of a parameter that an entry names: a layer, a half or all."""
    array = array if entry.layer is None else array[entry.layer, ...]  # a view of one number too
    return array if entry.half is None else np.split(array, 2, axis=-1)[entry.half]


def _stack_depths(entries: list[Entry]) -> dict[str, int]:
    depth = {}
    for entry in entries:
        if entry.layer is not None:
            depth[entry.path] = max(depth.get(entry.path, 0), entry.layer + 1)
    return depth
