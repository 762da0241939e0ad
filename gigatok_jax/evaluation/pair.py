"""Loading of a prior and its tokenizer alike, and the check that they belong together."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gigatok_jax import library, parallel
from gigatok_jax.errors import ConfigError, one_of


def placement(config: ConfigDict) -> dict[str, Any]:
    """Arguments `dtype` and `sharding` for `library.load_*`, from `config.dtype` and `config.mesh`.

    Raises:
        ConfigError: the dtype is unknown, or the mesh does not fit the devices.
    """
    mesh = parallel.make_mesh(config.mesh)
    return {"dtype": compute_type(config.dtype), "sharding": parallel.replicated(mesh)}


def compute_type(name: str) -> jnp.dtype:
    """Dtype of computation by name; "auto" is bfloat16 on accelerators and float32 on a CPU."""
    one_of("dtype", name, ("auto", "float32", "bfloat16"))
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def check(prior: library.Prior, tokens: int, vocab: int, fingerprint: str) -> None:
    """Refuses a tokenizer, or its codes, that the prior was not trained with.

    Args:
        prior: the prior.
        tokens: codes of an image.
        vocab: rows of the codebook.
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
    """Refuses a loaded tokenizer as `check` does."""
    model = tokenizer.config
    check(prior, tokenizer.num_tokens, model.codebook_size, tokenizer.fingerprint)
