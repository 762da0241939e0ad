"""What a training step would need on devices that may not be there.

Two ways, and every result says which: "compiled for" asks the compiler of the devices, "shape
analysis" has only shapes, shardings and the traced equations.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gigatok_jax.planning import hardware
from gigatok_jax.train import ar, networks, settings, tokenizer
from gigatok_jax.train.program import Program
from gigatok_jax.weights import load as load_lib

COMPILED, ANALYSED = "compiled for", "shape analysis for"
UTILISATION = 0.5  # of a chip's peak: an assumption of every estimated time
SURE = 0.9  # of a device's memory: what shape analysis says to fit leaves the rest


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
        return fits(self.memory, self.limit, self.how)

    def seconds(self) -> tuple[float, float]:
        """Of computing and of collectives, each alone, on a chip whose speed is known."""
        compute = self.flops / (self.chip.peak * UTILISATION)
        return compute, sum(_seconds(one, self.chip) for one in self.traffic)


def fits(memory: dict[str, int], limit: int | None, how: str) -> bool:
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
