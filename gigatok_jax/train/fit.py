"""Compiles the step of each phase, cut into micro-batches until it fits the devices' memory."""

from collections.abc import Callable

import jax
from absl import logging

from gigatok_jax import parallel
from gigatok_jax.errors import ConfigError
from gigatok_jax.run import processes


class FittedStep:
    """`step(state, batch, frozen, *phase)` for a training loop; compiles each phase once."""

    def __init__(self, make: Callable, mesh: jax.sharding.Mesh, micro_batches: int):
        """Args:
        make: micro-batches to a jitted step of (state, batch, frozen, *phase); the batch is a
            tree of arrays, the phase what is static.
        mesh: devices of the run.
        micro_batches: to begin with; doubled while the step needs more memory than there is.
        """
        self._make, self._mesh, self._micro_batches = make, mesh, micro_batches
        self._compiled = {}

    def __call__(self, state, batch, frozen, *phase):
        if phase not in self._compiled:
            self._compiled[phase] = self._fit(state, batch, frozen, *phase)
        return self._compiled[phase](state, batch, frozen)

    def _fit(self, *arguments):
        """The compiled step with the fewest micro-batches that fit.

        Raises:
            ConfigError: not even one image at a time and device fits.
        """
        # Each phase begins anew, so that a resumed run cuts as the uninterrupted one did.
        batch = jax.tree.leaves(arguments[1])[0].shape[0]
        limit, parts = memory_limit(), self._micro_batches
        while True:
            with jax.set_mesh(self._mesh):  # what the models' constraints refer to
                compiled = self._make(parts).lower(*arguments).compile()
            needed = memory_needed(compiled)
            if limit is None or needed is None or needed <= limit:
                # Gloo waits 30 s for a group of processes that meets for the first time, and some
                # find in a cache what others compile.
                processes.smallest(parts)
                return compiled
            if batch % (parallel.batch_shards(self._mesh) * parts * 2):
                raise ConfigError(
                    f"a step needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB even in"
                    f" {parts} micro-batches: lower train.global_batch or set"
                    " train.remat"
                )
            parts *= 2
            logging.warning(
                "a step needs %.1f GiB of %.1f GiB: the batch of %d is cut into %d micro-batches;"
                " statistics of a batch, where there are any, are taken over each of them",
                needed / 2**30, limit / 2**30, batch, parts,
            )  # fmt: skip


def memory_needed(compiled) -> int | None:
    """Bytes per device of a compiled program with its arguments; None where nobody knows."""
    return None if compiled.memory_analysis() is None else sum(memory_of(compiled).values())


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device by what they hold."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }


def memory_limit() -> int | None:
    """Bytes that every device offers; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = processes.smallest(stats.get("bytes_limit", -1))  # all have to choose alike
    return None if limit < 0 else limit
