"""Autoregressive prior over the codes of an image, conditioned on its class (arXiv:2504.08736).

Axes: b batch, n positions, m positions read from a cache, c width, h heads, g key/value heads,
d head width, v vocabulary. Position 0 is the class, position t the code t - 1; the output at
position t predicts code t. `Prior` takes a whole sequence at once; `ar_decoding` takes one position
after the other through the same blocks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from gigatok_jax.models import layers
from gigatok_jax.ops import activation, attention
from gigatok_jax.ops.constrain import BATCH, SPLIT, constrain, stream

ROTARY_BASE = 10_000.0
HIDDEN_MULTIPLE = 256  # the SwiGLU's hidden width, 8/3 of the width, is rounded up to a multiple


class Dropouts(NamedTuple):
    """Record of dropout probabilities in training; a `path` that is not 0 replaces `residual`."""

    token: float = 0.1  # of features of the embedded sequence
    residual: float = 0.1  # of features that leave attention and MLP
    condition: float = 0.1  # of the whole class, for guidance
    path: float = 0.0  # of a branch in the last block; rises linearly from 0 in the first


class Shared(NamedTuple):
    """Record of the inputs that all blocks of the prior share in one pass."""

    rotary: tuple[jax.Array, jax.Array] | None  # cosines and sines f32[n d/2], with rope
    condition: jax.Array | None  # f[b 1 c], with adaln="full"
    modulation: jax.Array | None  # f[b 1 6c], with adaln="shared"


class LayerCache(NamedTuple):
    """Record of one block's cached keys and values; positions not yet written hold anything."""

    keys: jax.Array  # f[b g n d]
    values: jax.Array  # f[b g n d]


class Place(NamedTuple):
    """Record of the position of a cached pass and the length of the cache that the pass reads."""

    position: jax.Array  # i32[]
    read: int  # static; positions 0 .. read - 1 are read, so it has to exceed `position`


def rotary_angles(positions: jax.Array, head_width: int) -> tuple[jax.Array, jax.Array]:
    """Returns the rotary embedding's cosines and sines of position * 10000^(-2i/d).

    Each of the two tables is f32[n d/2]. Source: arXiv:2104.09864.
    """
    rates = ROTARY_BASE ** (-jnp.arange(0, head_width, 2) / head_width)
    angles = positions[:, None].astype(jnp.float32) * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair of neighbouring features of f[b n h d] by its rotary angle, in float32."""
    cos, sin = (table[:, None] for table in rotary)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape).astype(x.dtype)


def dense(
    features: int, dtype: DTypeLike, name: str, init: Callable = layers.weight_init
) -> nn.Dense:
    """Makes a linear layer with `features` outputs and no bias."""
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


def modulation(count: int, width: int, dtype: DTypeLike, name: str | None) -> nn.Dense:
    """Makes a linear layer from the condition to `count` shifts, scales or gates.

    All of its outputs are zero before training.
    """
    zeros = nn.initializers.zeros
    return nn.Dense(count * width, dtype=dtype, kernel_init=zeros, name=name)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales and shifts features: returns x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Module of causal self-attention with one projection for queries, keys and values."""

    heads: int
    kv_heads: int
    qk_norm: bool = False  # layer norm over each head's query and key, shared by the heads
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
        cache: LayerCache | None = None,
        place: Place | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends causally within f[b n c]; returns (f[b n c], None).

        With a cache, n is 1: the new position attends to the cached positions and itself, and the
        second item returned is the cache with the new position's key and value.
        """
        q, k, v = self._project(x, rotary)
        if cache is None:
            out = attention.attend(q, k, v, causal=True)  # [b n h d]
        else:
            cache = _write(cache, k, v, place.position)
            keys, values = (stored[:, :, : place.read] for stored in cache)
            out = attention.attend_cached(q[:, 0], keys, values, place.position)  # [b h d]
        return dense(x.shape[-1], self.dtype, "out")(out.reshape(x.shape)), cache

    def _project(self, x, rotary):
        """Projects f[b n c] to queries f[b n h d] and to keys and values f[b n g d].

        Queries and keys are normed with `qk_norm`, and rotated unless `rotary` is None.
        """
        width = x.shape[-1] // self.heads
        joint = dense((self.heads + 2 * self.kv_heads) * width, self.dtype, "qkv")(x)
        joint = joint.reshape(*x.shape[:2], -1, width)
        q, k, v = jnp.split(joint, [self.heads, self.heads + self.kv_heads], axis=2)
        if self.qk_norm:
            q = layers.layer_norm(self.dtype, "query_norm")(q)
            k = layers.layer_norm(self.dtype, "key_norm")(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return tuple(constrain(x, BATCH, None, SPLIT) for x in (q, k, v))


def _write(cache: LayerCache, key: jax.Array, value: jax.Array, position) -> LayerCache:
    """Writes one position's key and value, each f[b 1 g d], into a cache; returns the new cache."""

    def put(into, new):
        new = new.swapaxes(1, 2).astype(into.dtype)  # [b g 1 d]
        return jax.lax.dynamic_update_slice_in_dim(into, new, position, axis=2)

    return LayerCache(put(cache.keys, key), put(cache.values, value))


class SwiGLU(nn.Module):
    """Module of a gated MLP, silu(x W1) * (x W3) through W2; W1 and W3 are one parameter.

    Source: arXiv:2002.05202.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the gated MLP to f[b n c]; returns f[b n c]."""
        hidden = -(-int(8 * x.shape[-1] / 3) // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        both = dense(2 * hidden, self.dtype, "gate_up")(x)
        return dense(x.shape[-1], self.dtype, "down")(activation.gate(both))


class Block(nn.Module):
    """Module of one block of the prior: pre-norm attention and SwiGLU.

    The class condition optionally modulates norms and gates branches (`adaln`).
    """

    heads: int
    kv_heads: int
    qk_norm: bool = False
    adaln: str = "none"  # "full": a modulation layer in each block; "shared": one for all
    dropouts: Dropouts | None = None  # None is inference
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_path: jax.Array,
        shared: Shared,
        cache: LayerCache | None = None,
        place: Place | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Applies the block to f[b n c]; returns (f[b n c], cache), the pair that a scan needs.

        `drop_path` f32[] is the rate of stochastic depth. The cache is None if none is passed.
        """
        x = stream(x)
        steps = self._modulation(x.shape[-1], shared)
        y = self._norm(x, "norm1", steps[:2])
        attend = Attention(self.heads, self.kv_heads, self.qk_norm, self.dtype, name="attention")
        y, cache = attend(y, shared.rotary, cache, place)
        x = x + self._branch(y, drop_path, steps[2])
        y = SwiGLU(self.dtype, name="mlp")(self._norm(x, "norm2", steps[3:5]))
        return x + self._branch(y, drop_path, steps[5]), cache

    def _modulation(self, width: int, shared: Shared) -> list[jax.Array | None]:
        """Returns shift, scale and gate of attention, then of the MLP, each f[b 1 c].

        All six are None without adaptive norms.
        """
        if self.adaln == "none":
            return [None] * 6
        if self.adaln == "full":
            steps = modulation(6, width, self.dtype, "modulation")(nn.silu(shared.condition))
        else:
            own = self.param("modulation", layers.position_init, (6, width))
            steps = shared.modulation + own.reshape(-1).astype(self.dtype)
        return jnp.split(steps, 6, axis=-1)  # each [b 1 c]

    def _norm(self, x, name, steps):
        x = rms_norm(self.dtype, name)(x)
        return x if steps[0] is None else modulate(x, *steps)

    def _branch(self, y, drop_path, gate):
        """Applies dropout and gate to a branch's output; returns what is added to the stream."""
        if self.dropouts is not None:
            if self.dropouts.path:
                y = _drop_examples(y, drop_path, self.make_rng("dropout"))
            elif self.dropouts.residual:
                y = nn.Dropout(self.dropouts.residual, deterministic=False)(y)
        return y if gate is None else gate * y


def rms_norm(dtype: DTypeLike, name: str | None) -> nn.RMSNorm:
    """Makes a root-mean-square norm that computes in float32 and returns type `dtype`."""
    return nn.RMSNorm(epsilon=1e-5, dtype=dtype, name=name)


def _drop_examples(y: jax.Array, rate: jax.Array, rng: jax.Array) -> jax.Array:
    """Sets each example to zero with probability `rate`, else divides it by 1 - `rate`.

    Source: stochastic depth, arXiv:1603.09382.
    """
    keep = jax.random.bernoulli(rng, 1 - rate, (y.shape[0], 1, 1))
    return jnp.where(keep, y / (1 - rate).astype(y.dtype), 0)


class Prior(nn.Module):
    """Module of the autoregressive prior over whole sequences; `init` creates every parameter."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    tokens: int
    classes: int
    rope: bool = False
    qk_norm: bool = False
    adaln: str = "none"
    dropouts: Dropouts | None = None  # None is inference
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        # Rows are looked up in float32 and cast afterwards: gradients of a row add up in float32.
        embed = functools.partial(
            nn.Embed, features=self.width, embedding_init=layers.weight_init, dtype=None
        )
        self.class_embedding = embed(self.classes + 1)  # the last row drops the condition
        self.code_embedding = embed(self.vocab)
        if not self.rope:
            shape = (self.tokens + 1, self.width)  # the last row is unused; the original has it
            self.positions = self.param("positions", layers.position_init, shape)
        if self.adaln == "shared":
            self.modulation = modulation(6, self.width, self.dtype, None)
        if self.adaln != "none":
            self.final_modulation = modulation(2, self.width, self.dtype, None)
        if self.dropouts is not None:
            self.token_dropout = nn.Dropout(self.dropouts.token, deterministic=False)
        in_axes = (0, nn.broadcast)  # a rate for each block, and the shared inputs
        self.blocks = layers.scan(Block, self.layers, self.loop, in_axes, **block_fields(self))
        self.norm = rms_norm(self.dtype, None)
        zeros = nn.initializers.zeros  # all codes are equally likely before training
        self.head = nn.Dense(self.vocab, False, self.dtype, kernel_init=zeros, dot_general=_exact)

    def __call__(self, class_ids: jax.Array, codes: jax.Array) -> jax.Array:
        """Computes logits at every position, given the class and all earlier codes.

        Args:
            class_ids: i32[b] in [0, classes]; `classes` is the null class.
            codes: i32[b n] in [0, vocab), n up to `tokens`; the last code is not read.

        Returns:
            f32[b n v]; row t predicts codes[:, t].
        """
        x, condition = self.embed(class_ids, codes[:, :-1])
        highest = self.dropouts.path if self.dropouts is not None else 0.0
        rates = jnp.linspace(0.0, highest, self.layers, dtype=jnp.float32)  # of stochastic depth
        x, _ = self.blocks(x, rates, self.shared(condition, jnp.arange(x.shape[1])))
        return self.logits(x, condition)

    def embed(self, class_ids: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeds class ids i32[b] and codes i32[b n-1] as the stream before the first block.

        Returns the stream f[b n c] and the condition f[b 1 c].
        """
        condition = self.embed_class(class_ids)
        x = self.code_embedding(codes).astype(self.dtype)
        if not self.rope:
            x = x + self.positions[1 : x.shape[1] + 1].astype(x.dtype)
        x = jnp.concatenate([condition, x], axis=1)
        return (x if self.dropouts is None else self.token_dropout(x)), condition

    def embed_class(self, class_ids: jax.Array) -> jax.Array:
        """Embeds class ids i32[b] as f[b 1 c]: the stream at position 0, also the condition.

        In training the null class replaces a class with probability `dropouts.condition`.
        """
        if self.dropouts is not None and self.dropouts.condition:
            shape = class_ids.shape
            drop = jax.random.bernoulli(self.make_rng("dropout"), self.dropouts.condition, shape)
            class_ids = jnp.where(drop, self.classes, class_ids)
        x = self.class_embedding(class_ids)[:, None].astype(self.dtype)
        return x if self.rope else x + self.positions[:1].astype(x.dtype)

    def embed_code(self, codes: jax.Array, position: jax.Array) -> jax.Array:
        """Embeds one code per image, i32[b], as the stream f[b 1 c] at a position i32[]."""
        x = self.code_embedding(codes)[:, None].astype(self.dtype)
        return x if self.rope else x + self.positions[position].astype(x.dtype)

    def shared(self, condition: jax.Array, positions: jax.Array) -> Shared:
        """Computes the inputs that all blocks share, for condition f[b 1 c], positions i32[n]."""
        rotary = rotary_angles(positions, self.width // self.heads) if self.rope else None
        steps = self.modulation(nn.silu(condition)) if self.adaln == "shared" else None
        return Shared(rotary, condition if self.adaln == "full" else None, steps)

    def logits(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Computes logits f32[b n v] from the stream after the last block, f[b n c]."""
        x = self.norm(x)
        if self.adaln != "none":
            steps = self.final_modulation(nn.silu(condition))
            x = modulate(x, *jnp.split(steps, 2, axis=-1))
        return self.head(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exact(x: jax.Array, kernel: jax.Array, dimensions, precision=None) -> jax.Array:
    """Multiplies f[... c] by f[c v] to f32[... v]; the gradient is multiplied in the type of `x`.

    The gradient of `dot_general` would multiply in float32, at half the speed.
    """
    return jax.lax.dot_general(x, kernel, dimensions, precision, preferred_element_type=jnp.float32)


def _exact_forward(x, kernel, dimensions, precision):
    return _exact(x, kernel, dimensions, precision), (x, kernel)


def _exact_backward(dimensions, precision, residuals, gradient):
    x, kernel = residuals
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    gradient = gradient.astype(x.dtype)
    by_x = product("...v,cv->...c", gradient, kernel)
    by_kernel = product("...c,...v->cv", x, gradient)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


_exact.defvjp(_exact_forward, _exact_backward)


def block_fields(prior: Prior) -> dict[str, Any]:
    """Returns the constructor arguments of one block of a prior, by name."""
    names = ("heads", "kv_heads", "qk_norm", "adaln", "dropouts", "dtype")
    return {name: getattr(prior, name) for name in names}


def make(
    model: ConfigDict,
    dtype: DTypeLike = jnp.float32,
    *,
    loop: layers.Loop = layers.SCANNED,
    dropouts: Dropouts | None = None,
) -> Prior:
    """Makes the module of the prior that a config describes.

    Args:
        model: config of a prior, from `model_config`.
        dtype: compute type; parameters are float32.
        loop: how the stack of blocks is compiled.
        dropouts: probabilities in training; the module then needs a "dropout" rng. None is
            inference.
    """
    fields = {name: value for name, value in model.items() if name != "kind"}
    return Prior(**fields, dtype=dtype, loop=loop, dropouts=dropouts)
