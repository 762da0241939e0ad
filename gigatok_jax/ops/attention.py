"""Scaled dot-product attention.

Axes: b batch, n queries, m keys, h heads, g key/value heads, d head width.
"""

import functools

import jax
import jax.numpy as jnp

from gigatok_jax.ops import implementation

WIDEST = 128  # widest head of cuDNN's kernel on every GPU that has it; from Hopper on 256


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    gradient: bool = True,
) -> jax.Array:
    """Computes scaled dot-product attention with scores and softmax in float32.

    In half precision on a GPU the fused cuDNN kernel runs, if it takes the head width and the
    lengths; otherwise XLA.

    Args:
        query: f[b n h d].
        key: f[b m g d]; g divides h, and m equals n if causal.
        value: f[b m g d].
        causal: whether position i attends to positions 0 .. i alone.
        gradient: False if the result is never differentiated; the fused kernel then takes odd
            lengths too, which cuDNN cannot differentiate.

    Returns:
        f[b n h d] in the dtype of `query`.

    Source: arXiv:1706.03762, eq. 1.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    width = query.shape[-1]
    fits = width % 8 == 0 and width <= WIDEST and (even or not gradient)
    fused = half and fits and implementation.platform() == "gpu"
    library = "cudnn" if fused and implementation.is_here() else "xla"
    run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=library)
    # For GPUs of a plan XLA stands in for cuDNN; like cuDNN it then keeps no scores.
    return (jax.checkpoint(run) if fused and library == "xla" else run)(query, key, value)


def attend_cached(
    query: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array
) -> jax.Array:
    """Computes attention of one query per sequence over cached keys and values up to its position.

    Scores and softmax are in float32.

    Args:
        query: f[b h d].
        keys: f[b g m d]; g divides h, and m exceeds the position.
        values: f[b g m d].
        position: i32[], position of the query; later positions get no weight.

    Returns:
        f[b h d] in the dtype of `query`.
    """
    batch, groups, _, width = keys.shape
    grouped = query.reshape(batch, groups, -1, width)  # [b g r d]
    exact = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bgrd,bgmd->bgrm", grouped, keys, **exact) * width**-0.5
    seen = jnp.arange(keys.shape[2]) <= position
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bgrm,bgmd->bgrd", weights.astype(values.dtype), values, **exact)
    return out.reshape(query.shape).astype(query.dtype)
