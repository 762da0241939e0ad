"""Meshes and placement. Axes of a mesh: data (replicas), fsdp (sharded state), tensor."""

import collections
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gigatok_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config, devices=None) -> Mesh:
    """Mesh of `config.mesh`, a size per axis of which one may be -1, over all devices.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        axes = ", ".join(f"{axis}={config[axis]}" for axis in AXES)
        raise ConfigError(
            f"mesh {axes} does not cover {len(devices)} devices: the sizes have to multiply to"
            f" {len(devices)}, and one of them may be -1"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Examples are divided over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, global_batch: int, micro_batches: int) -> None:
    """Refuses a batch that the devices do not divide.

    Raises:
        ConfigError: with the sizes that would do.
    """
    parts = batch_shards(mesh) * micro_batches
    if micro_batches < 1 or global_batch < 1 or global_batch % parts:
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
