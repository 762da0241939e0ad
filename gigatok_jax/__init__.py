"""Package of GigaTok image tokenizers and autoregressive priors in JAX."""

import importlib
from typing import TYPE_CHECKING

from gigatok_jax.model_config import model_config

if TYPE_CHECKING:
    from gigatok_jax.evaluation.metrics import to_uint8
    from gigatok_jax.library import Prior, Tokenizer, load_prior, load_tokenizer
    from gigatok_jax.models.tokenizer import decode, encode

_LATER = {  # imported at first use, since models take seconds to import
    "Prior": "library",
    "Tokenizer": "library",
    "decode": "models.tokenizer",
    "encode": "models.tokenizer",
    "load_prior": "library",
    "load_tokenizer": "library",
    "to_uint8": "evaluation.metrics",
}
__all__ = [
    "Prior",
    "Tokenizer",
    "decode",
    "encode",
    "load_prior",
    "load_tokenizer",
    "model_config",
    "to_uint8",
]
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__():
    return [*globals(), *_LATER]
