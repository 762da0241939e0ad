"""Plans: the memory, FLOPs and traffic that a training step needs on devices, present or not.

A plan says whether it is compiled (`compiled.compile_for`) or estimated from shapes, shardings and
traced equations (`shapes.analyse`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from gigatok_jax.planning import hardware
from gigatok_jax.train import ar, networks, settings, tokenizer
from gigatok_jax.train.program import Program
from gigatok_jax.weights.frozen import frozen_shapes

COMPILED, ANALYSED = "compiled for", "shape analysis for"
UTILISATION = 0.5  # share of a chip's peak FLOP/s that estimated times assume
SURE = 0.9  # share of a device's memory that a plan by shape analysis may fill


class Traffic(NamedTuple):
    """Record of the collectives of one kind in groups of one form, summed over a training step."""

    kind: str
    bytes: int  # on each device: of the operands, or of the result of an all-gather
    near: int  # devices of a group in one slice or host, joined by fast links
    far: int  # slices or hosts of a group, joined by a network


class Plan(NamedTuple):
    """Record of what one training step needs; numbers of bytes and FLOPs are per device."""

    name: str  # of the config
    where: str  # devices, such as "v5p:4x4x4"
    how: str  # COMPILED or ANALYSED
    chip: hardware.Chip
    mesh: dict[str, int]
    batch: int  # images of all devices
    micro_batches: int
    memory: dict[str, int]  # bytes by use
    limit: int | None  # bytes; None if unknown
    flops: int
    traffic: tuple[Traffic, ...]

    @property
    def needed(self) -> int:
        """Number of bytes of memory that the step needs on each device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is within the device's limit, with a margin for shape analysis."""
        return fits(self.memory, self.limit, self.how)

    def seconds(self) -> tuple[float, float]:
        """Estimates the seconds of computing and the seconds of collectives, each alone.

        The speeds of the chip have to be known.
        """
        compute = self.flops / (self.chip.peak * UTILISATION)
        return compute, sum(_seconds(group, self.chip) for group in self.traffic)


def fits(memory: dict[str, int], limit: int | None, how: str) -> bool:
    """Returns whether `memory`, bytes by use, fits in a device's `limit` bytes; None: always fits.

    A plan of `how` ANALYSED, by shape analysis, may fill only the share SURE of the limit.
    """
    return limit is None or sum(memory.values()) <= limit * (SURE if how == ANALYSED else 1)


def _seconds(traffic: Traffic, chip: hardware.Chip) -> float:
    """Estimates the seconds that collectives of one kind take on a chip.

    A ring over fast links is followed by a ring over the network for each device's share.
    """
    if traffic.kind == "collective-permute":  # each device sends to one other
        return traffic.bytes / (chip.network if traffic.far > 1 else chip.link)
    rounds = 2 if traffic.kind == "all-reduce" else 1
    near = rounds * traffic.bytes * (traffic.near - 1) / traffic.near / chip.link
    return (
        near
        + rounds * traffic.bytes / traffic.near * (traffic.far - 1) / traffic.far / chip.network
    )


def program_of(
    config: ConfigDict, mesh: jax.sharding.Mesh, load: Callable = frozen_shapes
) -> Program:
    """Builds the training program of a run's config on a mesh, without running it.

    Args:
        config: of a run that trains a tokenizer, or a prior on codes.
        mesh: devices of the run, present or not.
        load: function of name and folder that returns a frozen network's parameters, or their
            shapes.

    Raises:
        GigatokError: `settings.check`, `networks.build` or `program.make` rejects the config.
    """
    settings.check(config)
    if config.model.kind == "prior":
        return ar.make_program(config, mesh)
    parts = networks.build(config, tokenizer.statistics_groups(config, mesh), load)
    config = config.copy_and_resolve_references()
    config.loss = parts.loss  # without the losses that were left out
    return tokenizer.make_program(config, mesh, parts)
