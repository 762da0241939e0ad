"""Values of a training config: their ranges and choices, and the lengths that follow from them."""

from typing import Any

from gigatok_jax import errors
from gigatok_jax.errors import ConfigError
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
PLATFORMS = ("cpu", "gpu", "tpu")


def check_values(config) -> None:
    """Refuses numbers that no run can have, before anything is read.

    Raises:
        ConfigError: with the range of the first that is outside it.
    """
    for name, (low, high) in RANGES.items():
        part, _, key = name.rpartition(".")
        values = config.get(part, {}) if part else config
        if key in values and not low <= values[key] <= high:
            to = f" to {high}" if high < NO_END else " or more"
            raise ConfigError(f"{name} is {values[key]}, expected {low}{to}")
    if total_steps(config) < 1:
        raise ConfigError("a run of no steps: set train.steps or train.epochs above 0")


def total_steps(config) -> int:
    """Updates of the whole run: `train.steps`, or else `train.epochs` worth of them."""
    return config.train.steps or round(config.train.epochs * steps_per_epoch(config))


def steps_per_epoch(config) -> float:
    """An epoch is `train.epoch_images` images whatever the data holds."""
    return config.train.epoch_images / config.train.global_batch


def make_loop(train: Any) -> layers.Loop:
    """How the stacks of blocks are compiled: `train.remat` and `train.unroll` of a config.

    Raises:
        ConfigError: a value that is unknown.
    """
    errors.one_of("train.remat", train.remat, layers.REMAT)
    platforms = tuple(filter(None, train.unroll.split(",")))
    if set(platforms) - set(PLATFORMS):
        raise ConfigError(
            f"train.unroll is {train.unroll!r}, expected some of {', '.join(PLATFORMS)} with commas"
            " between them, or nothing"
        )
    return layers.Loop(train.remat, platforms)
