"""Returns the table of names and the shapes of a model's parameters, from its config."""

import jax
import jax.numpy as jnp
import ml_collections

from gigatok_jax import trees
from gigatok_jax.models import parameters
from gigatok_jax.weights import prior_names, tokenizer_names
from gigatok_jax.weights.names import Entry

USED, HISTORY = "buffers/codebook_used", tokenizer_names.HISTORY


def entries(model: ml_collections.ConfigDict) -> list[Entry]:
    """Lists our path and the original's name of every parameter and buffer of a model."""
    return (prior_names if model.kind == "prior" else tokenizer_names).entries(model)


def shapes(model: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a model's parameters and buffers by path; nothing is computed."""
    flat = trees.flatten(parameters.abstract_params(model))
    if model.kind != "prior":
        flat[USED] = jax.ShapeDtypeStruct((HISTORY,), jnp.float32)
    return flat
