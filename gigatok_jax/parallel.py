"""Meshes and placement. Axes of a mesh: data (replicas), fsdp (sharded state), tensor.

One table of rules for each kind of model says which dimensions of a parameter are divided; the
averaged copy and the optimizer's moments follow their parameter. What no rule names is whole on
every device.
"""

import collections
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gigatok_jax.errors import ConfigError
from gigatok_jax.model_config import family
from gigatok_jax.ops.constrain import BATCH

AXES = ("data", "fsdp", "tensor")
MEMORY = ("device", "pinned_host")  # where the averaged copy may lie
LARGE = 1 << 20  # elements; the placement of larger arrays is told


class Rule(NamedTuple):
    pattern: str  # regular expression of the end of a path
    axes: tuple[str | None, ...]  # of the last dimensions; a scanned stack's first stays whole


# A layer into hidden features is divided by its outputs, the layer out of them by its inputs, so
# that `tensor` has one sum per pair; `fsdp` divides the other side.
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
        # Convolutions compute on whole kernels; fsdp divides what is kept of them.
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


def make_mesh(config, devices=None) -> Mesh:
    """Mesh of `config.mesh`, over all devices.

    Args:
        config: a size per axis, of which one may be -1, and `dcn`, the slices that data is divided
            over first.
        devices: those of this run if None.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, the slices are not there,
            or the config is of a plan.
    """
    if devices is None and config.get("topology"):
        raise ConfigError(
            f"mesh.topology is {config.topology!r}, to plan for: add --dry_run, or leave it out"
        )
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found > 1 and config.get("dcn", 1) != found and devices[0].platform == "tpu":
        raise ConfigError(f"the devices are of {found} slices: set --config.mesh.dcn={found}")
    types = (AxisType.Auto,) * len(AXES)
    if config.get("dcn", 1) == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    inner = tuple((sizes | {"data": sizes["data"] // config.dcn}).values())
    try:
        ordered = mesh_utils.create_hybrid_device_mesh(inner, (config.dcn, 1, 1), devices)
    except ValueError:
        raise ConfigError(f"mesh.dcn is {config.dcn}, the devices are of {found} slices") from None
    return Mesh(ordered, AXES, axis_types=types)


def axis_sizes(config, count: int) -> dict[str, int]:
    """Size of each axis of `config.mesh` over so many devices, one of -1 filled in.

    Raises:
        ConfigError: they do not multiply to it, or slices do not divide the data axis.
    """
    sizes = {axis: config[axis] for axis in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) == 1 and given > 0 and count % given == 0:
        sizes[free[0]] = count // given
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
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Examples are divided over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, global_batch: int, micro_batches: int) -> None:
    """Refuses a batch that the devices do not divide.

    Raises:
        ConfigError: with the sizes that would do.
    """
    if micro_batches < 1:
        raise ConfigError(f"train.micro_batches is {micro_batches}, expected at least 1")
    parts = batch_shards(mesh) * micro_batches
    if global_batch < 1 or global_batch % parts:
        raise ConfigError(
            f"train.global_batch is {global_batch}, expected a multiple of {parts}:"
            f" {batch_shards(mesh)} devices share it in {micro_batches} micro-batches"
        )


def global_array(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """One global array from every process's rows of it."""
    return jax.make_array_from_process_local_data(sharding, local)


class Share(NamedTuple):
    """The part of every batch that a process reads."""

    index: int
    count: int
    first: bool  # of the processes that read the same


def share(mesh: Mesh) -> Share:
    """What this process reads; processes that only split matrices among them read the same.

    Raises:
        ConfigError: the mesh divides batches unevenly among the processes.
    """
    rows = collections.defaultdict(set)
    places = split_batch(mesh).devices_indices_map((batch_shards(mesh),))
    for device, (piece,) in places.items():
        rows[device.process_index].add(piece.start or 0)
    mine = rows[jax.process_index()]
    groups = sorted({tuple(sorted(one)) for one in rows.values()})
    if len({len(one) for one in groups}) != 1 or sum(map(len, groups)) != batch_shards(mesh):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ConfigError(
            f"mesh {sizes} divides a batch unevenly among {len(rows)} processes: let tensor divide"
            " the devices of a process, or be a multiple of them"
        )
    alike = [process for process in rows if rows[process] == mine]
    index = groups.index(tuple(sorted(mine)))
    return Share(index, len(groups), min(alike) == jax.process_index())


def local_rows(array: jax.Array) -> np.ndarray:
    """Rows of a `split_batch` array that this process gave, in their order."""
    pieces = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def rules_of(config) -> tuple[Rule, ...]:
    """The rules of a run: those of `config.mesh.rules` first, then its model's table.

    Raises:
        ConfigError: a rule that cannot be read.
    """
    table = RULES[family(config.model)]
    own = tuple(_read_rule(text) for text in config.mesh.rules.split(";") if text.strip())
    return own + table


def _read_rule(text: str) -> Rule:
    """Of "decoder/.*/kernel=fsdp,-": an axis or "-" for each of the last dimensions."""
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
    """Sharding of every array of a state.

    Args:
        tree: of arrays or `jax.ShapeDtypeStruct`; the end of a path decides, so moments and
            averages lie as their parameters do.
        mesh: devices of the run.
        rules: from `rules_of`; the first that names a path counts.

    Raises:
        ConfigError: a rule of the config names nothing, or an axis does not divide a dimension.
    """
    met: set[int] = set()

    def place(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        rule = next((r for r in rules if re.search(rf"(^|/){r.pattern}$", path)), None)
        if rule is None:
            return replicated(mesh)
        met.add(id(rule))
        return NamedSharding(mesh, _spec(path, leaf.shape, rule, mesh))

    placed = jax.tree_util.tree_map_with_path(place, tree)
    ours = {id(rule) for table in RULES.values() for rule in table}
    if idle := [rule.pattern for rule in rules if id(rule) not in met | ours]:
        raise ConfigError(f"mesh.rules: {idle[0]!r} names no array of this model")
    return placed


def with_shardings(tree: Any, where: Any) -> Any:
    """Shapes of a tree of arrays, on a sharding for all or a tree of them."""
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


def state_shardings(state: Any, mesh: Mesh, config) -> Any:
    """Sharding of every array of a run's state, by its rules and `train.ema_memory`."""
    return place_average(shardings(state, mesh, rules_of(config)), mesh, config)


def place_average(shardings: Any, mesh: Mesh, config) -> Any:
    """Shardings of a state whose averaged copy lies where `config.train.ema_memory` says.

    Raises:
        ConfigError: another word, or a memory that these devices do not have.
    """
    kind = config.train.ema_memory
    if kind not in MEMORY:
        raise ConfigError(
            f"train.ema_memory is {kind!r}, expected {' or '.join(map(repr, MEMORY))}"
        )
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
    average = jax.tree.map(lambda one: one.with_memory_kind(kind), shardings.ema_params)
    return shardings.replace(ema_params=average)


def to_device(tree: Any) -> Any:
    """Copies on the devices of arrays that lie in the hosts' memory; the others as they are."""
    lies = lambda x: x.sharding.with_memory_kind("device")  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, lies(x)), tree)


def placement(tree: Any) -> list[str]:
    """A line for every large array of a state with shardings: path, shape, axes, MiB a device."""
    lines = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if math.prod(leaf.shape) >= LARGE:
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            axes = ", ".join(str(axis or "-") for axis in leaf.sharding.spec) or "whole"
            where = " (host)" if _on_host(leaf) else ""
            shape = "x".join(map(str, leaf.shape))
            lines.append(f"{path}  {shape}  {axes}  {_held(leaf) / 2**20:.1f}{where}")
    return lines


def _held(leaf) -> int:
    """Bytes of an array on one of its devices."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def bytes_per_device(tree: Any) -> int:
    """Bytes of a state with shardings that one device holds."""
    return sum(
        _held(leaf)
        for leaf in jax.tree.leaves(tree)
        if not (jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or _on_host(leaf))
    )


def _on_host(leaf) -> bool:
    return leaf.sharding.memory_kind == "pinned_host"


def auto_mesh(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The same on a mesh whose axes leave shardings to the compiler, as ours do."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return NamedSharding(mesh, sharding.spec)


def padded_sizes(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def in_batches(run: Callable[..., jax.Array], params, most: int, *arrays) -> jax.Array:
    """`run(params, ...)` over pieces padded to powers of two; the padding is cut off again."""
    place, shards = _batch_sharding(params)
    count, done, sizes = len(arrays[0]), [], []
    for start in range(0, max(count, 1), most):
        pieces = [array[start : start + most] for array in arrays]
        sizes.append(len(pieces[0]))
        room = -(-(1 << max(sizes[-1] - 1, 0).bit_length()) // shards) * shards
        padded = [_padded(piece, room - sizes[-1]) for piece in pieces]
        done.append(run(params, *jax.device_put(padded, place)))
    if len(done) == 1 and len(done[0]) == sizes[0]:
        return done[0]
    return _joined(done, sizes)


def _joined(done: list[jax.Array], sizes: list[int]) -> jax.Array:
    """The first rows of each array, one array below the other."""
    if done[0].ndim > 2 or not done[0].is_fully_addressable:
        parts = [array[:size] for array, size in zip(done, sizes, strict=True)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    # Codes are small: the host cuts them, where another size is not another program.
    parts = [np.asarray(array)[:size] for array, size in zip(done, sizes, strict=True)]
    place = done[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(np.concatenate(parts), place)


def _batch_sharding(params):
    """Examples are divided over the mesh that the parameters lie on; its sharding and parts."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return sharding, 1
    axes = tuple(axis for axis in BATCH if axis in sharding.mesh.axis_names)
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(axes)), parts


def _padded(array, count: int):
    if not count:
        return array
    return np.concatenate([array, np.zeros((count, *array.shape[1:]), array.dtype)])
