"""GigaTok image tokenizers and autoregressive priors in JAX."""

from gigatok_jax.model_config import model_config

__all__ = ["model_config"]
__version__ = "0.1.0"
