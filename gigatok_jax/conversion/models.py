"""Name tables and shapes of every kind of model, by its config."""

import jax
import jax.numpy as jnp

from gigatok_jax.conversion import ar, tokenizer
from gigatok_jax.conversion.names import Entry
from gigatok_jax.models import ar as ar_module
from gigatok_jax.models import tokenizer as tokenizer_module

USED, HISTORY = "buffers/codebook_used", 65536  # latest codes, which the original keeps too


def entries(model) -> list[Entry]:
    """Every parameter and buffer of a config with its original name."""
    return ar.entries(model) if model.kind == "prior" else tokenizer.entries(model)


def shapes(model) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter and buffer of a config by path; nothing is computed."""
    if model.kind == "prior":
        codes = jnp.zeros((1, model.tokens), jnp.int32)
        module, inputs = ar_module.make(model), (codes[:, 0], codes)
    else:
        side = model.image_size
        module, inputs = tokenizer_module.make(model), (jnp.zeros((1, side, side, 3)),)
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    flat = flatten(tree)
    if model.kind != "prior":
        flat[USED] = jax.ShapeDtypeStruct((HISTORY,), jnp.float32)
    return flat


def flatten(tree) -> dict:
    """Leaves of nested dicts by "/"-separated path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
