"""Unit vectors, straight-through and the rotation trick. Axes: last axis is the vector."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of the last axis, kept; its gradient at the zero vector is zero, not NaN."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12): the zero vector stays zero."""
    return x / jnp.maximum(norm(x), 1e-12)


def unit_rows_init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Rows drawn uniformly from a cube, then normalised, as the original starts its codebook."""
    return unit(jax.random.uniform(key, shape, dtype, -1.0, 1.0))


def uniform_rows_init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Rows in [-1/k, 1/k], the start of a codebook that is not normalised."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


def straight_through(z: jax.Array, rows: jax.Array) -> jax.Array:
    """Value of `rows`, gradient to `z` as if they were equal. Source: arXiv:1308.3432."""
    return z + stop_gradient(rows - z)


def rotate(z: jax.Array, rows: jax.Array) -> jax.Array:
    """Value of `rows` up to rounding; the gradient reaches `z` through a fixed rotation.

    The rotation that takes z to its row is held constant, so the gradient at the row turns back
    with it (arXiv:2410.06424, Householder form). As the original does, `z` is normalised again
    with gradient and norms carry +1e-6: the value has norm 0.999995, not 1.

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
