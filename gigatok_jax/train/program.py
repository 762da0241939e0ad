"""What a training step is made of, from a config and a mesh alone: for runs, plans, benchmarks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gigatok_jax import parallel


class Program(NamedTuple):
    """Everything but the data, the disk and the clock."""

    create: Callable  # () -> first state, every part of it where it belongs
    abstract: Any  # shapes and shardings of the state
    make_step: Callable  # micro-batches -> jitted step(state, batch, frozen, *phase)
    frozen: Any  # parameters that stay as they are, whole on every device; or their shapes
    batch: Any  # shapes and shardings of a global batch
    phase: tuple  # static arguments of the last steps of a run


def make(
    config,
    mesh: jax.sharding.Mesh,
    create: Callable,
    make_step: Callable,
    *,
    frozen: Any,
    batch: Any,
    phase: tuple = (),
) -> Program:
    """Puts a program on a mesh; nothing is computed yet.

    Args:
        config: of the run.
        mesh: devices of the run, or an abstract one.
        create: function without arguments that makes the first state.
        make_step: micro-batches and shardings of the state to a jitted step.
        frozen: arrays or `jax.ShapeDtypeStruct`.
        batch: tree of `jax.ShapeDtypeStruct`, as the step takes it.
        phase: static arguments of the step.

    Raises:
        ConfigError: a rule of the mesh does not fit, or a memory is not there; see
            `parallel.shardings` and `parallel.place_average`.
    """
    shapes = jax.eval_shape(create)
    placed = parallel.state_shardings(shapes, mesh, config)
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)
    return Program(
        jax.jit(create, out_shardings=placed),
        parallel.with_shardings(shapes, placed),
        lambda micro_batches: make_step(micro_batches, placed),
        jax.tree.map(lambda x: _on(x, whole), frozen),
        parallel.with_shardings(batch, split),
        phase,
    )


def lower(program: Program, mesh: jax.sharding.Mesh, micro_batches: int = 1) -> jax.stages.Lowered:
    """The training step of a program, traced from shapes."""
    with jax.set_mesh(mesh):  # what the models' constraints refer to
        return program.make_step(micro_batches).lower(
            program.abstract, program.batch, program.frozen, *program.phase
        )


def _on(x, sharding):
    if isinstance(x, jax.ShapeDtypeStruct):
        return parallel.with_shardings(x, sharding)
    return jax.device_put(x, sharding)
