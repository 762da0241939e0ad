"""Where activations lie on a mesh: models name what an axis holds, the mesh in force decides."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

BATCH = ("data", "fsdp")  # mesh axes that examples are divided over
SPLIT = "tensor"  # heads and hidden features of a layer
# XLA of jax 0.10 gathers the examples of all devices where an order in memory is asked for.
LAYOUTS_DIVIDE = jax.__version_info__ >= (0, 11, 2)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Asks the compiler to lay out an activation; the value stays the same.

    Without a mesh in force (`jax.set_mesh`), inside `shard_map`, or where an axis of the mesh does
    not divide a dimension, nothing is asked.

    Args:
        x: activation.
        *axes: mesh axes of the first dimensions; None, and those not given, are whole.
    """
    mesh = _in_force()
    if mesh is None:
        return x
    sizes = x.shape[: len(axes)]
    chosen = [
        axis if _divides(mesh, axis, n) else None for axis, n in zip(axes, sizes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*chosen))


def stream(x: jax.Array) -> jax.Array:
    """The stream f[b n c] that blocks add to: divided over examples, features side by side.

    Left alone, XLA for GPUs takes the order in memory that suits how the stream begins, such as a
    broadcast over examples or looked-up rows; with the examples last, every norm and every matrix
    product of all blocks transposes.
    """
    x = constrain(x, BATCH)
    mesh = jax.sharding.get_abstract_mesh()
    compiled = isinstance(x, jax.core.Tracer)
    if not compiled or (mesh.size > 1 and not LAYOUTS_DIVIDE):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def batch_axes(size: int) -> tuple[str, ...]:
    """Mesh axes that a dimension with the examples of a batch, or their tokens, is divided over."""
    mesh = _in_force()
    return BATCH if mesh is not None and _divides(mesh, BATCH, size) else ()


def per_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """A function of what each device holds of its arguments; as it is without a mesh in force.

    For kernels on TPUs: the compiler cannot divide them, and `custom_partitioning`, which follows
    the arguments wherever they lie, is not there (jax-ml/jax#38196).
    """
    if _in_force() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def reaches_devices() -> bool:
    """Whether a kernel gets one device's part: by `per_device`, in shard_map, or on one alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return _in_force() is not None or all(kind == AxisType.Manual for kind in mesh.axis_types)


def _in_force():
    """The mesh of `jax.set_mesh`, if it is one of ours and the compiler divides by it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh if set(BATCH) | {SPLIT} <= set(mesh.axis_names) else None


def _divides(mesh, axis, size: int) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    return axis is not None and size % math.prod(mesh.shape[name] for name in names) == 0
