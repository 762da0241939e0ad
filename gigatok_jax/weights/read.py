"""Opens checkpoints of every format as state dicts of the original, read tensor by tensor.

A path is the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a checkpoint
of ours: a workdir, its `checkpoints/` or one step.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import trees
from gigatok_jax.errors import CheckpointError, ConfigError, one_of
from gigatok_jax.model_config import family
from gigatok_jax.model_config import prior as prior_config
from gigatok_jax.model_config import tokenizer as tokenizer_config
from gigatok_jax.run import checkpoint
from gigatok_jax.weights import (
    card,
    names,
    orbax_file,
    recognise,
    safetensors_file,
    tables,
    torch_file,
)
from gigatok_jax.weights.names import Promise, value_of

SAFETENSORS, CONFIG = "model.safetensors", "config.json"
WEIGHTS = ("auto", "ema", "raw")
MODEL_KEYS = ("model", "state_dict")  # where the original's scripts look for a trained copy
INFER = {"tokenizer": recognise.infer_tokenizer, "prior": recognise.infer_prior}
COPIES = {"model": "params", "ema": "ema_params"}  # in the state of our runs


class Checkpoint(NamedTuple):
    """Record of an opened checkpoint, under the original's names; no tensor is read yet."""

    path: str
    parts: dict[str, dict[str, Promise]]  # "model", "ema", "discriminator"
    optimizers: dict[str, dict]  # "optimizer", "optimizer_disc" as PyTorch writes them
    config: dict[str, Any] | None  # of the model, when it is beside the tensors
    step: int | None
    extras: dict[str, Any]  # JSON values that our files keep beside the tensors
    arrays: dict[str, Promise]  # the whole state of a run of ours, by path

    @property
    def kind(self) -> str:
        """Kind of the model in a checkpoint: "tokenizer", "prior", "patchgan" or "dino"."""
        part = next(iter(self.parts.values()))
        try:
            return recognise.kind_of(part)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} {error}") from None


class Loaded(NamedTuple):
    """Record of a loaded model: parameters on their devices, config, and facts about training."""

    params: dict[str, Any]  # nested
    config: ml_collections.ConfigDict  # of the model
    about: dict[str, Any]  # JSON values: step, training, and of a prior tokenizer, class_names


class Weights(NamedTuple):
    """Record of one copy of a model's weights, which are read when looked up, and of its config."""

    state: "Arrays"  # the original's names
    kind: str  # "tokenizer" or "prior"
    config: ml_collections.ConfigDict  # of the model
    # JSON values beside the tensors; always "path", "step", "weights" ("ema", "raw"), "tokenizer".
    extras: dict[str, Any]


class Arrays(Mapping):
    """Mapping of arrays by name that reads an array each time its name is looked up."""

    def __init__(self, promises: Mapping[str, Promise]):
        self.promises = promises

    def __getitem__(self, name: str) -> np.ndarray:
        return self.promises[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.promises)

    def __len__(self) -> int:
        return len(self.promises)


def load_model(
    path: epath.PathLike,
    kind: str,
    weights: str,
    dtype: Callable[[str], Any],
    sharding: jax.sharding.Sharding | None,
) -> Loaded:
    """Loads a tokenizer or a prior of any format and puts its arrays on devices one by one.

    Args:
        path: the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a
            checkpoint of a run: its workdir, its checkpoints/ or one step.
        kind: "tokenizer" or "prior".
        weights: "ema", "raw" (the trained copy), or "auto": the average of a tokenizer, the trained
            copy of a prior, or the other copy if only that was saved.
        dtype: function from a parameter's path, such as "quantizer/codebook", to its type.
        sharding: sharding of each parameter; None is the default device.

    Raises:
        ConfigError: the path is empty, `weights` is unknown, or a parameter cannot be divided as
            the sharding says.
        CheckpointError: the checkpoint is missing, damaged, or of another kind.
    """
    if not path:
        raise ConfigError(
            "no checkpoint is named: give a workdir, its checkpoints/ or one step, a .pt, a"
            " .safetensors or a folder with model.safetensors"
        )
    where = epath.Path(path).expanduser()
    in_file = where.suffix in (".pt", ".safetensors") or where.is_file()
    if in_file or (where / SAFETENSORS).exists():
        return _load_state(where, kind, weights, dtype, sharding)
    return _load_run(where, kind, weights, dtype, sharding)


def _load_run(path: epath.Path, kind: str, weights: str, dtype, sharding) -> Loaded:
    """Loads a model from a checkpoint of a run; Orbax reads each array in its type and sharding."""
    entries = tuple(COPIES[copy] for copy in copies(kind, weights))

    def type_of(path: str):
        return dtype(path.partition("/")[2])  # without the name of the entry

    loaded, extras = checkpoint.load_params(path, (entries,), sharding, type_of)
    ((name, tree),) = loaded.items()
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
    """Moves nested numpy arrays to the default device one by one, and frees each at once."""
    return {
        name: _moved(value) if isinstance(value, dict) else _placed(name, value, value.dtype, None)
        for name, value in ((name, tree.pop(name)) for name in list(tree))
    }


def _load_state(path: epath.Path, kind: str, weights: str, dtype, sharding) -> Loaded:
    """Loads a model from a file under the original's names, and puts its arrays on devices."""
    opened = read(path, weights)
    _check_kind(path, opened.kind, kind)
    leaves = names.leaves(opened.state.promises, tables.entries(opened.config))
    params = {
        name: _placed(name, leaf.read(), dtype(name), sharding) for name, leaf in leaves.items()
    }
    about = _about(opened.extras)
    about["training"].setdefault("weights", opened.extras["weights"])
    return Loaded(trees.unflatten(params), opened.config, about)


def _check_kind(path: epath.Path, kind: str, expected: str) -> None:
    if kind != expected:
        raise CheckpointError(f"{path} holds a {kind}, expected a {expected}")


def _about(saved: dict[str, Any]) -> dict[str, Any]:
    """Picks step, training, tokenizer and class names from the JSON values that a file keeps."""
    return {
        "step": saved.get("step"),
        "training": dict(saved.get("training") or {}),
        "tokenizer": saved.get("tokenizer") or "",
        "class_names": tuple(saved.get("class_names") or ()),
    }


def _placed(name: str, array: np.ndarray, dtype, sharding) -> jax.Array:
    """Casts a parameter, puts it on its devices and waits, so that the host copy can be freed."""
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


def read(path: epath.PathLike, weights: str = "auto", **overrides) -> Weights:
    """Opens the weights and the config of one model; tensors are read when they are looked up.

    Args:
        path: the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a
            checkpoint of a run: its workdir, its checkpoints/ or one step.
        weights: "ema", "raw" (the trained copy), or "auto": the average of a tokenizer, the trained
            copy of a prior, or the other copy if only that was saved.
        **overrides: fields of the config, instead of the recognised ones.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or holds no tokenizer or prior that
            fits its config.
        ConfigError: the checkpoint has no such weights, or an override cannot work.
    """
    opened = load(path)
    model = config_of(opened, **overrides)
    part = choose(opened, weights)
    return Weights(
        Arrays(checked(opened, part, model)),
        opened.kind,
        model,
        {
            "tokenizer": "",
            **opened.extras,
            "path": str(path),
            "step": opened.step,
            "weights": "ema" if part == "ema" else "raw",
        },
    )


def copies(kind: str, weights: str) -> tuple[str, ...]:
    """Lists the copies, "ema" or "model", that weights "ema", "raw" or "auto" allow, best first.

    Raises:
        ConfigError: the choice is unknown.
    """
    one_of("weights", weights, WEIGHTS)
    if weights != "auto":
        return ("ema",) if weights == "ema" else ("model",)
    return ("ema", "model") if kind == "tokenizer" else ("model", "ema")


def choose(opened: Checkpoint, weights: str) -> str:
    """Chooses the copy of weights in a checkpoint, "ema" or "model", for "ema", "raw" or "auto".

    Raises:
        ConfigError: the choice is unknown, or the checkpoint has no such copy.
    """
    for copy in copies(opened.kind, weights):
        if copy in opened.parts:
            return copy
    saved = ", ".join(copy for copy in COPIES if copy in opened.parts)
    raise ConfigError(f"{opened.path} has no {weights} weights, only {saved}")


def config_of(opened: Checkpoint, **overrides) -> ml_collections.ConfigDict:
    """Returns the config of a checkpoint's model: as saved, else as its tensors show.

    Raises:
        CheckpointError: the checkpoint holds a discriminator, or no model that can be built here.
    """
    if opened.kind not in INFER:
        raise CheckpointError(f"{opened.path} holds a discriminator, expected a tokenizer or prior")
    state = opened.parts.get("model") or opened.parts["ema"]
    try:
        if opened.config is None:
            return INFER[opened.kind](state, **overrides)
        fields = {name: value for name, value in opened.config.items() if name != "kind"}
        if opened.kind == "prior":
            return prior_config(**fields | overrides)
        return tokenizer_config(**opened.config | overrides)
    except CheckpointError as error:
        raise CheckpointError(f"{opened.path}: {error}") from None


def checked(opened: Checkpoint, part: str, model: ml_collections.ConfigDict) -> dict[str, Promise]:
    """Selects the tensors that a config demands, in the original's order; counts the others.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    state = opened.parts[part]
    try:
        extra = recognise.check(state, model)
    except CheckpointError as error:
        raise CheckpointError(f"{opened.path}: {part}: {error}") from None
    if extra:
        print(f"{opened.path}: {len(extra)} tensors of {part} are left out, first {extra[0]}")
    return {name: state[name] for name in recognise.tensor_shapes(model)}


def load(path: epath.PathLike) -> Checkpoint:
    """Opens a checkpoint of any format under the original's names; tensors are read later.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of GigaTok.
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
        raise CheckpointError(f"{path}: steps is {step!r}, expected the number of updates done")
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
    extras = {name: value for name, value in config.items() if name != "model"}
    part = "ema" if config.get("weights") == "ema" else "model"
    parts = {part: promised(path, arrays)}
    return Checkpoint(str(path), parts, {}, model, config.get("step"), extras, {})


def _load_orbax(path: epath.Path) -> Checkpoint:
    step = orbax_file.read(path)
    model = ml_collections.ConfigDict(step.extras["config"]["model"])
    arrays = promised(path, step.arrays)
    parts = {
        part: names.tensors(copy | _history(arrays, model, part), tables.entries(model))
        for part, entry in COPIES.items()
        if (copy := names.below(arrays, f"{entry}/"))
    }
    if not parts:
        raise CheckpointError(f"{path} has no entry params or ema_params")
    number = step.extras["step"]
    return Checkpoint(str(path), parts, {}, model.to_dict(), number, step.extras, arrays)


def _history(arrays: Mapping[str, Promise], model, part: str) -> dict[str, Promise]:
    """Returns the buffer of latest codes that the original keeps in a tokenizer, by its path.

    The trained copy has the buffer of the run, the average has zeros, as it never gets codes; a
    prior has no such buffer, so the dict is empty.
    """
    if model.kind == "prior":
        return {}
    if part == "model" and "codebook_used" in arrays:
        return {tables.USED: arrays["codebook_used"]}
    shape = (tables.HISTORY,)
    return {tables.USED: Promise(shape, np.dtype("f4"), lambda: np.zeros(shape, np.float32))}


def promised(path: epath.PathLike, state: Mapping[str, Any]) -> dict[str, Promise]:
    """Wraps tensors or promises in promises by name, which check what they read.

    Reading a promise raises CheckpointError if a value is not finite.
    """
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
