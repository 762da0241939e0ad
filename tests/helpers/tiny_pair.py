"""The smallest tokenizer and prior that fit each other, as checkpoints with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from configs import generate as generate_config
from gigatok_jax import library, model_config
from gigatok_jax.evaluation import generation
from gigatok_jax.models import ar
from gigatok_jax.run import checkpoint

TOKENS, CLASSES = (tiny.SIZE // tiny.PATCH) ** 2, 3
PRIOR = {"layers": 1, "heads": 2, "width": 16, "classes": CLASSES}
SCRIPT = """
import sys, tiny, tiny_pair

with tiny.small_programs(sys.argv[1]):
    tiny_pair.generate(*sys.argv[2:4], **eval(sys.argv[4]))
"""


def drawn(module, *inputs, seed=0):
    """Random parameters of a module; no initialiser is compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype), shapes)


def prior(seed=0, **fields):
    """Config and parameters of a prior over the tokenizer's codes."""
    model = model_config("prior-B", **PRIOR | {"vocab": tiny.ROWS, "tokens": TOKENS} | fields)
    params = drawn(ar.make(model), jnp.zeros(1, int), jnp.zeros((1, model.tokens), int), seed=seed)
    return model, params


def tokenizer(seed=0, **fields):
    """Config and parameters of the linear tokenizer."""
    model = model_config("S-S", **tiny.model(latent_tokens=TOKENS) | fields)
    images = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3))
    return model, drawn(tiny.linear_tokenizer(), images, seed=seed)


def save(folder, model, params, step=1, **extras):
    """A checkpoint as a run leaves it; the average differs from the trained copy."""
    state = {"params": params, "ema_params": jax.tree.map(lambda x: 0.9 * x, params)}
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(step, state, {"config": {"model": model.to_dict()}} | extras)
    checkpoints.close()


def save_pair(folder) -> None:
    """`folder/tokenizer`, and `folder/prior` that was trained on it."""
    save(folder / "tokenizer", *tokenizer(), step=3)
    trained_on = library.load_tokenizer(folder / "tokenizer").fingerprint
    save(folder / "prior", *prior(), step=7, tokenizer=trained_on)


def generate(pair, workdir, **values) -> None:
    """The task `generate` with a pair from `save_pair`."""
    config = generate_config.get_config()
    config.update(prior=f"{pair}/prior", tokenizer=f"{pair}/tokenizer", batch=4)
    config.update(values)
    generation.generate(config, workdir)
