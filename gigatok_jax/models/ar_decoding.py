"""Decoding with an autoregressive prior, position by position with a cache; probing features.

Axes: b batch, n positions, c width, v vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax.models.ar import Block, LayerCache, Place, Prior, block_fields


class Cache(NamedTuple):
    """Record of all blocks' cached keys and values, and the condition of the adaptive norms."""

    layers: tuple[LayerCache, ...]
    condition: jax.Array  # f[b c]


def unstack(blocks: Any) -> tuple[Any, ...]:
    """Splits stacked parameters of blocks into a tuple of one parameter tree per block.

    A tuple is returned as it is.
    """
    if isinstance(blocks, tuple):
        return blocks
    count = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count))


def empty_cache(prior: Prior, batch: int) -> Cache:
    """Makes a cache of zeros for a batch before position 0, in the prior's compute type."""
    shape = (batch, prior.kv_heads, prior.tokens, prior.width // prior.heads)
    layer = LayerCache(jnp.zeros(shape, prior.dtype), jnp.zeros(shape, prior.dtype))
    condition = jnp.zeros((batch, prior.width), prior.dtype)
    return Cache((layer,) * prior.layers, condition)


def prefill(
    prior: Prior, params: Mapping[str, Any], class_ids: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs the prior on position 0, which holds the class.

    Args:
        prior: module without dropouts.
        params: parameters of the prior; `blocks` is stacked, or a tuple from `unstack`.
        class_ids: i32[b] in [0, classes].
        cache: from `empty_cache`.

    Returns:
        Logits f32[b v] of code 0, and the cache with position 0.
    """
    x = _apply(prior, params, class_ids, method="embed_class")
    cache = cache._replace(condition=x[:, 0])
    return _advance(prior, params, x, cache, Place(jnp.int32(0), 1))


def decode_step(
    prior: Prior, params: Mapping[str, Any], codes: jax.Array, cache: Cache, place: Place
) -> tuple[jax.Array, Cache]:
    """Runs the prior on one more position, using the cache of all earlier positions.

    Args:
        prior: module without dropouts.
        params: parameters of the prior; `blocks` is stacked, or a tuple from `unstack`.
        codes: i32[b], code `position - 1` of each image.
        cache: cache of all earlier positions.
        place: the position, in [1, tokens), and how many positions of the cache are read; reading
            fewer is faster. If `read` does not exceed the position, the newest codes are ignored
            without an error: the position is traced and cannot be checked.

    Returns:
        Logits f32[b v] of code `position`, and the cache with this position.
    """
    x = _apply(prior, params, codes, place.position, method="embed_code")
    return _advance(prior, params, x, cache, place)


def _advance(prior, params, x, cache, place):
    """Runs all blocks on one position x, f[b 1 c]; returns logits f32[b v] and the new cache."""
    condition = cache.condition[:, None]
    shared = _apply(prior, params, condition, place.position[None], method="shared")
    block, written = Block(**block_fields(prior)), []
    for layer, own in zip(unstack(params["blocks"]), cache.layers, strict=True):
        x, own = block.apply({"params": layer}, x, jnp.float32(0), shared, own, place)
        written.append(own)
    logits = _apply(prior, params, x, condition, method="logits")
    return logits[:, 0], cache._replace(layers=tuple(written))


def _apply(prior, params, *arguments, method):
    """Calls a method of the prior that uses no block; returns the method's result."""
    outside = {name: value for name, value in params.items() if name != "blocks"}
    return prior.apply({"params": outside}, *arguments, method=method)


def features(
    prior: Prior, params: Mapping[str, Any], class_ids: jax.Array, codes: jax.Array, block: int
) -> jax.Array:
    """Computes features for linear probing: the prior's stream f[b n c] after a block.

    Position 0 of the stream is the class.

    Args:
        prior: module without dropouts.
        params: parameters of the prior, with stacked `blocks`.
        class_ids: i32[b] in [0, classes]; probing takes the null class.
        codes: i32[b n] in [0, vocab); the last code is not read.
        block: number of the block, counted from 1; probing takes layers // 2.
    """
    x, condition = _apply(prior, params, class_ids, codes[:, :-1], method="embed")
    shared = _apply(prior, params, condition, jnp.arange(x.shape[1]), method="shared")
    module = Block(**block_fields(prior))

    def body(x, layer):
        return module.apply({"params": layer}, x, jnp.float32(0), shared)[0], None

    first = jax.tree.map(lambda x: x[:block], params["blocks"])
    return jax.lax.scan(body, x, first)[0]
