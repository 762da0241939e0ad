"""Converts the state of a training run, from the original's form to our tree of arrays and back.

The optimizers of the original number the parameters: those of the tokenizer and the discriminator
in the order of their state dicts, those of a prior with all matrices first. The moments of our
optimizers are trees of the same form as the parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import trees
from gigatok_jax.errors import CheckpointError
from gigatok_jax.models import discriminator as discriminator_modules
from gigatok_jax.weights import discriminator_names, names, read, recognise, tables
from gigatok_jax.weights.names import Entry, Promise, below, value_of
from gigatok_jax.weights.read import Checkpoint

ADAM = "opt_state/1/"  # the only link of `optim.make_optimizer` with a state
MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
MODULES = {
    "patchgan": discriminator_modules.PatchGAN,
    "dino": discriminator_modules.DinoDiscriminator,
}

Tensors = dict[str, Promise]


def parameter_table(entries: list[Entry]) -> list[Entry]:
    """Selects the entries of parameters from a name table: no buffers and no statistics."""
    fixed = ("buffers/", "batch_stats/", "spectral/")
    return [entry for entry in entries if not entry.path.startswith(fixed)]


def parameter_order(tensors: Mapping[str, Any], entries: list[Entry], kind: str) -> list[str]:
    """Lists the names of parameters in the order in which the original's optimizer numbers them."""
    order = list(dict.fromkeys(entry.name for entry in parameter_table(entries)))
    if kind != "prior":
        return order
    return sorted(order, key=lambda name: len(tensors[name].shape) < 2)  # matrices, then the rest


def above(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a prefix before the path of each array."""
    return {f"{prefix}{path}": x for path, x in arrays.items()}


# From the original to ours.


def to_ours(
    parts: Mapping[str, Tensors],
    optimizers: Mapping[str, dict],
    step: int,
    model: ml_collections.ConfigDict,
    *,
    seed: int = 0,
    fallback: str = "patchgan",
    first_moment: str = "float32",
) -> dict[str, Promise | np.ndarray]:
    """Converts the state of a run of the original to the arrays, by path, of a run of ours.

    Missing moments, averages and discriminators start anew, and a line is printed.

    Args:
        parts: tensors of "model", "ema" and "discriminator"; "model" or "ema" is enough.
        optimizers: states of "optimizer" and "optimizer_disc", as PyTorch writes them.
        step: number of updates done.
        model: config of the model.
        seed: seed of all later random draws.
        fallback: discriminator to start when `parts` has none: "patchgan", "dino" or "none".
        first_moment: type of the first moments, `optim.first_moment`.

    Raises:
        CheckpointError: an optimizer belongs to other parameters.
    """
    entries = tables.entries(model)
    trained, average = (
        parts.get(copy) or parts[other] for copy, other in (("model", "ema"), ("ema", "model"))
    )
    params, ema = names.leaves(trained, entries), names.leaves(average, entries)
    used = params.pop(tables.USED, None)
    ema.pop(tables.USED, None)
    if "ema" not in parts or "model" not in parts:
        print(
            "the file has one copy of the parameters: the trained one and the average start equal"
        )
    order = parameter_order(trained, entries, model.kind)
    arrays = {
        "step": np.asarray(step, np.int32),
        "rng": np.asarray(jax.random.key_data(jax.random.key(seed))),
        **above("params/", params),
        **above("ema_params/", ema),
        **_adam_to_ours(optimizers, "optimizer", order, trained, entries),
    }
    if model.kind != "prior":
        arrays["codebook_used"] = used
        arrays |= _discriminator_to_ours(parts.get("discriminator"), optimizers, fallback)
    kept_in = lambda path: first_moment if f"{ADAM}mu/" in path else "float32"  # noqa: E731
    return {path: _typed(array, kept_in(path)) for path, array in arrays.items()}


def _adam_to_ours(optimizers, name: str, order: list[str], tensors, entries) -> dict[str, Any]:
    """Converts the state of a PyTorch AdamW to our count and moments; missing moments are zeros."""
    states = _numbered(optimizers.get(name), name, order)
    empty = sum(not state for state in states.values())
    if name not in optimizers:
        print(f"{name} is not there (a sharded trainer keeps it in another file): it starts anew")
    elif empty:
        print(f"{name}: {empty} of {len(order)} parameters have no moments, which start at zero")
    count = max((int(value_of(state["step"])) for state in states.values() if state), default=0)
    arrays = {f"{ADAM}count": np.asarray(count, np.int32)}
    for ours, theirs in MOMENTS.items():
        moments = {n: _moment(n, states[n], theirs, tensors[n].shape) for n in order}
        leaves = names.leaves(moments, parameter_table(entries))
        arrays |= above(f"{ADAM}{ours}/", leaves)
    return arrays


def groups_of(optimizer: Mapping[str, Any], name: str) -> list[dict]:
    """Returns the parameter groups in the state of an optimizer of PyTorch.

    Raises:
        CheckpointError: the state has another form than PyTorch's.
    """
    groups, states = optimizer.get("param_groups"), optimizer.get("state")
    valid = isinstance(groups, list) and isinstance(states, dict)
    valid = valid and all(isinstance(g, dict) and type(g.get("params")) is list for g in groups)
    if not valid or not all(isinstance(state, dict) for state in states.values()):
        raise CheckpointError(f"{name} is not the state of an optimizer of PyTorch")
    return groups


def _numbered(optimizer: dict | None, name: str, order: list[str]) -> dict[str, dict]:
    """Looks up the state that an optimizer of PyTorch has for each parameter, by name.

    The state is empty before the first update. Raises CheckpointError if the optimizer has another
    number of parameters.
    """
    if optimizer is None:
        return {parameter: {} for parameter in order}
    numbers = [n for group in groups_of(optimizer, name) for n in group["params"]]
    if len(numbers) != len(order):
        raise CheckpointError(
            f"{name} has {len(numbers)} parameters, the model {len(order)}: is it of another model?"
        )
    states = optimizer["state"]
    return {name: states.get(number, {}) for name, number in zip(order, numbers, strict=True)}


def _moment(name: str, state: dict, field: str, shape: tuple[int, ...]):
    """Returns one moment of a parameter from its state; zeros before its first update.

    Raises CheckpointError if the state is not of AdamW, or the moment has another shape.
    """
    if not state:
        return Promise(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))
    moment = state.get(field)
    if moment is None or "step" not in state:
        raise CheckpointError(f"the optimizer of {name} has {', '.join(state)}, expected AdamW's")
    if tuple(moment.shape) != tuple(shape):
        raise CheckpointError(
            f"{field} of {name} has shape {list(moment.shape)}, expected {list(shape)}: the"
            " parameters are numbered in another order"
        )
    return moment


def _discriminator_to_ours(part: Tensors | None, optimizers, fallback: str) -> dict[str, Any]:
    """Converts a discriminator and its optimizer to arrays by path of a run of ours.

    Without a discriminator a new one starts, or, if `fallback` is "none", only a count of zero.
    """
    if part is None and fallback == "none":
        return above("discriminator_", {f"{ADAM}count": np.zeros((), np.int32)})
    if part is None:
        print(f"the file has no discriminator: a new {fallback} starts")
        kind, variables, optimizers = fallback, _new_discriminator(fallback), {}
    else:
        kind = recognise.kind_of(part)
        variables = discriminator_names.from_torch({n: p.read() for n, p in part.items()}, kind)
    entries = discriminator_names.entries(kind)
    tensors = names.to_torch(variables, entries)
    table = [e._replace(path=e.path.removeprefix("params/")) for e in parameter_table(entries)]
    order = parameter_order(tensors, table, kind)
    adam = _adam_to_ours(optimizers, "optimizer_disc", order, tensors, table)
    return {
        **above("discriminator/", trees.flatten(variables.pop("params"))),
        **above("discriminator_stats/", trees.flatten(variables)),
        **above("discriminator_", adam),
    }


def _new_discriminator(kind: str) -> dict:
    keys = {"params": jax.random.key(1), "augment": jax.random.key(2)}
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.jit(lambda: MODULES[kind]().init(keys, images, train=True))()
    return jax.tree.map(np.asarray, variables)


def _typed(array: Promise | np.ndarray, dtype: str) -> Promise | np.ndarray:
    """Casts an array, or the promise of one, to a floating type; integers keep their type."""
    if array.dtype == dtype or np.issubdtype(array.dtype, np.integer):
        return array
    read = lambda: value_of(array).astype(dtype)  # noqa: E731
    return Promise(tuple(array.shape), np.dtype(dtype), read, getattr(array, "order", 0))


# From ours to the original.


def load(path: epath.PathLike) -> Checkpoint:
    """Opens a checkpoint of any format, with the discriminator and the optimizers of a run.

    The parameter groups of the optimizers of a run of ours have no settings, such as `lr`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of GigaTok.
    """
    checkpoint = read.load(path)
    arrays, parts, optimizers = checkpoint.arrays, dict(checkpoint.parts), {}
    if f"{ADAM}count" in arrays:
        model, tensors = read.config_of(checkpoint), next(iter(parts.values()))
        entries = tables.entries(model)
        order = parameter_order(tensors, entries, model.kind)
        optimizers["optimizer"] = _adam_to_theirs(arrays, order, entries, model.kind, tensors)
    if judge := below(arrays, "discriminator/"):
        stats = below(arrays, "discriminator_stats/")
        kind = "dino" if any(path.startswith("spectral/") for path in stats) else "patchgan"
        part, optimizer = _discriminator_to_theirs(arrays, above("params/", judge) | stats, kind)
        parts["discriminator"], optimizers["optimizer_disc"] = part, optimizer
    return checkpoint._replace(parts=parts, optimizers=checkpoint.optimizers | optimizers)


def _adam_to_theirs(arrays, order: list[str], entries, kind: str, tensors) -> dict[str, Any]:
    """Converts our count and moments to the state of an optimizer of PyTorch.

    The matrices of a prior are a parameter group of their own.
    """
    table, state = parameter_table(entries), {}
    count = arrays[f"{ADAM}count"]
    if int(value_of(count)):
        moments = {
            theirs: names.tensors(_widened(below(arrays, f"{ADAM}{ours}/")), table)
            for ours, theirs in MOMENTS.items()
        }
        steps = np.asarray(value_of(count), np.float32)
        for i, name in enumerate(order):
            state[i] = {"step": steps} | {field: moments[field][name] for field in moments}
    cut = sum(len(tensors[n].shape) >= 2 for n in order) if kind == "prior" else len(order)
    groups = [list(range(cut)), list(range(cut, len(order)))]
    return {"state": state, "param_groups": [{"params": group} for group in groups if group]}


def _widened(moments: Mapping[str, Promise]) -> Tensors:
    """Casts moments exactly to float32, the type of the parameters, which PyTorch demands."""
    return {path: _typed(moment, "float32") for path, moment in moments.items()}


def _discriminator_to_theirs(arrays, variables: Tensors, kind: str) -> tuple[Tensors, dict]:
    entries = discriminator_names.entries(kind)
    part = names.tensors(variables, entries)
    counts = {n: _counter(p) for n, p in part.items() if n.endswith("num_batches_tracked")}
    table = [e._replace(path=e.path.removeprefix("params/")) for e in parameter_table(entries)]
    mine = below(arrays, "discriminator_")
    optimizer = _adam_to_theirs(mine, parameter_order(part, table, kind), table, kind, part)
    return part | counts, optimizer


def _counter(promise: Promise) -> Promise:
    """Casts the promise of a count of batches to 64-bit integers, as PyTorch has it."""
    read = lambda: np.asarray(promise.read(), np.int64)  # noqa: E731
    return promise._replace(dtype=np.dtype(np.int64), read=read)
