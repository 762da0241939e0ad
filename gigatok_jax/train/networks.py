"""Networks of a tokenizer's training run, and weights of the frozen networks among them."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from absl import logging

from gigatok_jax.errors import ConfigError
from gigatok_jax.model_config import grid_size
from gigatok_jax.models import dino, discriminator, perceptual, tokenizer
from gigatok_jax.train import settings
from gigatok_jax.weights.frozen import available, load_frozen


class Networks(NamedTuple):
    """Record of the modules of a tokenizer run; None for a network whose loss is off."""

    tokenizer: nn.Module
    discriminator: nn.Module | None = None
    lpips: nn.Module | None = None
    teacher: nn.Module | None = None


class Parts(NamedTuple):
    """Record of a tokenizer run's networks, frozen parameters, and losses that weights allow."""

    networks: Networks
    frozen: dict  # parameters by name: "lpips", "teacher", "dino"
    loss: ml_collections.ConfigDict  # `config.loss` without what was left out


def build(config: ml_collections.ConfigDict, groups: int, load: Callable = load_frozen) -> Parts:
    """Makes the modules and loads the frozen weights of a tokenizer run.

    Args:
        config: of the run.
        groups: number of parts of a batch that have batch statistics of their own.
        load: function from name and folder of a frozen network to its parameters or their shapes.

    Raises:
        MissingWeightsError: a loss needs weights that are not on this machine, and
            `loss.missing_weights` is "refuse"; with "skip" the loss is left out, which is logged.
        ConfigError: a batch or an image size that a network cannot take.
    """
    _check_groups(config)
    loop = settings.make_loop(config.train)
    dtype = jnp.dtype(config.train.dtype)
    loss = config.loss.copy_and_resolve_references()
    frozen = _load(config, loss, load)
    networks = Networks(
        tokenizer.make(config.model, dtype, loop),
        _discriminator(loss, groups, dtype),
        perceptual.LPIPS(dtype=dtype) if "lpips" in frozen else None,
        dino.teacher(loss.teacher, dtype) if "teacher" in frozen else None,
    )
    return Parts(networks, frozen, loss)


def _check_groups(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError if the DINO discriminator cannot divide a batch into equal groups."""
    at_once = config.train.global_batch // max(config.train.micro_batches, 1)
    groups = -(-at_once // discriminator.GROUP)
    if config.loss.discriminator == "dino" and groups and at_once % groups:
        raise ConfigError(
            f"{at_once} images at once are not {groups} equal groups, over which the DINO"
            f" discriminator takes its statistics: choose a multiple of {discriminator.GROUP}"
        )


def _load(config, loss, load) -> dict:
    """Loads frozen parameters by name; switches losses off in `loss` where weights are left out."""
    wanted = {}
    if loss.perceptual > 0:
        wanted["lpips"] = ("lpips-vgg16", "perceptual", 0.0)
    if loss.alignment > 0 and loss.teacher != "none" and _teacher_fits(config.model, loss):
        wanted["teacher"] = (loss.teacher, "teacher", "none")
    if loss.discriminator == "dino":
        wanted["dino"] = ("dino-s16", "discriminator", "none")
    frozen = {}
    for key, (name, field, off) in wanted.items():
        if loss.missing_weights == "skip" and not available(name, config.weights.folder):
            logging.warning("weights of %s are not here: loss.%s is left out", name, field)
            loss[field] = off
        else:
            frozen[key] = load(name, config.weights.folder)
    return frozen


def _teacher_fits(model, loss) -> bool:
    """Whether an alignment is possible: the model has a block to align, and teacher and grid agree.

    If the grids differ, sets `loss.teacher` to "none" under `loss.missing_weights` "skip".

    Raises:
        ConfigError: the grids differ, and `loss.missing_weights` is not "skip".
    """
    if not model.align_block:
        return False
    if grid_size(model) == dino.GRID:
        return True
    reason = (
        f"loss.teacher {loss.teacher} sees {dino.GRID}x{dino.GRID} tokens, an image of"
        f" {model.image_size} px has {grid_size(model)}x{grid_size(model)}"
    )
    if loss.missing_weights != "skip":
        raise ConfigError(f"{reason}: set --config.loss.teacher=none")
    logging.warning("%s: it is left out", reason)
    loss.teacher = "none"
    return False


def _discriminator(loss, groups: int, dtype):
    if loss.discriminator == "none":
        return None
    if loss.discriminator == "patchgan":
        return discriminator.PatchGAN(loss.discriminator_filters, groups=groups, dtype=dtype)
    return discriminator.DinoDiscriminator(dtype=dtype)
