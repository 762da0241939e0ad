"""Nearest codebook row of every token. Axes: b batch, n tokens, e width, k rows."""

import jax
import jax.numpy as jnp
from jax import lax

_CHUNK = 1 << 26  # score elements held at a time: 256 MB of float32


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the codebook row nearest to each token in squared euclidean distance.

    Scores accumulate in float32 whatever the input; ties go to the lowest index. No gradient.

    Args:
        z: float[... e], any scale; unit rows when the codebook is l2-normalised.
        codebook: float[k e], same scale as `z`.

    Returns:
        int32[...], each in [0, k).

    Raises:
        ValueError: `z` and `codebook` differ in width.

    Source: arXiv:1711.00937, eq. 1; l2-normalised as in arXiv:2110.04627.
    """
    if z.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"tokens are {z.shape[-1]} wide, codebook rows {codebook.shape[-1]}")
    table = lax.stop_gradient(codebook).astype(jnp.float32)
    offset = 0.5 * jnp.sum(jnp.square(table), axis=-1)  # |z|^2 is the same for all rows

    def search(tokens):
        scores = jnp.dot(tokens, table.T, precision=lax.Precision.HIGHEST) - offset
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    tokens = lax.stop_gradient(z).astype(jnp.float32).reshape(-1, z.shape[-1])
    rows = max(1, _CHUNK // table.shape[0])
    codes = search(tokens) if len(tokens) <= rows else lax.map(search, tokens, batch_size=rows)
    return codes.reshape(z.shape[:-1])
