"""Training step on a mesh: its shapes, its compilation, and micro-batches that fit the memory.

Axes: b examples of a batch, k micro-batches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from gigatok_jax import parallel
from gigatok_jax.errors import ConfigError
from gigatok_jax.run import processes


@dataclasses.dataclass
class Program:
    """Training step of a config on a mesh, for runs, plans and benchmarks.

    Calling a program runs an update; each phase is compiled at its first call.

    Attributes:
        mesh: devices of the run, or an abstract mesh.
        create: jitted function without arguments that makes the first state, placed on the mesh.
        abstract: shapes and shardings of the state.
        make_step: function from a number of micro-batches to a jitted `step(state, batch, frozen,
            *phase)`.
        frozen: parameters that never change, whole on every device; or shapes of such parameters.
        batch: shapes and shardings of a global batch.
        phase: static arguments of the last updates of a run.
        micro_batches: number of micro-batches of the first attempt to compile; doubled while the
            step needs more memory than the devices have.
    """

    mesh: jax.sharding.Mesh
    create: Callable[[], Any]
    abstract: Any
    make_step: Callable[[int], Callable]
    frozen: Any
    batch: Any
    phase: tuple
    micro_batches: int
    _compiled: dict[tuple, jax.stages.Compiled] = dataclasses.field(default_factory=dict)

    def __call__(self, state: Any, batch: Any, *phase: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Runs one update; returns the new state and named scalars f32[]; donates the old state.

        Raises:
            ConfigError: the step does not fit the memory, and the batch cannot be cut further.
        """
        if phase not in self._compiled:
            self._compiled[phase] = self._fit(phase)
        return self._compiled[phase](state, batch, self.frozen)

    def lower(self, micro_batches: int = 1, phase: tuple | None = None) -> jax.stages.Lowered:
        """Traces the training step from shapes; `phase` None is the phase of the last updates."""
        phase = self.phase if phase is None else phase
        with jax.set_mesh(self.mesh):  # the models' constraints refer to it
            step = self.make_step(micro_batches)
            return step.lower(self.abstract, self.batch, self.frozen, *phase)

    def _fit(self, phase: tuple) -> jax.stages.Compiled:
        """Compiles the step, with micro-batches doubled until the step fits the memory."""
        # Each phase begins anew, so that a resumed run cuts as the uninterrupted one did.
        count, limit = self.micro_batches, memory_limit()
        while True:
            compiled = self.lower(count, phase).compile()
            needed = memory_needed(compiled)
            if limit is None or needed is None or needed <= limit:
                # Gloo waits 30 s for a group of processes that meets for the first time, and some
                # find in a cache what others compile.
                processes.smallest(count)
                return compiled
            self._check_divisible(count, needed, limit)
            count *= 2
            logging.warning(
                "a step needs %.1f GiB of %.1f GiB: the batch of %d is cut into %d micro-batches;"
                " statistics of a batch, where there are any, are taken over each of them",
                needed / 2**30, limit / 2**30, self._global_batch, count,
            )  # fmt: skip

    @property
    def _global_batch(self) -> int:
        return jax.tree.leaves(self.batch)[0].shape[0]

    def _check_divisible(self, count: int, needed: int, limit: int) -> None:
        """Raises ConfigError unless the batch divides into twice as many micro-batches."""
        if self._global_batch % (parallel.batch_shards(self.mesh) * count * 2):
            raise ConfigError(
                f"a step needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB even in"
                f" {count} micro-batch(es): lower train.global_batch or set train.remat"
            )


def make(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    create: Callable[[], Any],
    make_step: Callable[[int, Any], Callable],
    *,
    frozen: Any,
    batch: Any,
    phase: tuple = (),
) -> Program:
    """Makes the program of a training step on a mesh; nothing is computed yet.

    Args:
        config: of the run.
        mesh: devices of the run, or an abstract mesh.
        create: function without arguments that makes the first state.
        make_step: function from a number of micro-batches and shardings of the state to a jitted
            step.
        frozen: parameters that never change: arrays or `jax.ShapeDtypeStruct`.
        batch: shapes of a global batch: tree of `jax.ShapeDtypeStruct`.
        phase: static arguments of the step in the last updates of the run.

    Raises:
        ConfigError: a sharding rule does not fit, or the devices lack a kind of memory; see
            `parallel.shardings` and `parallel.place_average`.
    """
    shapes = jax.eval_shape(create)
    placed = parallel.state_shardings(shapes, mesh, config)
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)
    return Program(
        mesh=mesh,
        create=jax.jit(create, out_shardings=placed),
        abstract=parallel.with_shardings(shapes, placed),
        make_step=lambda micro_batches: make_step(micro_batches, placed),
        frozen=jax.tree.map(lambda x: _put(x, whole), frozen),
        batch=parallel.with_shardings(batch, split),
        phase=phase,
        micro_batches=config.train.micro_batches,
    )


def _put(x: Any, sharding: jax.sharding.Sharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return parallel.with_shardings(x, sharding)
    return jax.device_put(x, sharding)


def accumulate(
    gradients: Callable[[Any, jax.Array], tuple[Any, Any]],
    batch: Any,
    rng: jax.Array,
    micro_batches: int,
    join: Callable[[Any], Any] = lambda rest: rest,
) -> tuple[Any, Any]:
    """Computes gradients of a batch, one micro-batch after the other, and averages them.

    Args:
        gradients: function from a micro-batch and a key to a tree to be averaged and a tree of
            other values.
        batch: tree of arrays [b ...].
        rng: key of the update; each micro-batch gets a key of its own.
        micro_batches: k; 1 calls `gradients` on the whole batch with `rng` itself.
        join: function from the other values of all micro-batches, stacked [k ...], to the other
            values of the batch.

    Returns:
        The mean over micro-batches, and the joined other values.
    """
    if micro_batches == 1:
        return gradients(batch, rng)

    # Every device keeps its share of each micro-batch: example i goes to micro-batch i % k.
    def split(x):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)  # [k b/k ...]

    def add(total, inputs):
        mean, rest = gradients(*inputs)
        return jax.tree.map(jnp.add, total, mean), rest

    inputs = jax.tree.map(split, batch), jax.random.split(rng, micro_batches)
    # From zeros, not from the first micro-batch: its program is compiled once, inside the scan.
    shapes, _ = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], inputs))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, rest = jax.lax.scan(add, start, inputs)
    return jax.tree.map(lambda x: x / micro_batches, total), join(rest)


def memory_needed(compiled: jax.stages.Compiled) -> int | None:
    """Returns the number of bytes per device that a compiled program needs; None if unknown."""
    return None if compiled.memory_analysis() is None else sum(memory_of(compiled).values())


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the numbers of bytes per device of a compiled program by use, such as "arguments"."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }


def memory_limit() -> int | None:
    """Returns the number of bytes of a device's memory, least of all processes; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = processes.smallest(stats.get("bytes_limit", -1))  # all have to choose alike
    return None if limit < 0 else limit
