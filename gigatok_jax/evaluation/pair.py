"""A prior and the tokenizer whose codes it learned: loaded alike, and checked to fit."""

import jax
import jax.numpy as jnp

from gigatok_jax import library, parallel
from gigatok_jax.errors import ConfigError


def placement(config) -> dict:
    """`dtype` and `sharding` of the loaders in `library`, from `config.dtype` and `config.mesh`.

    Raises:
        ConfigError: an unknown type, or a mesh that does not fit the devices.
    """
    mesh = parallel.make_mesh(config.mesh)
    return {"dtype": compute_type(config.dtype), "sharding": parallel.replicated(mesh)}


def compute_type(name: str) -> jnp.dtype:
    """Type of that name; "auto" is bfloat16 on accelerators and float32 on a CPU."""
    choices = ("auto", "float32", "bfloat16")
    if name not in choices:
        raise ConfigError(f"dtype is {name!r}, expected one of {', '.join(choices)}")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def check(prior: library.Prior, tokens: int, vocab: int, fingerprint: str) -> None:
    """Refuses a tokenizer, or its codes, of another kind than the prior writes.

    Args:
        prior: the prior.
        tokens: codes of an image.
        vocab: rows of the codebook.
        fingerprint: of the tokenizer.

    Raises:
        ConfigError: another number of codes or rows, or another tokenizer than the prior learned
            from, when that is known.
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
    """`check` of a loaded tokenizer."""
    model = tokenizer.config
    check(prior, tokenizer.num_tokens, model.codebook_size, tokenizer.fingerprint)
