"""Plans a training step by compiling it: memory is the compiler's, FLOPs and traffic its HLO's."""

import collections
import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from ml_collections import ConfigDict

from gigatok_jax import parallel
from gigatok_jax.planning import hardware, hlo, plan
from gigatok_jax.train import program as program_lib

TICK = 15.0  # seconds


def compile_for(
    config: ConfigDict, topology: hardware.Topology, devices: list[jax.Device]
) -> plan.Plan:
    """Compiles a training step for devices, present or not, and returns its plan.

    The number of micro-batches is doubled until the step fits or the batch divides no further.

    Args:
        config: of a run that trains; its mesh spans the devices.
        topology: name and limits of the devices.
        devices: from `hardware.compiler` or `jax.devices`.

    Raises:
        ConfigError: the mesh does not fit the devices, the batch or the arrays.
    """
    mesh = parallel.make_mesh(config.mesh, devices)
    limit = topology.limit
    micro_batches, memory, text = _fitted(config, mesh, limit, f"{config.name} for {topology}")
    work = hlo.walk(text) if text else hlo.Work()
    if work.unknown_loops:
        logging.warning("loops of unknown length count once: %s", ", ".join(work.unknown_loops))
    return plan.Plan(
        config.name, str(topology), plan.COMPILED, topology.chip, dict(mesh.shape),
        config.train.global_batch, micro_batches, memory, limit, work.flops,
        _traffic(work.transfers, topology.neighbours),
    )  # fmt: skip


def _fitted(
    config: ConfigDict, mesh: jax.sharding.Mesh, limit: int | None, what: str
) -> tuple[int, dict[str, int], str | None]:
    """Compiles a training step with more and more micro-batches until the step fits its devices.

    Returns:
        Number of micro-batches, number of bytes by use, and HLO text of the first program that
        fits, or of the last program tried; no text if the compiler refused that program.
    """
    batch, parts = config.train.global_batch, config.train.micro_batches
    parallel.check_batch(mesh, batch, parts)
    program = plan.program_of(config, mesh)
    held = parallel.bytes_per_device((program.abstract, program.frozen))
    share = batch // parallel.batch_shards(mesh) // parts
    most = parts * (share & -share)  # times the largest power of two that divides the share
    while True:
        with ticking(f"compiling {what}, micro-batches {parts}"):
            memory, text = _compile(program.lower(parts), mesh)
        if plan.fits(memory, limit, plan.COMPILED) or parts == most:
            return parts, memory, text
        needed = sum(memory.values())
        logging.warning("%s: %.1f GiB per device do not fit", what, needed / hardware.GIB)
        tried, parts = parts, parts * 2
        # Compiling takes minutes, so counts are skipped that would not fit even if all memory but
        # the state's shrank in proportion.
        while parts < most and held + (needed - held) / (parts / tried) > limit:
            parts *= 2


# The TPU compiler says "Used 20.5G of 15.75G hbm", "temporaries (224G) exceeds available HBM"
_REFUSED = r"([\d.]+)([KMG])\)? (?:of [\d.]+[KMG] hbm|exceeds available HBM)"


def _compile(
    lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> tuple[dict[str, int], str | None]:
    """Compiles a lowered program; returns its number of bytes per device by use, and its HLO text.

    The text is None if the compiler refused the program's size.
    """
    try:
        with jax.set_mesh(mesh):  # kernels are traced while the compiler runs, and ask for devices
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(_REFUSED, str(error)):
            unit = {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
            return {"at least, which the compiler refused": int(float(match[1]) * unit)}, None
        raise
    return program_lib.memory_of(compiled), compiled.as_text()


def _traffic(transfers: tuple[hlo.Transfer, ...], neighbours: int) -> tuple[plan.Traffic, ...]:
    """Sums the bytes of a step's transfers into one record for each kind and form of groups."""
    total = collections.Counter()
    for transfer in transfers:
        total[transfer.kind, _form(transfer, neighbours)] += transfer.bytes * transfer.times
    return tuple(plan.Traffic(kind, count, *group) for (kind, group), count in total.items())


def _form(transfer: hlo.Transfer, neighbours: int) -> tuple[int, int]:
    """Returns how a transfer's groups of devices lie: `near` and `far` of `plan.Traffic`."""
    if transfer.kind == "collective-permute":
        pairs = transfer.groups
        crosses = any(len({device // neighbours for device in pair}) > 1 for pair in pairs)
        return (1, 2) if crosses else (2, 1)
    group = transfer.groups[0]
    hosts = {device // neighbours for device in group}
    return len(group) // len(hosts), len(hosts)


@contextlib.contextmanager
def ticking(what: str) -> Iterator[None]:
    """Prints the elapsed seconds on stderr every `TICK` seconds while the `with` block runs."""
    start, done = time.monotonic(), threading.Event()

    def tick():
        while not done.wait(TICK):
            print(f"{what} ... {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
