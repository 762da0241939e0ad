"""How one parameter here corresponds to one tensor of a PyTorch state dict, both ways.

A model's names are a list of `Entry`; the two functions below read the list in either direction.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from gigatok_jax.errors import CheckpointError


class Entry(NamedTuple):
    path: str  # here, separated by "/"
    name: str  # there
    layout: str = "same"  # a key of LAYOUTS
    part: int | None = None  # third of a fused query-key-value tensor
    layer: int | None = None  # index on the leading axis of a scanned stack
    half: int | None = None  # of a parameter here whose last axis joins two tensors there


# From a PyTorch tensor to an array here, and back.
LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "dense": (lambda x: x.T, lambda x: x.T),  # [out in] and [in out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW, HWIO
    "conv1x1": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),  # a linear layer here
    "conv1d": (lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)),  # OIW and WIO
    "sequence": (lambda x: x[:, 0], lambda x: x[:, None]),  # [n 1 c] and [n c]
    "table": (lambda x: x[0, 0], lambda x: x[None, None]),  # [1 1 n c] and [n c]
}


def under(entries: Iterable[Entry], path: str, name: str, layer: int | None = None) -> list[Entry]:
    """The entries with a prefix on both sides; `layer` places them in a scanned stack."""
    return [
        entry._replace(path=path + entry.path, name=name + entry.name)
        if layer is None
        else entry._replace(path=path + entry.path, name=name + entry.name, layer=layer)
        for entry in entries
    ]


def layer_pair(path: str, name: str, layout: str, bias: bool = True) -> list[Entry]:
    """Kernel and bias of a linear or convolution layer."""
    kernel = [Entry(f"{path}/kernel", f"{name}.weight", layout)]
    return kernel + ([Entry(f"{path}/bias", f"{name}.bias")] if bias else [])


def norm_pair(path: str, name: str) -> list[Entry]:
    """Scale and bias of a normalisation layer."""
    return [Entry(f"{path}/scale", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")]


def set_path(tree: dict, path: str, value) -> None:
    """Puts a value into nested dicts, making them on the way."""
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def get_path(tree: Mapping, path: str):
    """The value at a "/"-separated path of nested dicts."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def from_torch(state: Mapping, entries: list[Entry]) -> dict:
    """Nested dict of numpy arrays from a state dict; every tensor is read once.

    Raises:
        CheckpointError: names are missing; the message lists the first of them.
    """
    missing = sorted({entry.name for entry in entries} - set(state))
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}: is this a state"
            " dict of another model?"
        )
    depths = _stack_depths(entries)
    tree, made, name, tensor = {}, {}, None, None
    for entry in entries:
        if entry.name != name:
            name, tensor = entry.name, np.asarray(state[entry.name])
        value = tensor if entry.part is None else np.split(tensor, 3)[entry.part]
        value = LAYOUTS[entry.layout][0](value)
        if entry.layer is None and entry.half is None:
            set_path(tree, entry.path, np.asarray(value, order="C"))
            continue
        if entry.path not in made:
            made[entry.path] = _room(entry, value, depths)
            set_path(tree, entry.path, made[entry.path])
        _piece(made[entry.path], entry)[...] = value
    return tree


def to_torch(params: Mapping, entries: list[Entry]) -> dict[str, np.ndarray]:
    """State dict of numpy arrays, in the order of the entries."""
    state, parts = {}, {}
    for entry in entries:
        value = _piece(np.asarray(get_path(params, entry.path)), entry)
        value = LAYOUTS[entry.layout][1](value)
        if entry.part is not None:
            parts.setdefault(entry.name, []).append(value)
            state[entry.name] = None  # holds the place until its three parts are here
            if len(parts[entry.name]) == 3:
                state[entry.name] = np.concatenate(parts.pop(entry.name))
            continue
        state[entry.name] = np.asarray(value, order="C")
    return state


def _room(entry: Entry, value: np.ndarray, depths: Mapping[str, int]) -> np.ndarray:
    """An array for a whole parameter, of which `value` is one piece."""
    shape = value.shape if entry.half is None else (*value.shape[:-1], 2 * value.shape[-1])
    stack = () if entry.layer is None else (depths[entry.path],)
    return np.empty((*stack, *shape), value.dtype)


def _piece(array: np.ndarray, entry: Entry) -> np.ndarray:
    """The view of a whole parameter that an entry stands for."""
    array = array if entry.layer is None else array[entry.layer, ...]  # a view of one number too
    return array if entry.half is None else np.split(array, 2, axis=-1)[entry.half]


def _stack_depths(entries: list[Entry]) -> dict[str, int]:
    depth = {}
    for entry in entries:
        if entry.layer is not None:
            depth[entry.path] = max(depth.get(entry.path, 0), entry.layer + 1)
    return depth
