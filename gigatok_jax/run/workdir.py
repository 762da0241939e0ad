"""The folder of a run: whose it is, and what the run ran on."""

import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
from absl import logging
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import ConfigError
from gigatok_jax.run import checkpoint, command_line, processes

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy"),
    *("ml_collections", "pillow", "scikit-learn", "tensorboardX"),
)
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS")
PLACEMENT = "placement.txt"  # of the arrays of a state on several devices

# Keys that do not define a run: its length, what it prints and keeps, where and on what it runs.
FREE_KEYS = (
    "batch",
    "cluster",
    "checkpoint",  # so may what was trained before; its fingerprint is kept too
    "codes",
    "data.eval_folder",
    "data.folder",  # images may move; the data fingerprint in the checkpoint tells if they changed
    "data.max_unreadable",
    "data.workers",
    "eval",
    "eval_codes",
    "image_ids",  # any images of a generation may be made, or more of them
    "log",
    "mesh",
    "num_images",
    "profile",
    "sample",
    "save",
    "stages",  # of the demo: each has a folder and a config of its own
    "tokenizer",
    "train.ema_memory",
    "train.epochs",
    "train.micro_batches",  # follows the memory of the machine
    "train.remat",
    "train.steps",
    "train.unroll",
    "weights",
)


FREE_IN_TASK = {"train_prior": ("cfg",)}  # the guidance of pictures along the way
# Keys that configs of earlier versions have, with the value that this version computes for; of
# None any value will do.
RETIRED = {
    "loss.entropy_end": 0,
    "loss.lecam": 0.0,
    "loss.reconstruction_type": "l2",
    "sample.cfg_end": None,
    "sample.cfg_interval": None,
    "sample.cfg_scale": None,
    "sample.cfg_schedule": None,
    "sample.cfg_start": None,
}


def claim(workdir: epath.Path, config) -> None:
    """Writes what a run is and runs on, once all that its config names has been found.

    Raises:
        ConfigError: the workdir belongs to a run of another config.
    """
    begun = processes.from_first(lambda: _has_begun(workdir))
    check_workdir(workdir, config, begun)
    write_environment(workdir)


def _has_begun(workdir: epath.Path) -> bool:
    """Whether there is more than a run leaves that fails before its first step."""
    left = ("config.json", "environment.json", PLACEMENT, checkpoint.FOLDER)
    others = (path for path in workdir.glob("*") if path.name not in left)
    return any(others) or any((workdir / checkpoint.FOLDER).glob("*"))


def check_workdir(workdir: epath.PathLike, config: Any, begun: bool = True) -> None:
    """Writes `config.json`, or refuses a workdir that belongs to a run of another config.

    Keys of `FREE_KEYS`, and all below them, may differ, and this version may have more keys or, by
    `RETIRED`, fewer; the file then takes the new values.

    Args:
        workdir: made when missing.
        config: ConfigDict or nested dict of JSON values.
        begun: False for a run of this task that has left nothing to go on with: any config will do.

    Raises:
        ConfigError: other keys differ; each is named with both values.
    """
    workdir = files.absolute(workdir)
    given = json.loads(json.dumps(_plain(config)))  # tuples become lists, as in the file
    path = workdir / "config.json"
    if path.exists():
        there = _read_config(path)
        _compare_tasks(workdir, there.get("task"), given.get("task"))
        if begun:
            _compare_configs(workdir, there, given)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, given)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}): remove it if this config is that run's, or choose"
            " another --workdir"
        ) from error


def _compare_tasks(workdir: epath.Path, old: str | None, new: str | None) -> None:
    if old != new:
        raise ConfigError(
            f"workdir {workdir} holds a run of task {old!r}, this is {new!r}: choose another"
            " --workdir"
        )


def _compare_configs(workdir: epath.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = dict(command_line.flatten(old)), dict(command_line.flatten(new))
    _check_retired(workdir, before)
    if added := sorted(now.keys() - before.keys()):  # by a later version; the run goes on with it
        values = ", ".join(f"{key}={now[key]!r}" for key in added)
        logging.warning("the config of %s does not have %s yet", workdir, values)
    free = (*FREE_KEYS, *FREE_IN_TASK.get(new.get("task"), ()), *RETIRED)
    changed = [
        f"{key} is {now.get(key)!r} here and {before[key]!r} there"
        for key in sorted(before)
        if before[key] != now.get(key) and not _is_below(key, free)
    ]
    if changed:
        raise ConfigError(
            f"workdir {workdir} holds a run of another config: {'; '.join(changed)};"
            " choose another --workdir"
        )


def _check_retired(workdir: epath.Path, before: dict[str, Any]) -> None:
    """Refuses a run that an earlier version computed as this one cannot."""
    for key, value in RETIRED.items():
        if value is not None and before.get(key, value) != value:
            raise ConfigError(
                f"workdir {workdir} holds a run with {key}={before[key]!r}, which this version has"
                f" no longer: resume it with the version that began it, or choose another --workdir"
            )


def _is_below(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the names or lies below it."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _plain(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def write_environment(workdir: epath.PathLike) -> None:
    """Writes `environment.json` into an existing workdir, from process 0 alone."""
    if jax.process_index() == 0:
        files.write_json(epath.Path(workdir) / "environment.json", describe())


def describe() -> dict[str, Any]:
    """Commit, command, versions, devices and flags as JSON values; starts the jax backend."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        **software(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": dict(kinds),
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
    }


def software() -> dict[str, Any]:
    """Commit, versions and flags: what all processes of a run have in common."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "flags": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """Commit of the checkout that holds this package, "+changes" when files differ from it."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, or inside somebody else's repository
        return None
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changes else head


def _git(root: pathlib.Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
