"""Checkpoints of a run: Orbax arrays, a JSON file of everything else, and checksums of both.

    checkpoints/<step>/state/            arrays, one Orbax tree of nested dicts
    checkpoints/<step>/extras.json       step, data position, config
    checkpoints/<step>/CHECKSUMS.json    size and CRC-32 of every file above, written last

A step counts only once its checksums are there, and older steps go only after that, so a run killed
at any moment loses nothing but the time since its last save.
"""

import errno
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.run import processes

FOLDER, STATE, EXTRAS, CHECKSUMS = "checkpoints", "state", "extras.json", "CHECKSUMS.json"
READERS = 8  # threads that read files for their checksums
BLOCK = 1 << 24  # bytes of a file read at a time
NO_SPACE = ("no space left", "resource_exhausted", "disk quota")  # TensorStore has no errno


class Checkpoints:
    """Saves and restores the steps of one run; the only writer of its `checkpoints/`."""

    def __init__(self, workdir: epath.PathLike, keep: int = 3, milestone_every: int = 0):
        """Opens `<workdir>/checkpoints`, made when missing.

        Args:
            workdir: folder of the run.
            keep: newest steps that stay, at least 1.
            milestone_every: steps that are multiples of it stay for ever; 0 for none.
        """
        if keep < 1:
            raise ConfigError(f"save.keep is {keep}, expected at least 1")
        self.root = files.absolute(workdir) / FOLDER
        self.root.mkdir(parents=True, exist_ok=True)
        self._keep, self._milestone_every = keep, milestone_every
        # Compression saves a tenth of the space of float32 weights and costs half of the speed.
        self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, futures.Future] | None = None
        self._current: int | None = None  # verified, or written by this object

    def save(self, step: int, state: Any, extras: Mapping[str, Any]) -> None:
        """Starts to save and returns once the arrays may be donated; one save runs at a time.

        A step that this object has just saved or restored is not written again.

        Args:
            step: optimizer updates done.
            state: tree of jax arrays (any sharding) and typed random keys.
            extras: JSON values; `step` is added.

        Raises:
            CheckpointError: this save, or the one before it, could not be written.
        """
        self.wait()
        if step == self._current:
            return
        directory = self.root / str(step)
        try:
            if jax.process_index() == 0:
                _clear(directory)
                directory.mkdir()
            self._saver.save(directory / STATE, args=ocp.args.PyTreeSave(_to_tree(state)))
        except Exception as error:
            raise self._failure(step, error) from error
        job = self._pool.submit(self._commit, directory, {"step": step, **extras})
        self._pending = (step, job)

    def wait(self) -> None:
        """Blocks until the save in progress is whole; raises CheckpointError when it failed."""
        if self._pending is None:
            return
        (step, job), self._pending = self._pending, None
        try:
            job.result()
        except Exception as error:
            raise self._failure(step, error) from error
        self._current = step

    def latest(self) -> int | None:
        """Newest step whose every file matches its checksum, None when there is none.

        Each newer step is named in the log, then removed (cut off while being written) or renamed
        `<step>.bad` (damaged later), so that the run can save that step again. Process 0 looks, and
        tells the others.
        """
        self.wait()
        self._current = processes.from_first(self._find_latest)
        return self._current

    def _find_latest(self) -> int | None:
        for step in reversed(_steps(self.root)):
            directory = self.root / str(step)
            if step == self._current or not (reason := damage(directory)):
                return step
            logging.warning("checkpoint %s %s; looking at the one before it", directory, reason)
            _clear(directory)
        return None

    def damaged(self) -> list[str]:
        """Names of the steps that were set aside as damaged, by this object or another."""
        return processes.from_first(lambda: sorted(p.name for p in self.root.glob("*.bad*")))

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """State and extras of one step.

        Args:
            abstract_state: tree of `jax.ShapeDtypeStruct` or arrays; arrays come back with its
                shardings (none is the first device), whatever they were saved with.
            step: None takes `latest()`.

        Returns:
            The state in the form of `abstract_state`, and the dict saved beside it.

        Raises:
            CheckpointError: no such step, a damaged one, or one of another model; the message then
                lists every array that differs.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(
                f"no whole checkpoint in {self.root}, expected <step>/{CHECKSUMS}"
            )
        directory = self.root / str(step)
        if step != self._current:
            _verify(directory)
        state = _restore(directory, abstract_state)
        self._current = step
        return state, files.read_json(directory / EXTRAS)

    def close(self) -> None:
        """Waits for the save in progress and ends the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._saver.close()

    def _commit(self, directory: epath.Path, extras: dict[str, Any]) -> None:
        """Background: the order of these lines is what makes a kill harmless."""
        self._saver.wait_until_finished()  # of all processes
        if jax.process_index() != 0:
            return
        files.write_json(directory / EXTRAS, extras)
        files.write_json(directory / CHECKSUMS, checksums(directory))
        self._drop_old()

    def _drop_old(self) -> None:
        whole = [s for s in _steps(self.root) if (self.root / str(s) / CHECKSUMS).exists()]
        for step in whole[: -self._keep]:
            if not (self._milestone_every and step % self._milestone_every == 0):
                _remove(self.root / str(step))

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """Error to raise for a failed save; what it had written is removed to free the space."""
        directory = self.root / str(step)
        if jax.process_index() == 0:
            _remove(directory)
        older = [s for s in _steps(self.root) if (self.root / str(s) / CHECKSUMS).exists()]
        kept = f"step {older[-1]} is intact" if older else "there is no earlier one"
        why = "the disk is full" if _is_full(error) else _one_line(error)
        return CheckpointError(f"checkpoint {directory} was not saved: {why}; {kept}")


def find(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """Root and step that a path names: a workdir, its `checkpoints/`, or one step in that.

    Returns:
        The folder of steps, and the step; None stands for the newest whole one.

    Raises:
        CheckpointError: nothing is there.
    """
    path = files.absolute(path)
    if path.name.isdigit() and (path / STATE).exists():
        return path.parent, int(path.name)
    for root in (path / FOLDER, path):
        if _steps(root):
            return root, None
    what = "has no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {what}, expected a workdir, its {FOLDER}/ or one step in it")


def load_params(
    path: epath.PathLike,
    names: Sequence[str | tuple[str, ...]],
    sharding: jax.sharding.Sharding | None = None,
    dtype: Callable[[str], Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Some top-level entries of a state, without knowing its model and without reading the rest.

    Changes nothing on disk, so it may read the workdir of a run that is still going.

    Args:
        path: as for `find`; for a workdir a damaged step is named in the log and passed over.
        names: entries of the state, such as "ema_params"; of a tuple the first that is there;
            none reads the extras alone.
        sharding: where every array goes; None gives numpy arrays on the host.
        dtype: type of an array by its path, as in "params/quantizer/codebook"; None as saved.

    Returns:
        {name: nested dict of arrays}, and the dict saved beside the state.

    Raises:
        CheckpointError: nothing whole is there, or the state has no such entry.
    """
    root, step = find(path)
    directory = root / str(step) if step is not None else _newest_whole(root)
    if step is not None:
        _verify(directory)
    saved = _saved_tree(directory)
    names = [_first_there(name, saved) for name in names]
    if missing := [name for name in names if name not in saved]:
        raise CheckpointError(f"{directory} has no entry {missing}, only {sorted(saved)}")
    chosen = {name: saved[name] for name in names}
    args = {
        path: _restore_args(dtype(path) if dtype else leaf.dtype, sharding)
        for path, leaf in _leaves(chosen)
    }
    args = flax.traverse_util.unflatten_dict(args, sep="/")
    trees = _read(directory, chosen, args) if names else {}
    return trees, files.read_json(directory / EXTRAS)


def _first_there(name: str | tuple[str, ...], saved: Mapping[str, Any]) -> str:
    choices = (name,) if isinstance(name, str) else name
    return next((choice for choice in choices if choice in saved), choices[0])


def restore_from(path: epath.PathLike, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """`Checkpoints.restore` of one step of another run, in which nothing changes.

    Args:
        path: as for `find`, of one step.
        abstract_state: as for `Checkpoints.restore`.

    Raises:
        CheckpointError: no such step, a damaged one, or one of another model.
    """
    root, step = find(path)
    directory = root / str(step)
    _verify(directory)
    return _restore(directory, abstract_state), files.read_json(directory / EXTRAS)


def checksums(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and CRC-32 of every file below a directory, by relative path.

    CRC-32 finds every single flipped bit, and zlib computes it faster than a disk reads.
    """
    names = sorted(str(path.relative_to(directory)) for path in _files(directory))
    names = [name for name in names if not name.startswith(CHECKSUMS)]
    with futures.ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(lambda n: _checksum(directory / n), names), strict=True))


def damage(directory: epath.Path) -> str | None:
    """What is wrong with the files of a step in a few words, None when all match."""
    if not (directory / CHECKSUMS).exists():
        return f"is incomplete (no {CHECKSUMS}: cut off or still being written)"
    try:
        expected = files.read_json(directory / CHECKSUMS)
    except ValueError:
        return f"is damaged ({CHECKSUMS} cannot be read)"
    found = checksums(directory)
    for name, want in expected.items():
        if name not in found:
            return f"is damaged ({name} is missing)"
        if found[name]["bytes"] != want["bytes"]:
            return f"is damaged ({name} has {found[name]['bytes']} bytes, not {want['bytes']})"
        if found[name] != want:
            return f"is damaged (the checksum of {name} differs)"
    return None


def _checksum(path: epath.Path) -> dict[str, Any]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _verify(directory: epath.Path) -> None:
    if not directory.exists():
        raise CheckpointError(f"no checkpoint {directory}; there: {_steps(directory.parent)}")
    if reason := processes.from_first(lambda: damage(directory)):
        raise CheckpointError(f"checkpoint {directory} {reason}; choose another step")


def _newest_whole(root: epath.Path) -> epath.Path:
    step = processes.from_first(lambda: _newest_step(root))
    if step is None:
        raise CheckpointError(f"no whole checkpoint in {root}")
    return root / str(step)


def _newest_step(root: epath.Path) -> int | None:
    for step in reversed(_steps(root)):
        if not (reason := damage(root / str(step))):
            return step
        logging.warning("checkpoint %s %s; using the one before it", root / str(step), reason)
    return None


def _steps(root: epath.Path) -> list[int]:
    """Steps that have a directory, whole or not, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def _clear(directory: epath.Path) -> None:
    """Makes way for a save: an unfinished step is removed, a finished one renamed."""
    if not (directory / CHECKSUMS).exists():
        return _remove(directory)
    target, count = directory.parent / f"{directory.name}.bad", 1
    while target.exists():
        count += 1
        target = directory.parent / f"{directory.name}.bad{count}"
    directory.rename(target)


def _remove(directory: epath.Path) -> None:
    """Deletes a step, checksums first: killed in between, what is left counts as unfinished."""
    if directory.exists():
        (directory / CHECKSUMS).unlink(missing_ok=True)
        directory.rmtree()


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of any tree, paths as in `params/quantizer/codebook` or `optimizer/0/mu/...`."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_tree(state: Any) -> dict[str, Any]:
    """Nested dicts of plain arrays: what a reader that knows none of our classes can read."""
    flat = {p: jax.random.key_data(x) if _is_key(x) else x for p, x in _leaves(state)}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _target_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding as stored; random keys are stored as their integers."""
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _restore(directory: epath.Path, abstract_state: Any) -> Any:
    paths, leaves = zip(*_leaves(abstract_state), strict=True)
    wanted = {path: _target_leaf(leaf) for path, leaf in zip(paths, leaves, strict=True)}
    _check_same(directory, wanted)
    tree = flax.traverse_util.unflatten_dict(wanted, sep="/")
    args = jax.tree.map(lambda leaf: _restore_args(leaf.dtype, leaf.sharding), tree)
    read = dict(_leaves(_read(directory, tree, args)))
    arrays = [
        _wrap_key(read[path], leaf) if _is_key(leaf) else read[path]
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays)


def _wrap_key(data: jax.Array, like: Any) -> jax.Array:
    """Typed key of the generator of `like`, which may be abstract (so its name is traced)."""
    names = []
    jax.eval_shape(lambda key: names.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(data, impl=names[0])


def _restore_args(dtype: Any, sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)


def _read(directory: epath.Path, tree: Any, restore_args: Any) -> Any:
    """Reads the arrays that `tree` names; the others of the step stay on disk."""
    args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(directory / STATE, args=args)


def _saved_tree(directory: epath.Path) -> dict[str, Any]:
    """Nested dicts of ShapeDtypeStruct: what a step holds, from its metadata alone."""
    tree = ocp.PyTreeCheckpointHandler().metadata(directory / STATE).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


# Arrays that states of earlier versions hold and later ones do without.
RETIRED = ("lecam/fake", "lecam/real")


def _check_same(directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    saved = dict(_leaves(_saved_tree(directory)))
    saved = {path: leaf for path, leaf in saved.items() if path not in RETIRED}
    differ = [
        path
        for path in sorted(saved.keys() | wanted.keys())
        if _describe(saved.get(path)) != _describe(wanted.get(path))
    ]
    if not differ:
        return
    both = saved.keys() & wanted.keys()
    if all(p in both and "/mu/" in p and saved[p].shape == wanted[p].shape for p in differ):
        types = [np.dtype(tree[differ[0]].dtype).name for tree in (saved, wanted)]
        raise CheckpointError(
            f"checkpoint {directory} keeps first moments such as {differ[0]} in {types[0]}, this"
            f" run in {types[1]}: optim.first_moment has to stay as it was"
        )
    lines = [
        f"  {path}: {_describe(saved.get(path))} in the checkpoint,"
        f" {_describe(wanted.get(path))} here"
        for path in differ
    ]
    title = f"checkpoint {directory} is of another model, {len(lines)} arrays differ:"
    raise CheckpointError("\n".join([title, *lines]))


def _describe(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "none" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is anywhere in the chain of causes."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(mark in text for mark in NO_SPACE) or _is_full(error.__cause__ or error.__context__)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
