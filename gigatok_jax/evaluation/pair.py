"""Settings to load a prior and a tokenizer alike, and checks that the two belong together."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gigatok_jax import library, parallel
from gigatok_jax.errors import ConfigError, one_of


def placement(config: ConfigDict) -> dict[str, Any]:
    """Makes `dtype` and `sharding`, arguments of `library.load_*`, from a config's dtype and mesh.

    Raises:
        ConfigError: the dtype is unknown, or the mesh does not fit the devices.
    """
    mesh = parallel.make_mesh(config.mesh)
    return {"dtype": compute_type(config.dtype), "sharding": parallel.replicated(mesh)}


def compute_type(name: str) -> jnp.dtype:
    """Returns a dtype of computation by name; "auto" is float32 on a CPU, else bfloat16.

    Raises:
        ConfigError: the name is not "auto", "float32" or "bfloat16".
    """
    one_of("dtype", name, ("auto", "float32", "bfloat16"))
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def check(prior: library.Prior, tokens: int, vocab: int, fingerprint: str) -> None:
    """Checks that a prior was trained with a tokenizer, by number of codes and by fingerprint.

    Args:
        prior: the prior.
        tokens: number of codes of an image.
        vocab: number of rows of the codebook.
        fingerprint: fingerprint of the tokenizer.

    Raises:
        ConfigError: the prior has another number of codes or values, or a known tokenizer with
            another fingerprint.
    """
    model = prior.config
    change = "name the tokenizer that the prior was trained with"
    if (tokens, vocab) != (model.tokens, model.vocab):
        raise ConfigError(
            f"the prior knows images of {model.tokens} codes with {model.vocab} values, the"
            f" tokenizer has {tokens} codes with {vocab} values: {change}"
        )
    if prior.trained_on and prior.trained_on != fingerprint:
        raise ConfigError(
            f"the prior was trained on tokenizer {prior.trained_on}, this one is {fingerprint}:"
            f" {change}"
        )


def check_tokenizer(prior: library.Prior, tokenizer: library.Tokenizer) -> None:
    """Raises ConfigError if a prior was trained with another tokenizer than a loaded tokenizer."""
    model = tokenizer.config
    check(prior, tokenizer.num_tokens, model.codebook_size, tokenizer.fingerprint)
