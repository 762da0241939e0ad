"""Products of float32 vectors plus an offset, as one float16 product on tensor cores.

Axes: n vectors, e width, c packed width.

A float32 number is nearly the sum of two float16 numbers, and three of the four products matter:
`left(z) @ right(e, offset).T` is z @ e.T + offset with an error near 1e-7, for vectors of norm 1
and float32 sums.
"""

import jax
import jax.numpy as jnp
from jax import lax

_SHIFT = 64.0  # factor that keeps low parts out of float16's subnormal numbers
_FINE = 2.0**-12  # unit of the second and third part of the offset


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits f32[...] into a high and a low part, float16 arrays whose sum is nearly the input."""
    high, low = _split(x)
    return high.astype(jnp.float16), low.astype(jnp.float16)


def left(z: jax.Array) -> jax.Array:
    """Packs vectors f32[n e] into f16[n c], the first operand of a product."""
    high, low = _split(z)
    units = [jnp.full((len(z), n), x, jnp.float32) for n, x in ((1, 1), (2, _FINE))]
    return _packed([high, _SHIFT * low, high / _SHIFT, *units])


def right(e: jax.Array, offset: jax.Array) -> jax.Array:
    """Packs vectors f32[n e] and offsets f32[n] into f16[n c], the second operand of a product."""
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
