"""Products of float32 vectors plus an offset, as one product of float16 on tensor cores.

Axes: n vectors, e width, c packed width.

A float32 is the sum of two float16, and three of the four products matter: `left(z) @ right(e,
offset).T` is z @ e.T + offset with an error near 1e-7, for vectors of norm 1 and float32 sums.
"""

import jax
import jax.numpy as jnp
from jax import lax

_SHIFT = 64.0  # factor that keeps low parts out of float16's subnormal numbers
_FINE = 2.0**-12  # unit of the second and third part of the offset


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High and low part of f32[...], each float16, which add up to it."""
    high, low = _split(x)
    return high.astype(jnp.float16), low.astype(jnp.float16)


def left(z: jax.Array) -> jax.Array:
    """First operand of a product: f32[n e] -> f16[n c]."""
    high, low = _split(z)
    units = [jnp.full((len(z), n), x, jnp.float32) for n, x in ((1, 1), (2, _FINE))]
    return _packed([high, _SHIFT * low, high / _SHIFT, *units])


def right(e: jax.Array, offset: jax.Array) -> jax.Array:
    """Second operand of a product, with its offset: f32[n e], f32[n] -> f16[n c]."""
    high, low = _split(e)
    first, rest = _split(offset)
    second, third = _split(rest / _FINE)
    offset = jnp.stack([first, second, third], axis=1)
    return _packed([high, high / _SHIFT, _SHIFT * low, offset])


def _split(x):
    # XLA would drop a cast to float16 and back.
    high = lax.reduce_precision(x, 5, 10)
    return high, x - high


def _packed(parts):
    packed = jnp.concatenate(parts, axis=1).astype(jnp.float16)
    width = max(16, 1 << (packed.shape[1] - 1).bit_length())  # sizes that tensor cores multiply
    return jnp.pad(packed, ((0, 0), (0, width - packed.shape[1])))
