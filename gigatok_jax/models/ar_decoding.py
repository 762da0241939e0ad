"""The prior one position after the other: a cache of keys and values, and features for probing.

Axes: b batch, n positions, g key/value heads, d head width, c width, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax.models.ar import Block, LayerCache, Place, Prior, block_fields


class Cache(NamedTuple):
    """Keys and values of the positions so far, and what conditions the adaptive norms."""

    layers: tuple[LayerCache, ...]
    condition: jax.Array  # f[b c]


def unstack(blocks: Any) -> tuple[Any, ...]:
    """Parameters of each block from the stacked ones; what is unstacked already stays."""
    if isinstance(blocks, tuple):
        return blocks
    count = jax.tree.leaves(blocks)[0].shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(count))


def empty_cache(prior: Prior, batch: int) -> Cache:
    """Cache of a batch before its first position, in the prior's compute type."""
    shape = (batch, prior.kv_heads, prior.tokens, prior.width // prior.heads)
    one = LayerCache(jnp.zeros(shape, prior.dtype), jnp.zeros(shape, prior.dtype))
    condition = jnp.zeros((batch, prior.width), prior.dtype)
    return Cache((one,) * prior.layers, condition)


def prefill(prior: Prior, params, class_ids: jax.Array, cache: Cache):
    """The first position: the class.

    Args:
        prior: made without dropouts.
        params: of the prior; `blocks` stacked or already through `unstack`.
        class_ids: i32[b] in [0, classes].
        cache: from `empty_cache`.

    Returns:
        f32[b v], logits of code 0, and the cache with position 0.
    """
    x = _apply(prior, params, class_ids, method="embed_class")
    cache = cache._replace(condition=x[:, 0])
    return _advance(prior, params, x, cache, Place(jnp.int32(0), 1))


def decode_step(prior: Prior, params, codes: jax.Array, cache: Cache, place: Place):
    """One more position.

    Args:
        prior, params: as for `prefill`.
        codes: i32[b], code `position - 1` of each image.
        cache: of the positions before.
        place: the position, in [1, tokens), and how much of the cache is read (static); less to
            read is faster. A `read` that does not exceed the position leaves the newest codes
            out without a word: positions are traced and cannot be checked here.

    Returns:
        f32[b v], logits of code `position`, and the cache with this position.
    """
    x = _apply(prior, params, codes, place.position, method="embed_code")
    return _advance(prior, params, x, cache, place)


def _advance(prior, params, x, cache, place):
    condition = cache.condition[:, None]
    shared = _apply(prior, params, condition, place.position[None], method="shared")
    block, written = Block(**block_fields(prior)), []
    for layer, own in zip(unstack(params["blocks"]), cache.layers, strict=True):
        x, own = block.apply({"params": layer}, x, jnp.float32(0), shared, own, place)
        written.append(own)
    logits = _apply(prior, params, x, condition, method="logits")
    return logits[:, 0], cache._replace(layers=tuple(written))


def _apply(prior, params, *arguments, method):
    outside = {name: value for name, value in params.items() if name != "blocks"}
    return prior.apply({"params": outside}, *arguments, method=method)


def features(prior: Prior, params, class_ids: jax.Array, codes: jax.Array, block: int):
    """Output of block `block`, counted from 1: f[b n c], the class position first.

    What linear probing reads, with the null class and block layers // 2.
    """
    x, condition = _apply(prior, params, class_ids, codes[:, :-1], method="embed")
    shared = _apply(prior, params, condition, jnp.arange(x.shape[1]), method="shared")
    one = Block(**block_fields(prior))

    def body(x, layer):
        return one.apply({"params": layer}, x, jnp.float32(0), shared)[0], None

    first = jax.tree.map(lambda x: x[:block], params["blocks"])
    return jax.lax.scan(body, x, first)[0]
