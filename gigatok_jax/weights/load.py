"""What is on disk, loaded and saved; the only way from the rest of the package to `conversion`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.model_config import family
from gigatok_jax.run import checkpoint
from gigatok_jax.weights import card, names, read, recognise, tables
from gigatok_jax.weights.frozen import available, frozen_shapes, load_frozen

__all__ = ["Loaded", "available", "frozen_shapes", "load_frozen", "load_model", "save_model"]

CARD = "README.md"
BEST = {"tokenizer": ("ema_params", "params"), "prior": ("params", "ema_params")}
ENTRIES = {"ema": ("ema_params",), "raw": ("params",)}


class Loaded(NamedTuple):
    params: dict[str, Any]  # nested, on the devices
    config: ml_collections.ConfigDict  # of the model
    about: dict[str, Any]  # JSON values: step, training, and of a prior tokenizer, class_names


def load_model(
    path: epath.PathLike,
    kind: str,
    weights: str,
    dtype: Callable[[str], Any],
    sharding: jax.sharding.Sharding | None,
) -> Loaded:
    """A tokenizer or a prior of any format, its arrays placed one after the other.

    Args:
        path: the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a
            checkpoint of a run: its workdir, its checkpoints/ or one step.
        kind: "tokenizer" or "prior".
        weights: "ema", "raw" (the trained copy), or "auto": of a tokenizer the average when it is
            there, of a prior the trained copy.
        dtype: type of a parameter by its path, as in "quantizer/codebook".
        sharding: where parameters go; None is the default device.

    Raises:
        ConfigError: no path, unknown weights, or a sharding that a parameter does not fit.
        CheckpointError: nothing there, damaged, or of another kind.
    """
    if not path:
        raise ConfigError(
            "no checkpoint is named: give a workdir, its checkpoints/ or one step, a .pt, a"
            " .safetensors or a folder with model.safetensors"
        )
    where = epath.Path(path).expanduser()
    in_file = where.suffix in (".pt", ".safetensors") or where.is_file()
    if in_file or (where / read.SAFETENSORS).exists():
        return _load_state(where, kind, weights, dtype, sharding)
    return _load_run(where, kind, weights, dtype, sharding)


def _load_run(path: epath.Path, kind: str, weights: str, dtype, sharding) -> Loaded:
    """From a checkpoint of a run; Orbax reads into the sharding and type."""
    names_of = {"auto": BEST[kind]} | ENTRIES
    if weights not in names_of:
        raise ConfigError(f"weights are {weights!r}, expected one of {', '.join(names_of)}")

    def type_of(path: str):
        return dtype(path.partition("/")[2])  # without the name of the entry

    trees, extras = checkpoint.load_params(path, (names_of[weights],), sharding, type_of)
    ((name, tree),) = trees.items()
    if "model" not in extras.get("config", {}):
        raise CheckpointError(f"{path} has no config of a model beside its arrays: is it of a run?")
    config = ml_collections.ConfigDict(extras["config"]["model"])
    _check_kind(path, family(config), kind)
    if sharding is None:
        tree = _moved(tree)
    run = {key: value for key, value in extras["config"].items() if key != "model"}
    training = {"weights": "ema" if name == "ema_params" else "raw"}
    training |= {"config": card.without_places(run)} if run else {}
    if "data" in extras:
        training["data"] = extras["data"]
    return Loaded(tree, config, _about(extras) | {"training": training})


def _moved(tree: dict) -> dict:
    """Numpy arrays to the default device, each let go of once it is there."""
    return {
        name: _moved(value) if isinstance(value, dict) else _placed(name, value, value.dtype, None)
        for name, value in ((name, tree.pop(name)) for name in list(tree))
    }


def _load_state(path: epath.Path, kind: str, weights: str, dtype, sharding) -> Loaded:
    """From a state dict under the original's names, which is mapped rather than read."""
    found = read.read(path, weights)
    _check_kind(path, found.kind, kind)
    leaves = names.leaves(found.state.promises, tables.entries(found.config))
    params: dict[str, Any] = {}
    for name, leaf in leaves.items():
        names.set_path(params, name, _placed(name, leaf.read(), dtype(name), sharding))
    beside = path / read.CONFIG if path.is_dir() else path.parent / read.CONFIG
    is_ours = path.suffix != ".pt" and beside.exists()
    about = _about(files.read_json(beside) if is_ours else {})
    known = {name: found.extras[name] for name in ("step", "tokenizer")}
    about |= {name: value for name, value in known.items() if value not in (None, "")}
    about["training"].setdefault("weights", found.extras["weights"])
    return Loaded(params, found.config, about)


def _check_kind(path: epath.Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(f"{path} holds a {found}, expected a {expected}")


def _about(saved: dict[str, Any]) -> dict[str, Any]:
    """What our files say of a model beside its config."""
    return {
        "step": saved.get("step"),
        "training": dict(saved.get("training") or {}),
        "tokenizer": saved.get("tokenizer") or "",
        "class_names": tuple(saved.get("class_names") or ()),
    }


def _placed(name: str, array: np.ndarray, dtype, sharding) -> jax.Array:
    """One parameter where it shall be; returns once it is there, so that the host may forget it."""
    array = array.astype(dtype, copy=False)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    try:
        sharding.check_compatible_aval(array.shape)
        sharding.shard_shape(array.shape)
    except ValueError:
        raise ConfigError(f"{name} {list(array.shape)} cannot be divided as {sharding}") from None
    placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.block_until_ready(placed)


def save_model(
    folder: epath.PathLike, params: dict[str, Any], config, about: dict[str, Any], licence: str
) -> None:
    """Writes `model.safetensors` in the original's names, `config.json` and `README.md`.

    Args:
        folder: made when missing.
        params: nested dict of arrays, each fetched when it is written.
        config: of the model.
        about: as in `Loaded`.
        licence: of the weights, for the head of the card.

    Raises:
        CheckpointError: the folder holds another model, or cannot be written.
    """
    folder, config = epath.Path(folder).expanduser(), ml_collections.ConfigDict(config)
    flat = tables.flatten(params)
    if config.kind != "prior" and tables.USED not in flat:
        flat[tables.USED] = np.zeros(tables.HISTORY, np.float32)  # what the original starts from
    entries = tables.entries(config)
    if missing := [entry.path for entry in entries if entry.path not in flat]:
        raise CheckpointError(f"the parameters have no {missing[0]}, which their config demands")
    extras = {name: value for name, value in about.items() if value not in (None, "", (), {})}
    readme = card.text(config, params, extras, recognise.published_name(config), licence)
    state = names.tensors(flat, entries)
    try:
        read.write_safetensors(folder / read.SAFETENSORS, state, config, **extras)
        files.write_bytes(folder / CARD, readme.encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None
