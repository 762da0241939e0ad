"""Saves and restores a run's checkpoints: Orbax arrays, a JSON file of the rest, and checksums.

    checkpoints/<step>/state/            arrays, one Orbax tree of nested dicts
    checkpoints/<step>/extras.json       step, data position, config
    checkpoints/<step>/CHECKSUMS.json    size and CRC-32 of every file above, written last

A step counts only once its checksums are written, and older steps are removed only after that, so
a run that is killed at any moment loses nothing but the time since its last save.
"""

import errno
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from gigatok_jax import files, trees
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.run import processes

FOLDER, STATE, EXTRAS, CHECKSUMS = "checkpoints", "state", "extras.json", "CHECKSUMS.json"
READERS = 8  # threads that read files for their checksums
BLOCK = 1 << 24  # bytes of a file read at a time
NO_SPACE = ("no space left", "resource_exhausted", "disk quota")  # TensorStore sets no errno
# Arrays that states of earlier versions hold and later ones do without.
RETIRED = ("lecam/fake", "lecam/real")


class Checkpoints:
    """Store of one run's checkpoints: saves and restores steps, and alone writes `checkpoints/`."""

    def __init__(self, workdir: epath.PathLike, keep: int = 3, milestone_every: int = 0):
        """Opens the folder `<workdir>/checkpoints`, which is created if missing.

        Args:
            workdir: folder of the run.
            keep: number of newest steps that are kept, at least 1.
            milestone_every: steps that are multiples of this number are kept for ever; 0 is none.

        Raises:
            ConfigError: `keep` is below 1.
        """
        if keep < 1:
            raise ConfigError(f"save.keep is {keep}, expected at least 1")
        self.root = files.absolute(workdir) / FOLDER
        self.root.mkdir(parents=True, exist_ok=True)
        self._keep, self._milestone_every = keep, milestone_every
        # Compression would save a tenth of the space of float32 weights at half the speed.
        self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, futures.Future] | None = None
        self._current: int | None = None  # step that this object has verified or written

    def save(self, step: int, state: Any, extras: Mapping[str, Any]) -> None:
        """Starts to save a step; returns as soon as the arrays of the state may be donated.

        Waits first for the save in progress, so that saves do not overlap. Does nothing for a step
        that this object has just saved, restored or found whole.

        Args:
            step: number of optimizer updates done.
            state: tree of jax arrays, of any sharding, and typed random keys.
            extras: JSON values for extras.json, which also gets `step`.

        Raises:
            CheckpointError: the previous save failed, or this save cannot be started.
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
        """Waits for the save in progress; raises CheckpointError if that save failed."""
        if self._pending is None:
            return
        (step, job), self._pending = self._pending, None
        try:
            job.result()
        except Exception as error:
            raise self._failure(step, error) from error
        self._current = step

    def latest(self) -> int | None:
        """Returns the newest step whose every file matches its checksum, or None if no step does.

        Newer steps are named in the log, then removed (cut off while being written) or renamed
        `<step>.bad` (damaged later), so that the run can save these steps again. Process 0 reads
        the files and sends the answer to the other processes.
        """
        self.wait()
        self._current = processes.from_first(
            lambda: _newest(self.root, current=self._current, clear=True)
        )
        return self._current

    def damaged(self) -> list[str]:
        """Returns the names of damaged steps' folders that were set aside, such as `<step>.bad`."""
        return processes.from_first(lambda: sorted(p.name for p in self.root.glob("*.bad*")))

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads the state of a saved step, and its extras: the JSON values saved beside the state.

        Args:
            abstract_state: tree of `jax.ShapeDtypeStruct` or arrays. Its shardings hold for the
                result, whatever the sharding of the save; without a sharding an array
                lies on the first device.
            step: number of the step; None is `latest()`.

        Returns:
            The state in the form of `abstract_state`, and the content of extras.json.

        Raises:
            CheckpointError: the step is missing, damaged or of another model; the message then
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
        """Waits for the save in progress, and ends the threads that write checkpoints."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._saver.close()

    def _commit(self, directory: epath.Path, extras: dict[str, Any]) -> None:
        """Completes a save in the background: writes extras and checksums, removes old steps.

        A kill between any two lines of this method is harmless.
        """
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
        """Removes the files of a failed save to free their space; returns the error to raise."""
        directory = self.root / str(step)
        if jax.process_index() == 0:
            _remove(directory)
        older = [s for s in _steps(self.root) if (self.root / str(s) / CHECKSUMS).exists()]
        kept = f"step {older[-1]} is intact" if older else "there is no earlier checkpoint"
        first = next(iter(str(error).splitlines()), "")
        why = "the disk is full" if _is_full(error) else f"{type(error).__name__}: {first}"
        return CheckpointError(f"checkpoint {directory} was not saved: {why}; {kept}")


def find(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """Finds the checkpoints that a path names: a workdir, its `checkpoints/`, or a step in it.

    Returns:
        The folder of steps, and the step if the path names one.

    Raises:
        CheckpointError: the path does not exist or holds no checkpoint.
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
    """Reads chosen top-level entries of a saved state; the model of the state need not be known.

    Nothing changes on disk, so the path may be the workdir of a run in progress.

    Args:
        path: workdir, its `checkpoints/` or one step in it; damaged steps of a workdir are named in
            the log and passed over.
        names: entries of the state, such as "ema_params". A tuple stands for the first of its
            entries that exists. An empty sequence reads the extras alone.
        sharding: sharding of every array; None gives numpy arrays on the host.
        dtype: function of an array's path, such as "params/quantizer/codebook", that gives its
            type; None keeps the types of the save.

    Returns:
        {name: nested dict of arrays}, and the content of extras.json.

    Raises:
        CheckpointError: there is no whole step, or the state has no such entry.
    """
    directory = _whole_step(path)
    saved = _saved_tree(directory)
    choices = [(name,) if isinstance(name, str) else name for name in names]
    names = [next((name for name in some if name in saved), some[0]) for some in choices]
    if missing := [name for name in names if name not in saved]:
        raise CheckpointError(f"{directory} has no entry {missing}, only {sorted(saved)}")
    chosen = {name: saved[name] for name in names}
    args = {
        path: _restore_args(dtype(path) if dtype else leaf.dtype, sharding)
        for path, leaf in trees.flatten(chosen).items()
    }
    read = _read(directory, chosen, trees.unflatten(args)) if names else {}
    return read, files.read_json(directory / EXTRAS)


def restore_from(path: epath.PathLike, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the state and the extras of a step of another run, and changes nothing on disk.

    Args:
        path: workdir, its `checkpoints/` or one step in it; without a step, the newest whole step.
        abstract_state: tree of `jax.ShapeDtypeStruct` or arrays, whose form and shardings the
            restored state gets.

    Raises:
        CheckpointError: the step is missing, damaged or of another model.
    """
    directory = _whole_step(path)
    return _restore(directory, abstract_state), files.read_json(directory / EXTRAS)


def _whole_step(path: epath.PathLike) -> epath.Path:
    """Returns the folder of the step that a path names, or of the newest whole step in it."""
    root, step = find(path)
    if step is not None:
        _verify(root / str(step))
        return root / str(step)
    if (step := processes.from_first(lambda: _newest(root))) is None:
        raise CheckpointError(f"no whole checkpoint in {root}")
    return root / str(step)


def checksums(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """Returns the number of bytes and the CRC-32 of each file below a directory, by relative path.

    CRC-32 detects every single flipped bit, and zlib computes it faster than a disk reads.
    """
    names = sorted(str(path.relative_to(directory)) for path in _files(directory))
    names = [name for name in names if not name.startswith(CHECKSUMS)]
    with futures.ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(lambda n: _checksum(directory / n), names), strict=True))


def damage(directory: epath.Path) -> str | None:
    """Says in a few words what is wrong with the files of a step; returns None if all match."""
    if not (directory / CHECKSUMS).exists():
        return f"is incomplete (no {CHECKSUMS}: cut off or still being written)"
    try:
        expected = files.read_json(directory / CHECKSUMS)
    except ValueError:
        return f"is damaged ({CHECKSUMS} cannot be read)"
    actual = checksums(directory)
    for name, want in expected.items():
        if name not in actual:
            return f"is damaged ({name} is missing)"
        if actual[name]["bytes"] != want["bytes"]:
            return f"is damaged ({name} has {actual[name]['bytes']} bytes, not {want['bytes']})"
        if actual[name] != want:
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
        raise CheckpointError(f"no checkpoint {directory}; its run has {_steps(directory.parent)}")
    if reason := processes.from_first(lambda: damage(directory)):
        raise CheckpointError(f"checkpoint {directory} {reason}; choose another step")


def _newest(root: epath.Path, *, current: int | None = None, clear: bool = False) -> int | None:
    """Returns the newest step that is `current` or whole, or None.

    `clear` removes or renames the newer steps, which are damaged, so that they can be saved again.
    """
    for step in reversed(_steps(root)):
        directory = root / str(step)
        if step == current or not (reason := damage(directory)):
            return step
        logging.warning("checkpoint %s %s; looking at the one before it", directory, reason)
        if clear:
            _clear(directory)
    return None


def _steps(root: epath.Path) -> list[int]:
    """Returns the numbers of all steps that have a folder, whole or not, in ascending order."""
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def _clear(directory: epath.Path) -> None:
    """Makes way for a save: removes the folder of an unfinished step, renames a finished step."""
    if not (directory / CHECKSUMS).exists():
        return _remove(directory)
    target, count = directory.parent / f"{directory.name}.bad", 1
    while target.exists():
        count += 1
        target = directory.parent / f"{directory.name}.bad{count}"
    directory.rename(target)


def _remove(directory: epath.Path) -> None:
    """Deletes a step, its checksums first, so that after a kill the rest counts as unfinished."""
    if directory.exists():
        (directory / CHECKSUMS).unlink(missing_ok=True)
        directory.rmtree()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_tree(state: Any) -> dict[str, Any]:
    """Converts a state to nested dicts of arrays, which can be read without the state's classes.

    Typed random keys become integers.
    """
    plain = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)
    return trees.unflatten(trees.flatten(plain))


def _target_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the stored shape, dtype and sharding of a leaf of a state.

    Random keys are stored as integers; a leaf without a sharding goes to the first device.
    """
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _restore(directory: epath.Path, abstract_state: Any) -> Any:
    leaves = trees.flatten(abstract_state)
    wanted = {path: _target_leaf(leaf) for path, leaf in leaves.items()}
    _check_same(directory, wanted)
    tree = trees.unflatten(wanted)
    args = jax.tree.map(lambda leaf: _restore_args(leaf.dtype, leaf.sharding), tree)
    read = trees.flatten(_read(directory, tree, args))
    arrays = [
        _wrap_key(read[path], leaf) if _is_key(leaf) else read[path]
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays)


def _wrap_key(data: jax.Array, like: Any) -> jax.Array:
    """Makes a typed random key from stored integers.

    The key has the generator of the key `like`, which may be abstract.
    """
    names = []
    jax.eval_shape(lambda key: names.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(data, impl=names[0])


def _restore_args(dtype: Any, sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype)


def _read(directory: epath.Path, tree: Any, restore_args: Any) -> Any:
    """Reads from a step the arrays that `tree` names, which may be some of the step's arrays."""
    args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(directory / STATE, args=args)


def _saved_tree(directory: epath.Path) -> dict[str, Any]:
    """Reads the shapes and types of a step's arrays from its metadata, as nested dicts."""
    tree = ocp.PyTreeCheckpointHandler().metadata(directory / STATE).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _check_same(directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    saved = trees.flatten(_saved_tree(directory))
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
    """Returns whether a full disk, or a full quota, is among the causes of an error."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(mark in text for mark in NO_SPACE) or _is_full(error.__cause__ or error.__context__)
