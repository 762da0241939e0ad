"""Plans from the program that the compiler of the devices makes of a step."""

import collections
import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging

from gigatok_jax import parallel
from gigatok_jax.planning import hardware, hlo, plan
from gigatok_jax.train import program as program_lib

TICK = 15.0  # seconds between signs of life


def compile_for(config, topology: hardware.Topology, devices: list) -> plan.Plan:
    """Plan from the program that the devices' compiler makes of the step.

    Args:
        config: of the run; its mesh is laid over the devices.
        topology: of the devices.
        devices: from `hardware.compiler`.

    Raises:
        ConfigError: the mesh does not fit the devices, the batch or the arrays.
    """
    mesh = parallel.make_mesh(config.mesh, devices)
    limit = topology.limit
    parts, memory, text = _fitted(config, mesh, limit, f"{config.name} for {topology}")
    found = hlo.walk(text) if text else hlo.Done()
    if found.unknown_loops:
        logging.warning("loops of unknown length count once: %s", ", ".join(found.unknown_loops))
    return plan.Plan(
        config.name, str(topology), plan.COMPILED, topology.chip, dict(mesh.shape),
        config.train.global_batch, parts, memory, limit, found.flops,
        _traffic(found.transfers, topology.neighbours),
    )  # fmt: skip


def _fitted(config, mesh, limit: int | None, what: str):
    """Micro-batches, memory and text of the first program that fits, or of the last one tried."""
    batch, parts = config.train.global_batch, config.train.micro_batches
    parallel.check_batch(mesh, batch, parts)
    program = plan.program_of(config, mesh)
    held = parallel.bytes_per_device((program.abstract, program.frozen))
    most = parts * _power_of_two(batch // parallel.batch_shards(mesh) // parts)
    while True:
        with ticking(f"compiling {what}, micro-batches {parts}"):
            memory, text = _compile(program.lower(parts), mesh)
        if plan.fits(memory, limit, plan.COMPILED) or parts == most:
            return parts, memory, text
        needed = sum(memory.values())
        logging.warning("%s: %.1f GiB do not fit", what, needed / hardware.GIB)
        tried, parts = parts, parts * 2
        # As if all but the state were cut alike: programs that take minutes are not tried for it.
        while parts < most and held + (needed - held) / (parts / tried) > limit:
            parts *= 2


def _power_of_two(count: int) -> int:
    """The largest that divides a count."""
    return count & -count


# The TPU compiler's words: "Used 20.5G of 15.75G hbm", "temporaries (224G) exceeds available HBM".
_REFUSED = r"([\d.]+)([KMG])\)? (?:of [\d.]+[KMG] hbm|exceeds available HBM)"


def _compile(lowered: jax.stages.Lowered, mesh) -> tuple[dict[str, int], str | None]:
    """Memory of a device, and the program; no program where the compiler refused its size."""
    try:
        with jax.set_mesh(mesh):  # kernels are traced while the compiler runs, and ask for devices
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(_REFUSED, str(error)):
            unit = {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
            return {"at least, which the compiler refused": int(float(found[1]) * unit)}, None
        raise
    return program_lib.memory_of(compiled), compiled.as_text()


def _traffic(transfers: tuple[hlo.Transfer, ...], neighbours: int) -> tuple[plan.Traffic, ...]:
    total = collections.Counter()
    for one in transfers:
        total[one.kind, _parted(one, neighbours)] += one.bytes * one.times
    return tuple(plan.Traffic(kind, count, *group) for (kind, group), count in total.items())


def _parted(one: hlo.Transfer, neighbours: int) -> tuple[int, int]:
    if one.kind == "collective-permute":
        crosses = any(len({device // neighbours for device in pair}) > 1 for pair in one.groups)
        return (1, 2) if crosses else (2, 1)
    group = one.groups[0]
    parts = {device // neighbours for device in group}
    return len(group) // len(parts), len(parts)


@contextlib.contextmanager
def ticking(what: str) -> Iterator[None]:
    """Tells the time on stderr while something takes long."""
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
