"""The smallest networks and runs that still pass through every part of training."""

import atexit
import contextlib
import functools
import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from configs import common
from gigatok_jax.models import cnn, discriminator, qformer, quantizer, tokenizer
from gigatok_jax.train import networks as networks_lib
from gigatok_jax.train import optim, tokenizer_step
from gigatok_jax.train import tokenizer as loop

ROOT = pathlib.Path(__file__).parents[2]
PYTHONPATH = f"{ROOT}/tests:{ROOT}/tests/helpers:{ROOT}"  # of processes that tests start
SIZE, PATCH, ROWS = 32, 8, 32  # pixels a side, pixels per token, codebook rows


class Mixer(nn.Module):
    """One linear layer in the place of a transformer: few parameters compile fast."""

    grid: int = 0  # tokens a side of the decoder's output; 0 is the encoder
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        out = nn.Dense(cnn.TOKEN_WIDTH, dtype=self.dtype, name="mix")(flat)
        if not self.grid:
            return qformer.Encoded(flat, out)
        return qformer.Decoded(None, None, out.reshape(-1, self.grid, self.grid, out.shape[-1]))


class PlainJudge(nn.Module):
    """A discriminator whose examples do not see each other."""

    @nn.compact
    def __call__(self, x, train):
        del train
        return nn.Conv(1, (8, 8), (8, 8), name="conv")(nn.gelu(nn.Conv(4, (3, 3), name="in")(x)))


def linear_tokenizer(dtype=jnp.float32) -> tokenizer.Tokenizer:
    """A tokenizer with the real stems and quantizer around two linear layers."""
    parts = cnn.PatchEncoder(PATCH, dtype), Mixer(0, dtype), quantizer.VectorQuantizer(ROWS, 4)
    return tokenizer.Tokenizer(
        *parts, Mixer(SIZE // PATCH, dtype), cnn.PatchDecoder(PATCH, dtype), dtype
    )


def config(**loss):
    """A training config of the linear tokenizer: all losses that need no frozen network."""
    made = common.tokenizer("tiny", "S-S", **model())
    made.data.update(source="digits", workers=0, crop="center", flip=False)
    made.train.update(steps=8, global_batch=8, dtype="float32")
    made.optim.update(learning_rate=1e-3, discriminator_learning_rate=1e-3, ema=0.9)
    made.loss.update(discriminator_filters=4, teacher="none", perceptual=0.0, entropy=0.02)
    # At the published 0.01 the entropy's gradient holds rounding a hundredfold.
    made.loss.update(missing_weights="skip", entropy_temperature=1.0)
    made.loss.update(loss)
    return made


def model(**fields):
    """Fields of the smallest model that a config can name."""
    small = {"image_size": SIZE, "stem": "patch", "patch_size": PATCH, "latent_tokens": 4}
    small |= {"encoder": "pico", "decoder": "pico", "codebook_size": ROWS, "align_block": 0}
    return small | fields


def optimizers(made, rate=None, discriminator_rate=None) -> tokenizer_step.Optimizers:
    """Optimizers of a config; the rates are functions of the step, 1e-3 unless given."""
    same = optim.make_optimizer(made.optim)
    constant = lambda step: jnp.float32(1e-3)  # noqa: E731
    return tokenizer_step.Optimizers(same, same, rate or constant, discriminator_rate or constant)


def networks(groups: int = 1, judge=None, dtype=jnp.float32) -> networks_lib.Networks:
    judge = judge or discriminator.PatchGAN(4, groups=groups, dtype=dtype)
    return networks_lib.Networks(linear_tokenizer(dtype), judge)


def first_state(parts: networks_lib.Networks, made) -> tokenizer_step.TokenizerState:
    """A first state, drawn by numpy: no initialiser is compiled."""
    create = functools.partial(tokenizer_step.create, parts, optimizers(made), SIZE, 0)
    shapes = jax.eval_shape(create)
    rng = np.random.default_rng(0)

    def fill(tree):
        draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype)  # noqa: E731
        return jax.tree.map(draw, tree)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.replace(rng=None))
    return zeros.replace(
        rng=jax.random.key(0),
        params=fill(shapes.params),
        ema_params=fill(shapes.params),
        discriminator=fill(shapes.discriminator),
        discriminator_stats=jax.tree.map(
            lambda x: jnp.ones(x.shape, x.dtype), shapes.discriminator_stats
        ),
    )


def images(count: int = 8, seed: int = 1) -> np.ndarray:
    """uint8[count SIZE SIZE 3]"""
    small = np.random.default_rng(seed).integers(0, 256, (count, SIZE // 4, SIZE // 4, 3))
    return np.repeat(np.repeat(small, 4, 1), 4, 2).astype(np.uint8)


# Whole runs, through configs.

SCRIPT = """
import sys, tiny

with tiny.small_programs(sys.argv[1]):
    tiny.train(sys.argv[2])
"""
OPTIONS = {  # ours, and what jax starts with
    "jax_disable_most_optimizations": (True, False),
    "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
    "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
}


@contextlib.contextmanager
def small_programs(cache):
    """Runs train the linear tokenizer; what is compiled is kept in the folder `cache`."""
    made = tokenizer.make
    tokenizer.make = lambda model, dtype=jnp.float32, loop=None: linear_tokenizer(dtype)
    _configure({name: ours for name, (ours, _) in OPTIONS.items()}, str(cache))
    try:
        yield
    finally:
        tokenizer.make = made
        _configure({name: start for name, (_, start) in OPTIONS.items()}, None)


def _configure(options, cache):
    for name, value in (options | {"jax_compilation_cache_dir": cache}).items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run_config():
    """Eight steps in two phases, which change at step 4; saved every other step."""
    made = config(shortcut_end=4, discriminator_start=4)
    made.codebook.update(data_init=True, reset_every=3)
    made.save.update(every=2, keep=9, milestone_every=0)
    made.eval.update(every=4, batch=60)
    made.log.update(every=1, pictures_every=4)
    return made


def train(workdir, made=None) -> None:
    loop.train(made or run_config(), workdir)


@functools.cache
def session() -> pathlib.Path:
    """A folder that goes when the tests end."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)


@functools.cache
def finished_run() -> pathlib.Path:
    """The workdir of an uninterrupted run, made under `small_programs`; not to be changed."""
    train(session() / "whole")
    return session() / "whole"
