"""Checks and writes the files that say what run a folder holds: its config and environment."""

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
import ml_collections
from absl import logging
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import ConfigError
from gigatok_jax.run import checkpoint, command_line, processes

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy"),
    *(
        "ml_collections",
        "ml_dtypes",
        "safetensors",
        "clu",
        "pillow",
        "scikit-learn",
        "tensorboardX",
    ),
)
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS")
PLACEMENT = "placement.txt"  # file that says where the arrays of a state lie

# Keys that do not define a run: they set its length, its output, its machines or its paths.
FREE_KEYS = (
    "batch",
    "cluster",
    "checkpoint",  # may move like data.folder; its fingerprint is compared too
    "codes",
    "data.eval_folder",
    "data.folder",  # images may move; a checkpoint has their fingerprint, which shows changes
    "data.max_unreadable",
    "data.workers",
    "eval",
    "eval_codes",
    "image_ids",  # a generation may be continued with any images
    "log",
    "mesh",
    "num_images",
    "profile",
    "sample",
    "save",
    "stages",  # stages of the demo, each with a folder and a config of its own
    "tokenizer",
    "train.ema_memory",
    "train.epochs",
    "train.micro_batches",  # follows the memory of the machine
    "train.remat",
    "train.steps",
    "train.unroll",
    "weights",
)
FREE_IN_TASK = {"train_prior": ("cfg",)}  # guidance of the pictures along the way

# Keys that configs of earlier versions have, with the only value that this version can continue;
# None stands for any value.
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


def claim(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Checks the folder of a run, and writes `config.json` and `environment.json` there.

    Called once everything that the config names exists.

    Raises:
        ConfigError: the workdir belongs to a run of another config.
    """
    begun = processes.from_first(lambda: _has_begun(workdir))
    check_workdir(workdir, config, begun)
    write_environment(workdir)


def _has_begun(workdir: epath.Path) -> bool:
    """Returns whether a workdir has more files than a run that failed before its first step."""
    early = ("config.json", "environment.json", PLACEMENT, checkpoint.FOLDER)
    later = (path for path in workdir.glob("*") if path.name not in early)
    return any(later) or any((workdir / checkpoint.FOLDER).glob("*"))


def check_workdir(workdir: epath.PathLike, config: Any, begun: bool = True) -> None:
    """Writes `config.json`, unless the workdir belongs to a run of another config.

    Keys of `FREE_KEYS` and `FREE_IN_TASK`, and all below them, may differ. This version may have
    new keys, and may lack those of `RETIRED`. The file then takes the new values.

    Args:
        workdir: folder of the run, created if missing.
        config: ConfigDict or nested dict of JSON values.
        begun: whether the run has results to continue; if not, any config of its task may follow.

    Raises:
        ConfigError: the task or other keys differ, which the error names with both values; or the
            earlier run used something that this version lacks; or `config.json` is damaged.
    """
    workdir = files.absolute(workdir)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    new = json.loads(json.dumps(config))  # tuples become lists, as in the file
    path = workdir / "config.json"
    if path.exists():
        old = _read_config(path)
        if old.get("task") != new.get("task"):
            raise ConfigError(
                f"workdir {workdir} holds a run of task {old.get('task')!r}, this is"
                f" {new.get('task')!r}: choose another --workdir"
            )
        if begun:
            _compare_configs(workdir, old, new)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, new)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}): remove it if this config is that run's, or choose"
            " another --workdir"
        ) from error


def _compare_configs(workdir: epath.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = dict(command_line.flatten(old)), dict(command_line.flatten(new))
    _check_retired(workdir, before)
    if added := sorted(now.keys() - before.keys()):  # keys of a later version
        values = ", ".join(f"{key}={now[key]!r}" for key in added)
        logging.warning("the config of %s does not have %s yet", workdir, values)
    free = (*FREE_KEYS, *FREE_IN_TASK.get(new.get("task"), ()), *RETIRED)
    changed = [
        f"{key} is {now.get(key)!r} here and {before[key]!r} there"
        for key in sorted(before)
        if before[key] != now.get(key) and not f"{key}.".startswith(tuple(f"{f}." for f in free))
    ]
    if changed:
        raise ConfigError(
            f"workdir {workdir} holds a run of another config: {'; '.join(changed)};"
            " choose another --workdir"
        )


def _check_retired(workdir: epath.Path, before: dict[str, Any]) -> None:
    """Raises ConfigError if a run used something which this version lacks."""
    for key, value in RETIRED.items():
        if value is not None and before.get(key, value) != value:
            raise ConfigError(
                f"workdir {workdir} holds a run with {key}={before[key]!r}, which this version has"
                " no longer: resume it with the version that began it, or choose another --workdir"
            )


def write_environment(workdir: epath.PathLike) -> None:
    """Writes `environment.json` (machine and software) into a workdir, from process 0 alone."""
    if jax.process_index() == 0:
        files.write_json(epath.Path(workdir) / "environment.json", describe())


def describe() -> dict[str, Any]:
    """Returns command, commit, versions, flags, devices as JSON values; starts the jax backend."""
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
    """Returns commit, versions and flags, which have to be the same for all processes of a run."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "flags": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """Returns the commit of the checkout that holds this package, or None without a checkout.

    "+changes" follows the commit if tracked files differ from it.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package, maybe in another repository
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
