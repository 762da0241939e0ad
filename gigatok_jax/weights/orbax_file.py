"""Reads and writes checkpoints of our runs array by array, for states larger than the memory."""

import asyncio
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from gigatok_jax import files, trees
from gigatok_jax.run import checkpoint
from gigatok_jax.weights.names import Promise, value_of

GROUP = 1 << 28  # bytes; Orbax takes as long for one small array as for many at once


class Step(NamedTuple):
    """Record of one saved step of a run: arrays, which are read later, and JSON values."""

    arrays: dict[str, Promise]  # by path, as in "params/quantizer/codebook"
    extras: dict[str, Any]  # JSON values beside the arrays: step, config, ...


def read(path: epath.PathLike) -> Step:
    """Opens the newest whole step of a run's workdir, or a named step; arrays are read later.

    Raises:
        CheckpointError: the path has no whole step.
    """
    _, extras = checkpoint.load_params(path, ())
    root, _ = checkpoint.find(path)
    state = root / str(extras["step"]) / checkpoint.STATE
    tree = ocp.PyTreeCheckpointHandler().metadata(state).tree
    leaves = trees.flatten(tree)
    group_of = _groups(leaves)
    read_group = functools.lru_cache(maxsize=2)(functools.partial(_read, state))

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: read_group(group_of[name])[name]

    arrays = {
        name: Promise(tuple(leaf.shape), np.dtype(leaf.dtype), reader(name), i)
        for i, (name, leaf) in enumerate(leaves.items())
    }
    return Step(arrays, extras)


def _groups(leaves: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Splits arrays into groups to read together; returns the names in a group by each of them."""
    names = list(leaves)
    nbytes = [math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves.values()]
    groups = [tuple(names[i] for i in group) for group in _packed(nbytes)]
    return {name: group for group in groups for name in group}


def _packed(nbytes: Sequence[int]) -> list[list[int]]:
    """Splits consecutive indices of arrays into groups of up to GROUP bytes or one larger array."""
    groups, size = [[]], 0
    for i, count in enumerate(nbytes):
        if groups[-1] and size + count > GROUP:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += count
    return groups


def _read(state: epath.Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    item = trees.unflatten(dict.fromkeys(names, 0))
    how = trees.unflatten(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)))
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arrays = trees.flatten(reader.restore(state, args=args))
    return {name: np.asarray(array) for name, array in arrays.items()}


def write(
    workdir: epath.Path,
    step: int,
    arrays: Mapping[str, Promise | np.ndarray],
    extras: Mapping[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Writes a step of a run in the format of `checkpoint.Checkpoints`, a few arrays at a time.

    Args:
        workdir: folder of a run, created when missing.
        step: number of updates done.
        arrays: arrays or promises of them, by path.
        extras: JSON values; `step` is added.
        progress: called with the number of bytes of each group of arrays once it is written.
    """
    directory = workdir / checkpoint.FOLDER / str(step)
    directory.mkdir(parents=True)
    tree = trees.unflatten({path: _Promised(array) for path, array in arrays.items()})
    registry = type_handlers.create_type_handler_registry(
        (_Promised, _Handler(progress)), (jax.Array, type_handlers.ArrayHandler())
    )
    # Compression saves a tenth of the space of float32 weights and costs half of the speed.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as writer:
        writer.save(directory / checkpoint.STATE, args=ocp.args.PyTreeSave(tree))
    files.write_json(directory / checkpoint.EXTRAS, {"step": step, **extras})
    files.write_json(directory / checkpoint.CHECKSUMS, checkpoint.checksums(directory))


class _Promised:
    """Wrapper of an array or promise, of a type for which Orbax asks `_Handler` to write it."""

    def __init__(self, array: Promise | np.ndarray):
        self.array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.size, self.nbytes = array.size, array.nbytes


class _Handler(type_handlers.NumpyHandler):
    """Handler of Orbax that reads and writes `_Promised` arrays a few at a time."""

    def __init__(self, progress: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)  # no other code holds them
        self._progress = progress

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        for group in _packed([value.nbytes for value in values]):
            arrays = [value_of(values[i].array) for i in group]
            rest = ([infos[i] for i in group], [args[i] for i in group])
            for future in await super().serialize(arrays, *rest):
                await asyncio.to_thread(future.result)
            self._progress(sum(array.nbytes for array in arrays))
        return []
