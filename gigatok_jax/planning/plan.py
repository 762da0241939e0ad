"""What a training step would need on devices that may not be there.

Two ways, and every result says which: "compiled for" asks the compiler of the devices, "shape
analysis" has only shapes, shardings and the traced equations.
"""

import contextlib
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gigatok_jax import parallel
from gigatok_jax.planning import hardware, hlo, shapes
from gigatok_jax.train import ar, networks, settings, tokenizer
from gigatok_jax.train import program as program_lib
from gigatok_jax.train.program import Program
from gigatok_jax.weights import load as load_lib

COMPILED, ANALYSED = "compiled for", "shape analysis for"
UTILISATION = 0.5  # of a chip's peak: an assumption of every estimated time
TRACED_BATCH = 256  # large, so that what does not grow with it is lost beside what does
CNN_ON_TPU = 2.1  # compiled temporaries to those counted: XL-XXL on v5p:2x2x2, commit d447d54
SURE = 0.9  # of a device's memory: what shape analysis says to fit leaves the rest
TICK = 15.0  # seconds between signs of life


class Traffic(NamedTuple):
    """Collectives of one kind within groups of one form, of a whole step."""

    kind: str
    bytes: int  # operands of one device, or the result of an all-gather
    near: int  # devices of a group that fast links join
    far: int  # such parts of a group, joined by a network


class Plan(NamedTuple):
    """Of one training step; bytes and FLOPs are those of one device."""

    name: str  # of the config
    where: str
    how: str  # COMPILED or ANALYSED
    chip: hardware.Chip
    mesh: dict[str, int]
    batch: int  # images of all devices
    micro_batches: int
    memory: dict[str, int]
    limit: int | None
    flops: int
    traffic: tuple[Traffic, ...]

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return _fits(self.memory, self.limit, self.how)

    def seconds(self) -> tuple[float, float]:
        """Of computing and of collectives, each alone, on a chip whose speed is known."""
        compute = self.flops / (self.chip.peak * UTILISATION)
        return compute, sum(_seconds(one, self.chip) for one in self.traffic)


def _fits(memory: dict[str, int], limit: int | None, how: str) -> bool:
    return limit is None or sum(memory.values()) <= limit * (SURE if how == ANALYSED else 1)


def _seconds(one: Traffic, chip: hardware.Chip) -> float:
    """Near parts first: a ring over fast links, then one over the network of a share each."""
    if one.kind == "collective-permute":  # from each to one other
        return one.bytes / (chip.network if one.far > 1 else chip.link)
    rounds = 2 if one.kind == "all-reduce" else 1
    near = rounds * one.bytes * (one.near - 1) / one.near / chip.link
    return near + rounds * one.bytes / one.near * (one.far - 1) / one.far / chip.network


def program_of(config, mesh: jax.sharding.Mesh, load: Callable = load_lib.frozen_shapes) -> Program:
    """The training step of a run's config on a mesh; a prior's learns codes.

    Args:
        config: of a run that trains a tokenizer or a prior.
        mesh: devices of the run, there or not.
        load: name and folder of a frozen network to its parameters or, as here, to their shapes.

    Raises:
        GigatokError: what `networks.build` and `program.make` refuse.
    """
    settings.check(config)
    if config.model.kind == "prior":
        return ar.make_program(config, mesh)
    parts = networks.build(config, tokenizer.statistics_groups(config, mesh), load)
    config = config.copy_and_resolve_references()
    config.loss = parts.loss  # without what was left out
    return tokenizer.make_program(config, mesh, parts)


# Shape analysis.


class Traced(NamedTuple):
    """What a config's step is on any mesh."""

    state: Any  # shapes
    frozen: Any
    flops: float  # of an image
    activations: float  # bytes of an image


def trace(config, platform: str) -> Traced:
    """Traces the step of a config on one device that need not be there; seconds for any size.

    Args:
        config: of the run.
        platform: "cpu", "gpu" or "tpu", on which attention and kernels depend.
    """
    config = config.copy_and_resolve_references()
    config.train.global_batch, config.train.micro_batches = TRACED_BATCH, 1
    mesh = abstract_mesh(dict.fromkeys(parallel.AXES, 1), platform)
    program = program_of(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        step = program.make_step(1).trace(
            program.abstract, program.batch, program.frozen, *program.phase
        )
    flops, peak = hlo.flops_of(step.jaxpr), shapes.peak(step.jaxpr)
    if platform == "tpu" and config.model.get("stem") == "cnn":
        peak *= CNN_ON_TPU
    return Traced(program.abstract, program.frozen, flops / TRACED_BATCH, peak / TRACED_BATCH)


def abstract_mesh(sizes: dict[str, int], platform: str = "cpu") -> AbstractMesh:
    """A mesh of devices that nobody asks for."""
    device = AbstractDevice(platform, None, platform)
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, abstract_device=device
    )


def analyse(config, traced: Traced, topology: hardware.Topology) -> Plan:
    """Plan from shapes alone.

    Args:
        config: of the run; its mesh is laid over the topology.
        traced: from `trace` of that config.
        topology: to plan for.

    Raises:
        ConfigError: the mesh does not fit the topology, the batch or the arrays.
    """
    sizes = parallel.axis_sizes(config.mesh, topology.devices)
    mesh = abstract_mesh(sizes)
    batch, parts = config.train.global_batch, config.train.micro_batches
    parallel.check_batch(mesh, batch, parts)
    state = placed(config, traced, mesh)
    limit = topology.limit
    share = batch // parallel.batch_shards(mesh)
    while True:
        memory = _shape_memory(state, traced, share / parts, parts)
        if _fits(memory, limit, ANALYSED) or share % (2 * parts):
            break
        parts *= 2
    return Plan(
        config.name, str(topology), ANALYSED, topology.chip, sizes, batch, parts, memory, limit,
        int(traced.flops * batch / topology.devices),
        _shape_traffic(config.train, state, mesh, topology, parts),
    )  # fmt: skip


def placed(config, traced: Traced, mesh) -> Any:
    """Shapes of a state with their shardings on a mesh."""
    return parallel.with_shardings(
        traced.state, parallel.state_shardings(traced.state, mesh, config)
    )


def _trained(state) -> list:
    """Shapes of all trained parameters."""
    judge = getattr(state, "discriminator", None)
    return jax.tree.leaves((state.params, judge))


def _shape_memory(state, traced: Traced, images: float, parts: int) -> dict[str, int]:
    gradients = parallel.bytes_per_device(_trained(state))
    return {
        "state": parallel.bytes_per_device(state),
        "frozen": parallel.bytes_per_device(traced.frozen),
        "gradients": gradients * (1 if parts == 1 else 2),  # a sum, and those that are added
        "activations": int(traced.activations * images),
    }


def _shape_traffic(
    train, state, mesh, topology: hardware.Topology, parts: int
) -> tuple[Traffic, ...]:
    """Gathered parameters and summed gradients, both in the type that is computed with, as the
    TPU's compiler sends them; what `tensor` sends is not in the shapes."""
    groups, total = _groups(mesh.shape, topology.neighbours), {}
    gathers = 2 if train.remat == "none" else 3  # forwards, again, backwards
    for leaf in _trained(state):
        own = parallel.bytes_per_device([leaf]) * jnp.dtype(train.dtype).itemsize // 4
        divided = "fsdp" in leaf.sharding.spec and mesh.shape["fsdp"] > 1
        if divided:
            whole = own * mesh.shape["fsdp"]
            _add(total, "all-gather", groups["fsdp"], parts * gathers * whole)
            _add(total, "reduce-scatter", groups["fsdp"], parts * whole)
        others = groups["data"] if divided else groups["data+fsdp"]
        if others != (1, 1):
            _add(total, "all-reduce", others, parts * own)
    return tuple(Traffic(kind, count, *group) for (kind, group), count in total.items())


def _add(total: dict, kind: str, group: tuple[int, int], count: int) -> None:
    total[kind, group] = total.get((kind, group), 0) + count


def _groups(shape, neighbours: int) -> dict[str, tuple[int, int]]:
    """Near and far parts of the groups along axes; devices lie in the order of the axes."""
    made, stride = {}, 1
    for axis in reversed(parallel.AXES):
        near = math.gcd(shape[axis], max(1, neighbours // stride))
        made[axis] = (near, shape[axis] // near)
        stride *= shape[axis]
    (a, b), (c, d) = made["data"], made["fsdp"]
    return made | {"data+fsdp": (a * c, b * d)}


# Compilation.


def compile_for(config, topology: hardware.Topology, devices: list) -> Plan:
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
    return Plan(
        config.name, str(topology), COMPILED, topology.chip, dict(mesh.shape),
        config.train.global_batch, parts, memory, limit, found.flops,
        _traffic(found.transfers, topology.neighbours),
    )  # fmt: skip


def _fitted(config, mesh, limit: int | None, what: str):
    """Micro-batches, memory and text of the first program that fits, or of the last one tried."""
    batch, parts = config.train.global_batch, config.train.micro_batches
    parallel.check_batch(mesh, batch, parts)
    program = program_of(config, mesh)
    held = parallel.bytes_per_device((program.abstract, program.frozen))
    most = parts * _power_of_two(batch // parallel.batch_shards(mesh) // parts)
    while True:
        with ticking(f"compiling {what}, micro-batches {parts}"):
            memory, text = _compile(program.lower(parts), mesh)
        if _fits(memory, limit, COMPILED) or parts == most:
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


def _traffic(transfers: tuple[hlo.Transfer, ...], neighbours: int) -> tuple[Traffic, ...]:
    total = {}
    for one in transfers:
        _add(total, one.kind, _parted(one, neighbours), one.bytes * one.times)
    return tuple(Traffic(kind, count, *group) for (kind, group), count in total.items())


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
