"""Checks of the values of a training config, and the number of steps that follows from them."""

from typing import Any

import ml_collections

from gigatok_jax import errors, losses
from gigatok_jax.errors import ConfigError
from gigatok_jax.model_config import validate
from gigatok_jax.models import layers

NO_END = float("inf")
AT_LEAST_1 = ("train.global_batch", "train.micro_batches", "train.epoch_images", "eval.batch")
SHARES = ("optim.beta1", "optim.beta2", "optim.ema")
NOT_NEGATIVE = (
    *("train.steps", "train.epochs", "optim.warmup_steps", "optim.warmup_epochs"),
    *("optim.learning_rate", "optim.discriminator_learning_rate", "optim.end_learning_rate"),
    *("optim.weight_decay", "codebook.reset_every", "codebook.warmup_steps"),
    *("eval.every", "save.every", "save.milestone_every", "log.every", "log.pictures_every"),
    *("data.workers", "data.max_unreadable", "data.eval_images", "data.min_size"),
)
RANGES = {  # both ends included
    "seed": (0, 2**32 - 1),  # what a key of jax.random holds
    **dict.fromkeys(AT_LEAST_1, (1, NO_END)),
    **dict.fromkeys(SHARES, (0, 1)),
    **dict.fromkeys(NOT_NEGATIVE, (0, NO_END)),
}
BELOW_1 = ("train.dropout", "train.token_dropout", "train.class_dropout", "train.drop_path")
CHOICES = {
    "train.dtype": ("bfloat16", "float32"),
    "train.first_weights": ("published", "geometry"),
    "train.statistics": ("global", "local"),
    "loss.discriminator": ("patchgan", "dino", "none"),
    "loss.adversarial_type": losses.ADVERSARIAL,
    "loss.missing_weights": ("refuse", "skip"),
}
PLATFORMS = ("cpu", "gpu", "tpu")


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a training config, before data are read or steps compiled.

    Raises:
        ConfigError: a value is outside its range; the error names the value and the range.
    """
    validate(config.model)
    for name, (low, high) in RANGES.items():
        value = _get(config, name)
        if value is not None and not low <= value <= high:
            end = f" to {high}" if high < NO_END else " or more"
            raise ConfigError(f"{name} is {value}, expected {low}{end}")
    for name in BELOW_1:
        value = _get(config, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}, expected 0 to below 1")
    for name, choices in CHOICES.items():
        value = _get(config, name)
        if value is not None:
            errors.one_of(name, value, choices)
    if _get(config, "train.first_weights") == "geometry" and config.model.kind == "2d":
        raise ConfigError(
            "train.first_weights is 'geometry', which is for 1D tokenizers, but model.kind is '2d':"
            " set --config.train.first_weights=published"
        )
    make_loop(config.train)
    if total_steps(config) < 1:
        raise ConfigError("a run of no steps: set train.steps or train.epochs above 0")


def _get(config: ml_collections.ConfigDict, name: str) -> Any:
    """Returns the value of a config's key such as "optim.ema"; None if the config lacks the key."""
    section, _, key = name.rpartition(".")
    return (config.get(section, {}) if section else config).get(key)


def total_steps(config: ml_collections.ConfigDict) -> int:
    """Returns the number of updates of a run, from `train.steps` or else from `train.epochs`."""
    return config.train.steps or round(config.train.epochs * steps_per_epoch(config))


def steps_per_epoch(config: ml_collections.ConfigDict) -> float:
    """Returns the number of updates of an epoch of `train.epoch_images` images."""
    return config.train.epoch_images / config.train.global_batch


def make_loop(train: ml_collections.ConfigDict) -> layers.Loop:
    """Makes the settings of how stacks of blocks are compiled, of `train.remat` and `train.unroll`.

    Raises:
        ConfigError: a value is unknown.
    """
    errors.one_of("train.remat", train.remat, layers.REMAT)
    platforms = tuple(filter(None, train.unroll.split(",")))
    if set(platforms) - set(PLATFORMS):
        raise ConfigError(
            f"train.unroll is {train.unroll!r}, expected some of {', '.join(PLATFORMS)} with commas"
            " between them, or nothing"
        )
    return layers.Loop(train.remat, platforms)
