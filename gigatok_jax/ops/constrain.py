"""Placement of activations on the mesh in force, by the mesh axes that models name."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

BATCH = ("data", "fsdp")  # mesh axes that examples are divided over
SPLIT = "tensor"  # mesh axis that heads and hidden features are divided over
# With jax 0.10, XLA gathers the examples of all devices to satisfy an order in memory.
LAYOUTS_DIVIDE = jax.__version_info__ >= (0, 11, 2)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the sharding of an activation and returns it; its value stays the same.

    Does nothing without a mesh in force (`jax.set_mesh`) and inside `shard_map`. A
    dimension that its mesh axis does not divide stays whole.

    Args:
        x: activation.
        *axes: mesh axes of the first dimensions; None, and further dimensions, are whole.
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
    """Constrains a residual stream f[b n c] to be divided by examples and row-major in memory.

    Returns the stream, with its value unchanged. The order in memory is constrained under `jit`
    alone, and on several devices only from jax 0.11.2 on.

    Left alone, XLA for GPUs picks the order in memory that suits the stream's first value, such as
    a broadcast over examples or looked-up rows. If the examples come last, every norm and matrix
    product of all blocks has to transpose.
    """
    x = constrain(x, BATCH)
    mesh = jax.sharding.get_abstract_mesh()
    traced = isinstance(x, jax.core.Tracer)
    if not traced or (mesh.size > 1 and not LAYOUTS_DIVIDE):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def batch_axes(size: int) -> tuple[str, ...]:
    """Returns the mesh axes that divide a dimension of `size` examples or tokens; () for none."""
    mesh = _in_force()
    return BATCH if mesh is not None and _divides(mesh, BATCH, size) else ()


def per_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns the function under `shard_map` if a mesh is in force, else the function itself.

    Kernels on TPUs need this: the compiler cannot divide kernels, and `custom_partitioning`, which
    needs no specs, does not work on TPUs (jax-ml/jax#38196).
    """
    if _in_force() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def reaches_devices() -> bool:
    """Returns whether a kernel called here sees only the arrays of one device.

    That is so with one device, with a mesh in force (by `per_device`), and inside `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return _in_force() is not None or all(kind == AxisType.Manual for kind in mesh.axis_types)


def _in_force():
    """Returns the mesh of `jax.set_mesh` if it has our axes and all axes are Auto, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh if set(BATCH) | {SPLIT} <= set(mesh.axis_names) else None


def _divides(mesh, axis, size: int) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    return axis is not None and size % math.prod(mesh.shape[name] for name in names) == 0
