"""What a run ran on, so that its numbers can be explained later."""

import collections
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
from etils import epath

from gigatok_jax import files

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy"),
    *("ml_collections", "pillow", "scikit-learn", "tensorboardX"),
)
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS")


def write(workdir: epath.PathLike) -> None:
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
