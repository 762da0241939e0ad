"""What a run would need on devices that may not be there."""

from collections.abc import Callable

import jax

from gigatok_jax import load as load_lib
from gigatok_jax.train import ar, networks, tokenizer
from gigatok_jax.train.program import Program


def program_of(config, mesh: jax.sharding.Mesh, load: Callable = load_lib.frozen_shapes) -> Program:
    """The training step of a run's config on a mesh; a prior's learns codes.

    Args:
        config: of a run that trains a tokenizer or a prior.
        mesh: devices of the run, there or not.
        load: name and folder of a frozen network to its parameters or, as here, to their shapes.

    Raises:
        GigatokError: what `networks.build` and `program.make` refuse.
    """
    if config.model.kind == "prior":
        return ar.make_program(config, mesh)
    parts = networks.build(config, tokenizer.statistics_groups(config, mesh), load)
    config = config.copy_and_resolve_references()
    config.loss = parts.loss  # without what was left out
    return tokenizer.make_program(config, mesh, parts)
