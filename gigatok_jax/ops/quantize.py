"""Unit vectors, initial codebook rows, straight-through gradients and the rotation trick.

The last axis of an array is the vector.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import DTypeLike


def norm(x: jax.Array) -> jax.Array:
    """Returns the euclidean norm f32[... 1] over the last axis; its gradient at zero is zero."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors to unit norm, x / max(|x|, 1e-12); the zero vector stays zero."""
    return x / jnp.maximum(norm(x), 1e-12)


def unit_rows_init(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws rows of a normalised codebook: uniform in a cube, then unit, as in the original."""
    return unit(jax.random.uniform(key, shape, dtype, -1.0, 1.0))


def uniform_rows_init(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws the k initial rows of a codebook that is not normalised: uniform in [-1/k, 1/k)."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


def straight_through(z: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns `rows` up to rounding and passes the gradient to `z` unchanged (arXiv:1308.3432)."""
    return z + stop_gradient(rows - z)


def rotate(z: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns nearly `rows` and passes the gradient to `z` through a fixed rotation.

    The rotation that takes z to its row counts as a constant, so that the gradient is rotated back
    (arXiv:2410.06424, Householder form). As in the original, `z` is normalised again with gradient,
    and 1e-6 is added to norms: for unit rows the result has norm 0.999995, not 1.

    Args:
        z: f32[... e], not zero.
        rows: f32[... e], the nearest codebook rows.

    Returns:
        f32[... e].
    """
    z = unit(z)
    u = stop_gradient(z / (norm(z) + 1e-6))
    q = stop_gradient(rows / (norm(rows) + 1e-6))
    w = unit(u + q)

    def dot(a, b):
        return jnp.sum(a * b, axis=-1, keepdims=True)

    turned = z - 2 * dot(z, w) * w + 2 * dot(z, u) * q
    return turned * stop_gradient(norm(rows) / (norm(z) + 1e-6))
