"""Checkpoints of every format, as state dicts under the original's names, read tensor by tensor.

A path is the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a checkpoint
of ours: a workdir, its `checkpoints/` or one step.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.model_config import prior as prior_config
from gigatok_jax.model_config import tokenizer as tokenizer_config
from gigatok_jax.weights import names, orbax_file, recognise, safetensors_file, tables, torch_file
from gigatok_jax.weights.names import Promise, value_of

SAFETENSORS, CONFIG = "model.safetensors", "config.json"
WEIGHTS = {"auto": None, "ema": "ema", "raw": "model"}
MODEL_KEYS = ("model", "state_dict")  # where the original's scripts look for a trained copy
INFER = {"tokenizer": recognise.infer_tokenizer, "prior": recognise.infer_prior}
COPIES = {"model": "params/", "ema": "ema_params/"}  # in the state of our runs


class Checkpoint(NamedTuple):
    """Whatever a path holds, under the original's names; no tensor is read yet."""

    path: str
    parts: dict[str, dict[str, Promise]]  # "model", "ema", "discriminator"
    optimizers: dict[str, dict]  # "optimizer", "optimizer_disc" as PyTorch writes them
    config: dict[str, Any] | None  # of the model, when it is beside the tensors
    step: int | None
    extras: dict[str, Any]  # of our own checkpoints
    arrays: dict[str, Promise]  # the whole state of a run of ours, by path

    @property
    def kind(self) -> str:
        """A key of `recognise.MARKS`."""
        part = next(iter(self.parts.values()))
        try:
            return recognise.kind_of(part)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} {error}") from None


class Weights(NamedTuple):
    """One model of a checkpoint."""

    state: "Arrays"  # the original's names
    kind: str  # "tokenizer" or "prior"
    config: ml_collections.ConfigDict  # of the model
    extras: dict[str, Any]  # "step", "weights" ("ema" or "raw"), "tokenizer" of a prior, "path"


class Arrays(Mapping):
    """Arrays by name, each made when it is asked for, and refused when a value is not finite."""

    def __init__(self, promises: Mapping[str, Promise]):
        self.promises = promises

    def __getitem__(self, name: str) -> np.ndarray:
        return self.promises[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.promises)

    def __len__(self) -> int:
        return len(self.promises)


def read(path: epath.PathLike, weights: str = "auto", **overrides) -> Weights:
    """The weights and the config of one model.

    Args:
        path: see above.
        weights: "ema", "raw" (the trained copy), or "auto": of a tokenizer the average when it is
            there, of a prior the trained copy.
        **overrides: fields of the config in the place of what is recognised.

    Raises:
        CheckpointError: nothing there, damaged, or no tokenizer or prior that fits its config.
        ConfigError: weights that do not exist, or an override that cannot work.
    """
    found = load(path)
    model = config_of(found, **overrides)
    part = choose(found, weights)
    return Weights(
        Arrays(checked(found, part, model)),
        found.kind,
        model,
        {
            "path": str(path),
            "step": found.step,
            "weights": "ema" if part == "ema" else "raw",
            "tokenizer": found.extras.get("tokenizer", ""),
        },
    )


def choose(found: Checkpoint, weights: str) -> str:
    """The part of a checkpoint that `weights` means."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights are {weights!r}, expected one of {', '.join(WEIGHTS)}")
    there = [part for part in ("model", "ema") if part in found.parts]
    best = "ema" if found.kind == "tokenizer" else "model"
    part = WEIGHTS[weights] or (best if best in there else there[0])
    if part not in there:
        raise ConfigError(f"{found.path} has no {weights} weights, only {', '.join(there)}")
    return part


def config_of(found: Checkpoint, **overrides) -> ml_collections.ConfigDict:
    """Config of the model: what is beside its tensors, or else what they show."""
    if found.kind not in INFER:
        raise CheckpointError(f"{found.path} holds a discriminator, expected a tokenizer or prior")
    state = found.parts.get("model") or found.parts["ema"]
    try:
        if found.config is None:
            return INFER[found.kind](state, **overrides)
        fields = {name: value for name, value in found.config.items() if name != "kind"}
        if found.kind == "prior":
            return prior_config(**fields | overrides)
        return tokenizer_config(**found.config | overrides)
    except CheckpointError as error:
        raise CheckpointError(f"{found.path}: {error}") from None


def checked(found: Checkpoint, part: str, model) -> dict[str, Promise]:
    """The tensors that a config has a place for, in the original's order.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    state = found.parts[part]
    try:
        extra = recognise.check(state, model)
    except CheckpointError as error:
        raise CheckpointError(f"{found.path}: {part}: {error}") from None
    if extra:
        print(f"{found.path}: {len(extra)} tensors of {part} are left out, first {extra[0]}")
    return {name: state[name] for name in recognise.tensor_shapes(model)}


def load(path: epath.PathLike) -> Checkpoint:
    """Everything that a path holds.

    Raises:
        CheckpointError: nothing there, damaged, or nothing of GigaTok.
    """
    where = epath.Path(path).expanduser()
    if where.is_dir():
        if (where / SAFETENSORS).exists():
            return _load_safetensors(where / SAFETENSORS)
        return _load_orbax(where)
    if where.suffix == ".safetensors":
        return _load_safetensors(where)
    return _load_torch(where)


def _load_torch(path: epath.Path) -> Checkpoint:
    saved = torch_file.load(path)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} holds a {type(saved).__name__}, expected a dict of tensors")
    parts = {
        "model": next((saved[key] for key in MODEL_KEYS if key in saved), None),
        "ema": saved.get("ema"),
        "discriminator": saved.get("discriminator"),
    }
    parts = {name: part for name, part in parts.items() if isinstance(part, dict)}
    if not parts:
        parts = {"model": saved}  # a bare state dict
    optimizers = {
        name: saved[name]
        for name in ("optimizer", "optimizer_disc")
        if isinstance(saved.get(name), dict)
    }
    step = saved.get("steps", int(path.stem) if path.stem.isdecimal() else None)
    if step is not None and (type(step) is not int or not 0 <= step < 2**31):
        raise CheckpointError(f"{path}: steps is {step!r}, expected a number of updates")
    parts = {name: promised(path, part) for name, part in parts.items()}
    return Checkpoint(str(path), parts, optimizers, None, step, {}, {})


def _load_safetensors(path: epath.Path) -> Checkpoint:
    arrays, metadata = safetensors_file.load(path)
    beside = path.parent / CONFIG
    try:
        text = metadata.get("config") or (beside.read_text() if beside.exists() else "{}")
        config = json.loads(text)
        model = config.get("model")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{beside} is not the config of a model: remove it") from None
    model = model if isinstance(model, dict) and "kind" in model else None
    extras = {name: config[name] for name in ("tokenizer",) if name in config}
    part = "ema" if config.get("weights") == "ema" else "model"
    parts = {part: promised(path, arrays)}
    return Checkpoint(str(path), parts, {}, model, config.get("step"), extras, {})


def _load_orbax(path: epath.Path) -> Checkpoint:
    step = orbax_file.read(path)
    model = ml_collections.ConfigDict(step.extras["config"]["model"])
    arrays = promised(path, step.arrays)
    parts = {
        part: names.tensors(copy | _history(arrays, model, part), tables.entries(model))
        for part, prefix in COPIES.items()
        if (copy := names.below(arrays, prefix))
    }
    if not parts:
        raise CheckpointError(f"{path} has no entry params or ema_params")
    number = step.extras["step"]
    return Checkpoint(str(path), parts, {}, model.to_dict(), number, step.extras, arrays)


def _history(arrays: Mapping[str, Promise], model, part: str) -> dict[str, Promise]:
    """The latest codes, which the original keeps in the model; its average never gets any."""
    if model.kind == "prior":
        return {}
    if part == "model" and "codebook_used" in arrays:
        return {tables.USED: arrays["codebook_used"]}
    shape = (tables.HISTORY,)
    return {tables.USED: Promise(shape, np.dtype("f4"), lambda: np.zeros(shape, np.float32))}


def promised(path: epath.PathLike, state: Mapping[str, Any]) -> dict[str, Promise]:
    """Promises that refuse values that are not finite, by name."""
    try:
        recognise.seen(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None

    def reader(name: str, tensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            array = value_of(tensor)
            if reason := recognise.not_finite(name, array):
                raise CheckpointError(f"{path}: {reason}")
            return array

        return read

    return {
        name: Promise(
            tuple(tensor.shape),
            np.dtype(tensor.dtype),
            reader(name, tensor),
            getattr(tensor, "order", 0),
        )
        for name, tensor in state.items()
    }


# Writing.


def write_safetensors(
    path: epath.PathLike,
    state: Mapping[str, np.ndarray | Promise],
    model,
    progress: Callable[[int], None] | None = None,
    **extras,
) -> None:
    """A `.safetensors` under the original's names, and `config.json` beside it.

    Args:
        path: of the file; it and `config.json` are whole or not there.
        state: tensors or promises by the original's names.
        model: config.
        progress: called with the bytes of each tensor once it is written.
        **extras: JSON values for `config.json`: step, weights, tokenizer, ...

    Raises:
        CheckpointError: a `config.json` of another model lies there already.
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
    path: epath.PathLike,
    saved: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
) -> None:
    """A file that `torch.load(weights_only=True)` reads, whole or not there; see `torch_file`."""
    with draft(epath.Path(path).expanduser()) as at:
        torch_file.save(at, dict(saved), progress)


@contextlib.contextmanager
def draft(path: epath.Path) -> Iterator[epath.Path]:
    """A name to write to, which becomes `path` when all went well and disappears otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at = path.parent / f"{path.name}.draft"
    try:
        yield at
        at.replace(path)
    finally:
        if at.is_dir():
            at.rmtree()
        at.unlink(missing_ok=True)
