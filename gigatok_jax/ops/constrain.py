"""Where activations lie on a mesh: models name what an axis holds, the mesh in force decides."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH = ("data", "fsdp")  # mesh axes that examples are divided over
SPLIT = "tensor"  # heads and hidden features of a layer


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Asks the compiler to lay out an activation; the value stays the same.

    Without a mesh in force (`jax.set_mesh`), inside `shard_map`, or where an axis of the mesh does
    not divide a dimension, nothing is asked.

    Args:
        x: activation.
        *axes: mesh axes of the first dimensions; None, and those not given, are whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    if not set(BATCH) | {SPLIT} <= set(mesh.axis_names):
        return x
    sizes = x.shape[: len(axes)]
    chosen = [
        axis if _divides(mesh, axis, n) else None for axis, n in zip(axes, sizes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*chosen))


def _divides(mesh, axis, size: int) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    return axis is not None and size % math.prod(mesh.shape[name] for name in names) == 0
