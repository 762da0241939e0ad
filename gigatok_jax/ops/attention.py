"""Scaled dot-product attention. Axes: b batch, n queries, m keys, h heads, d head width."""

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    gradient: bool = True,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    The fused cuDNN kernel serves half precision on a GPU, XLA everything else.

    Args:
        query: f[b n h d].
        key: f[b m h d], as `value`; `m` equals `n` when causal.
        causal: position i sees positions 0..i only.
        gradient: False for a frozen network that nothing is differentiated through; the fused
            kernel then takes odd lengths too, whose gradient cuDNN does not have.

    Returns:
        f[b n h d] in the type of `query`.

    Source: arXiv:1706.03762, eq. 1.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    fits = query.shape[-1] % 8 == 0 and (even or not gradient)
    fused = half and fits and jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation="cudnn" if fused else "xla"
    )
