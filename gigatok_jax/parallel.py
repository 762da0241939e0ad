"""Meshes of devices, and the placement of parameters and batches on a mesh.

Axes of a mesh: data (replicas), fsdp (sharded state), tensor (split matrices). A table of rules for
each kind of model says which dimensions of a parameter are divided; its average and its moments in
the optimizer are divided alike. An array that no rule names is whole on every device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gigatok_jax import trees
from gigatok_jax.errors import ConfigError, one_of
from gigatok_jax.model_config import family
from gigatok_jax.ops.constrain import BATCH

AXES = ("data", "fsdp", "tensor")
MEMORY = ("device", "pinned_host")  # memories that the averaged copy may lie in
LARGE = 1 << 20  # elements from which on `placement` lists an array


class Rule(NamedTuple):
    """Record of the mesh axes that divide the arrays whose path ends in a pattern."""

    pattern: str  # regular expression of the end of a path
    axes: tuple[
        str | None, ...
    ]  # mesh axis of each last dimension; a scanned stack's first is whole


# A layer into hidden features is divided by its outputs, the layer out of them by its inputs, so
# that `tensor` needs one sum per pair of layers; `fsdp` divides the other side.
RULES = {
    "tokenizer": (
        Rule(r"(self|cross)_attention/(query|key|value)/kernel", ("fsdp", "tensor")),
        Rule(r"(self|cross)_attention/(query|key|value)/bias", ("tensor",)),
        Rule(r"(self|cross)_attention/out/kernel", ("tensor", "fsdp")),
        Rule(r"mlp/up/kernel", ("fsdp", "tensor")),
        Rule(r"mlp/up/bias", ("tensor",)),
        Rule(r"mlp/down/kernel", ("tensor", "fsdp")),
        Rule(r"align/dense_[02]/kernel", ("fsdp", "tensor")),
        Rule(r"align/dense_1/kernel", ("tensor", "fsdp")),
        Rule(r"(en|de)coder/.*positions", (None, "fsdp")),
        # Convolutions compute on whole kernels; fsdp divides the stored ones.
        Rule(r"cnn_(en|de)coder/.*(block_\d/(conv\d|shortcut)|_down|_up)/kernel", ("fsdp",)),
    ),
    "prior": (
        Rule(r"attention/qkv/kernel", ("fsdp", "tensor")),
        Rule(r"attention/out/kernel", ("tensor", "fsdp")),
        Rule(r"mlp/gate_up/kernel", ("fsdp", "tensor")),
        Rule(r"mlp/down/kernel", ("tensor", "fsdp")),
        Rule(r"modulation/kernel", ("fsdp", "tensor")),
        Rule(r"(code|class)_embedding/embedding", (None, "fsdp")),
        Rule(r"head/kernel", ("fsdp", "tensor")),
    ),
}


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of a run over all devices, with the sizes of `config.mesh`.

    Args:
        config: `config.mesh`: a size for each of `AXES`, one of which may be -1, and `dcn`, the
            number of slices that the data axis is divided over first.
        devices: devices of the mesh; None is every device of the run.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, the devices have another
            number of slices, or the config names a topology to plan for.
    """
    if devices is None and config.get("topology"):
        raise ConfigError(
            f"mesh.topology is {config.topology!r}, to plan for: add --dry_run, or leave it out"
        )
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and config.get("dcn", 1) != slices and devices[0].platform == "tpu":
        raise ConfigError(f"the devices are of {slices} slices: set --config.mesh.dcn={slices}")
    types = (AxisType.Auto,) * len(AXES)
    if config.get("dcn", 1) == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    inner = tuple((sizes | {"data": sizes["data"] // config.dcn}).values())
    try:
        ordered = mesh_utils.create_hybrid_device_mesh(inner, (config.dcn, 1, 1), devices)
    except ValueError:
        raise ConfigError(f"mesh.dcn is {config.dcn}, the devices are of {slices} slices") from None
    return Mesh(ordered, AXES, axis_types=types)


def axis_sizes(config: ConfigDict, count: int) -> dict[str, int]:
    """Returns the size of each mesh axis over `count` devices; fills in a -1 of `config.mesh`.

    Raises:
        ConfigError: the sizes do not multiply to `count`, or `dcn` does not divide the data axis.
    """
    sizes = {axis: config[axis] for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) == 1 and fixed > 0 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count or min(sizes.values()) < 1:
        axes = ", ".join(f"{axis}={config[axis]}" for axis in AXES)
        raise ConfigError(
            f"mesh {axes} does not cover {count} devices: the sizes have to multiply to"
            f" {count}, and one of them may be -1"
        )
    if (slices := config.get("dcn", 1)) < 1 or sizes["data"] % slices:
        raise ConfigError(
            f"mesh.dcn is {slices}, expected a divisor of mesh.data, which is {sizes['data']}"
        )
    return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides the examples of a batch over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards that a batch is divided into on a mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, global_batch: int, micro_batches: int) -> None:
    """Raises ConfigError if the devices and micro-batches do not divide the global batch.

    Raises:
        ConfigError: the global batch is no multiple of shards times micro-batches, or either is
            below 1.
    """
    if micro_batches < 1:
        raise ConfigError(f"train.micro_batches is {micro_batches}, expected at least 1")
    pieces = batch_shards(mesh) * micro_batches
    if global_batch < 1 or global_batch % pieces:
        raise ConfigError(
            f"train.global_batch is {global_batch}, expected a multiple of {pieces}:"
            f" {batch_shards(mesh)} devices share it in {micro_batches} micro-batches"
        )


def global_array(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Assembles a global array with a sharding from the rows that each process holds."""
    return jax.make_array_from_process_local_data(sharding, local)


class Share(NamedTuple):
    """Record of which share of every batch a process reads."""

    index: int  # in [0, count)
    count: int  # shares of a batch
    first: bool  # whether this is the first process among those that read this share


def share(mesh: Mesh) -> Share:
    """Returns which share of every batch this process reads.

    Processes that differ only in their parts of matrices read the same share.

    Raises:
        ConfigError: the mesh divides batches unevenly among the processes.
    """
    rows = collections.defaultdict(set)  # shards of a batch by process
    shards = split_batch(mesh).devices_indices_map((batch_shards(mesh),))
    for device, (shard,) in shards.items():
        rows[device.process_index].add(shard.start or 0)
    mine = rows[jax.process_index()]
    groups = sorted({tuple(sorted(group)) for group in rows.values()})
    if len(set(map(len, groups))) != 1 or sum(map(len, groups)) != batch_shards(mesh):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ConfigError(
            f"mesh {sizes} divides a batch unevenly among {len(rows)} processes: let tensor divide"
            " the devices of a process, or be a multiple of them"
        )
    alike = [process for process in rows if rows[process] == mine]
    index = groups.index(tuple(sorted(mine)))
    return Share(index, len(groups), min(alike) == jax.process_index())


def local_rows(array: jax.Array) -> np.ndarray:
    """Returns the rows of a `split_batch` array that lie on this process's devices, in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def rules_of(config: ConfigDict) -> tuple[Rule, ...]:
    """Returns the sharding rules of a run: those of `config.mesh.rules`, then its model's table.

    Raises:
        ConfigError: a rule of the config cannot be read.
    """
    table = RULES[family(config.model)]
    own = tuple(_read_rule(text) for text in config.mesh.rules.split(";") if text.strip())
    return own + table


def _read_rule(text: str) -> Rule:
    """Reads a sharding rule from text like "decoder/.*/kernel=fsdp,-".

    The text has an axis, or "-" for none, for each of the last dimensions.
    """
    pattern, _, names = text.strip().partition("=")
    axes = tuple(None if name.strip() == "-" else name.strip() for name in names.split(","))
    if not pattern or not set(axes) - {None} <= set(AXES):
        raise ConfigError(
            f"mesh.rules has {text.strip()!r}, expected pattern=axis,axis with axes of"
            f" {', '.join(AXES)} or -"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"mesh.rules: {pattern!r} is no regular expression: {error}") from None
    return Rule(pattern, axes)


def shardings(tree: Any, mesh: Mesh, rules: tuple[Rule, ...]) -> Any:
    """Returns the sharding of every array of a state, by rules, as a tree like the state.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`; a rule matches the end of a path, so moments and
            averages are divided as their parameters are.
        mesh: mesh of the run.
        rules: rules from `rules_of`; the first that matches a path counts.

    Raises:
        ConfigError: a rule of the config matches nothing, or an axis does not divide a dimension.
    """
    used: set[int] = set()

    def sharding_of(keys, leaf):
        path = trees.path(keys)
        rule = next((r for r in rules if re.search(rf"(^|/){r.pattern}$", path)), None)
        if rule is None:
            return replicated(mesh)
        used.add(id(rule))
        return NamedSharding(mesh, _spec(path, leaf.shape, rule, mesh))

    result = jax.tree_util.tree_map_with_path(sharding_of, tree)
    ours = {id(rule) for table in RULES.values() for rule in table}
    if idle := [rule.pattern for rule in rules if id(rule) not in used | ours]:
        raise ConfigError(f"mesh.rules: {idle[0]!r} names no array of this model")
    return result


def with_shardings(tree: Any, where: Any) -> Any:
    """Returns a tree of `jax.ShapeDtypeStruct` like a tree of arrays, with shardings.

    `where` is one sharding for all arrays, or a tree of shardings.
    """
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def join(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(join, tree, where)


def _spec(path: str, shape: tuple[int, ...], rule: Rule, mesh: Mesh) -> PartitionSpec:
    if len(rule.axes) > len(shape):
        raise ConfigError(f"rule {rule.pattern!r} has {len(rule.axes)} axes, {path} is {shape}")
    whole = (None,) * (len(shape) - len(rule.axes))
    for size, axis in zip(shape[len(whole) :], rule.axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"{path} has a dimension of {size}, which mesh.{axis}={mesh.shape[axis]} does not"
                f" divide: change mesh.{axis}, or give a rule of its own in mesh.rules"
            )
    return PartitionSpec(*whole, *rule.axes)


def state_shardings(state: Any, mesh: Mesh, config: ConfigDict) -> Any:
    """Returns the sharding of every array of a run's state, by its rules and `train.ema_memory`."""
    return place_average(shardings(state, mesh, rules_of(config)), mesh, config)


def place_average(shardings: Any, mesh: Mesh, config: ConfigDict) -> Any:
    """Returns a state's shardings with the averaged copy in the memory `config.train.ema_memory`.

    Raises:
        ConfigError: the memory is none of `MEMORY`, or these devices do not have it.
    """
    kind = config.train.ema_memory
    one_of("train.ema_memory", kind, MEMORY)
    if kind == "device":
        return shardings
    if isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
        known = sorted(memory.kind for memory in device.addressable_memories())
        if kind not in known:
            raise ConfigError(
                f"train.ema_memory is {kind!r}, {device.platform} has {', '.join(known)}:"
                " leave it at 'device'"
            )
    average = jax.tree.map(lambda x: x.with_memory_kind(kind), shardings.ema_params)
    return shardings.replace(ema_params=average)


def to_device(tree: Any) -> Any:
    """Copies a tree's arrays that are in host memory to their devices; returns the whole tree."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), tree)


@dataclasses.dataclass(frozen=True)
class _Placed:
    path: str
    shape: tuple[int, ...]
    sharding: str  # mesh axes of the dimensions, "-" for one that is not divided
    per_device: str


def placement(tree: Any) -> list[str]:
    """Makes a table, as lines, of the arrays of at least 2^20 elements of a sharded state.

    Columns: path, shape, the mesh axis that divides each dimension, MiB that each device holds.
    """
    rows = []
    for path, leaf in trees.flatten(tree).items():
        if math.prod(leaf.shape) >= LARGE:
            axes = ", ".join(str(axis or "-") for axis in leaf.sharding.spec) or "whole"
            size = f"{_shard_bytes(leaf) / 2**20:,.1f} MiB{' (host)' if _on_host(leaf) else ''}"
            rows.append(_Placed(path, leaf.shape, axes, size))
    return parameter_overview.make_table(rows).splitlines()


def _shard_bytes(leaf) -> int:
    """Returns the number of bytes that an array takes on each of its devices."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def bytes_per_device(tree: Any) -> int:
    """Returns the number of bytes that a sharded state takes in each device's memory."""
    return sum(
        _shard_bytes(leaf)
        for leaf in jax.tree.leaves(tree)
        if not (jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or _on_host(leaf))
    )


def _on_host(leaf) -> bool:
    return leaf.sharding.memory_kind == "pinned_host"


def auto_mesh(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the same sharding with all mesh axes Auto: the compiler divides activations."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return NamedSharding(mesh, sharding.spec)


def padded_sizes(most: int) -> list[int]:
    """Returns the sizes that `in_batches` pads to on one device: powers of two up to `most`."""
    return [1 << i for i in range(most.bit_length())]


def in_batches(
    run: Callable[..., jax.Array], params: Any, most: int, *arrays: np.ndarray | jax.Array
) -> jax.Array:
    """Computes `run(params, *arrays)` in padded batches of few shapes, for any number of rows.

    Rows are cut into batches of at most `most`, and each batch is padded to a power of two and to
    a multiple of the devices that share it. The results are joined without the padding.

    Args:
        run: function of the parameters and of batches [b ...], with one result row per input row.
        params: nested dict of arrays; batches are divided over the mesh that they lie on.
        most: number of rows of the largest batch, a power of two.
        *arrays: inputs [b ...], any b.
    """
    sharding, shards = _batch_sharding(params)
    results, sizes = [], []
    for start in range(0, max(len(arrays[0]), 1), most):
        batch = [array[start : start + most] for array in arrays]
        sizes.append(len(batch[0]))
        room = -(-(1 << max(sizes[-1] - 1, 0).bit_length()) // shards) * shards
        padded = [_padded(array, room - sizes[-1]) for array in batch]
        results.append(run(params, *jax.device_put(padded, sharding)))
    if len(results) == 1 and len(results[0]) == sizes[0]:
        return results[0]
    return _joined(results, sizes)


def _joined(arrays: list[jax.Array], sizes: list[int]) -> jax.Array:
    """Joins the first `sizes` rows of each array, one array below the other."""
    sharding = arrays[0].sharding
    if arrays[0].ndim > 2 or not arrays[0].is_fully_addressable:
        rows = [array[:size] for array, size in zip(arrays, sizes, strict=True)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)
    # Codes are small: the host cuts them, so that another size is not another program.
    rows = [np.asarray(array)[:size] for array, size in zip(arrays, sizes, strict=True)]
    if isinstance(sharding, NamedSharding):
        sharding = replicated(sharding.mesh)
    return jax.device_put(np.concatenate(rows), sharding)


def _batch_sharding(params) -> tuple[jax.sharding.Sharding, int]:
    """Returns the sharding of a batch over the parameters' mesh, and its number of shards."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return sharding, 1
    axes = tuple(axis for axis in BATCH if axis in sharding.mesh.axis_names)
    shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(axes)), shards


def _padded(array, count: int):
    if not count:
        return array
    return np.concatenate([array, np.zeros((count, *array.shape[1:]), array.dtype)])
