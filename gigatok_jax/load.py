"""Loaders of what is on disk; the only way from the rest of the package into `conversion`."""

from gigatok_jax.conversion.frozen import available, load_frozen

__all__ = ["available", "load_frozen"]
