"""Writes weights under the original's names; a file appears whole or not at all."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import files, trees
from gigatok_jax.errors import CheckpointError
from gigatok_jax.weights import card, names, recognise, safetensors_file, tables, torch_file
from gigatok_jax.weights.names import Promise
from gigatok_jax.weights.read import CONFIG, SAFETENSORS

CARD = "README.md"


def save_model(
    folder: epath.PathLike,
    params: dict[str, Any],
    config: ml_collections.ConfigDict,
    about: dict[str, Any],
    licence: str,
) -> None:
    """Writes a model to a folder: `model.safetensors`, `config.json` and a card `README.md`.

    Args:
        folder: path of the folder, created when missing.
        params: nested dict of arrays, each fetched when it is written.
        config: config of the model.
        about: JSON values: step, training, and of a prior tokenizer and class_names.
        licence: identifier for the head of the card, such as "mit".

    Raises:
        CheckpointError: the folder holds another model, or cannot be written.
    """
    folder, config = epath.Path(folder).expanduser(), ml_collections.ConfigDict(config)
    flat = trees.flatten(params)
    if config.kind != "prior" and tables.USED not in flat:
        flat[tables.USED] = np.zeros(tables.HISTORY, np.float32)  # what the original starts from
    entries = tables.entries(config)
    if missing := [entry.path for entry in entries if entry.path not in flat]:
        raise CheckpointError(f"the parameters have no {missing[0]}, which their config demands")
    extras = {name: value for name, value in about.items() if value not in (None, "", (), {})}
    readme = card.text(config, params, extras, recognise.published_name(config), licence)
    state = names.tensors(flat, entries)
    try:
        write_safetensors(folder / SAFETENSORS, state, config, **extras)
        files.write_bytes(folder / CARD, readme.encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from None


def write_safetensors(
    path: epath.PathLike,
    state: Mapping[str, np.ndarray | Promise],
    model: ml_collections.ConfigDict,
    progress: Callable[[int], None] | None = None,
    **extras,
) -> None:
    """Writes weights to a `.safetensors` under the original's names, and `config.json` beside it.

    Args:
        path: path of the `.safetensors`.
        state: arrays or promises of them, by the original's names.
        model: config of the model.
        progress: called with the number of bytes of each tensor once it is written.
        **extras: JSON values for `config.json`: step, weights, tokenizer, ...

    Raises:
        CheckpointError: the folder has a `config.json` of another model.
    """
    path = epath.Path(path).expanduser()
    config = {"model": ml_collections.ConfigDict(model).to_dict(), **extras}
    beside = path.parent / CONFIG
    if beside.exists() and files.read_json(beside) != config:
        raise CheckpointError(f"{beside} belongs to another model: choose another folder")
    with draft(path) as at:
        safetensors_file.save(at, state, {"config": json.dumps(config)}, progress)
    files.write_json(beside, config)


def write_pt(
    path: epath.PathLike, saved: Mapping[str, Any], progress: Callable[[int], None] | None = None
) -> None:
    """Writes a dict of arrays, promises and plain values to a file for `torch.load`.

    The file appears whole or not at all; see `torch_file.save`.
    """
    with draft(epath.Path(path).expanduser()) as at:
        torch_file.save(at, dict(saved), progress)


@contextlib.contextmanager
def draft(path: epath.Path) -> Iterator[epath.Path]:
    """Yields the path of a draft, which becomes `path` at the end or is removed on an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at = path.parent / f"{path.name}.draft"
    try:
        yield at
        at.replace(path)
    finally:
        if at.is_dir():
            at.rmtree()
        at.unlink(missing_ok=True)
