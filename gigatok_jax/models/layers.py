"""Transformer blocks of the tokenizer. Axes: b batch, n queries, m memory tokens, c width."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.ops import activation, attention, implementation
from gigatok_jax.ops.constrain import BATCH, SPLIT, constrain, stream

# std 0.02, never cut in practice: the original truncates at +-2, a hundred deviations.
weight_init = nn.initializers.normal(0.02)

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # recompute the cheap rest
    "blocks": jax.checkpoint_policies.nothing_saveable,  # keep only what enters a block
    "full": jax.checkpoint_policies.nothing_saveable,  # the same for the levels of the CNNs
}


class Loop(NamedTuple):
    """How a stack of blocks is compiled and differentiated; its values are the same whatever."""

    remat: str = "none"  # what the backward pass recomputes, a key of `REMAT`
    unroll: tuple[str, ...] = ()  # platforms whose programs have a body for each block, not one

    @property
    def unrolled(self) -> bool:
        """Whether programs for the platform that is traced for are such."""
        return implementation.platform() in self.unroll


SCANNED = Loop()


def in_proj_init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform of query, key and value stacked into one matrix, as the original draws it."""
    fan_in, fan_out = shape
    bound = (6 / (fan_in + 3 * fan_out)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def fan_in_uniform(fan_in: int) -> Callable:
    """Uniform in +-fan_in^-0.5: PyTorch's own start, which the original keeps in some layers."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def position_init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Normal with deviation width^-0.5."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def dense(features: int, dtype, name: str, init: Callable = weight_init) -> nn.Dense:
    """Linear layer with the tokenizer's initialisation."""
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def layer_norm(dtype, name: str) -> nn.LayerNorm:
    """Layer norm in float32 whatever the compute type; result in `dtype`."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name, use_fast_variance=False)


class Attention(nn.Module):
    """Multi-head attention whose keys and values may differ in position embedding."""

    heads: int
    qk_norm: bool = False  # layer norm over each head's query and key, shared by the heads
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """f[b n c], f[b m c], f[b m c] -> f[b n c]."""
        width = query.shape[-1]
        init = weight_init if self.qk_norm else in_proj_init
        split = (self.heads, width // self.heads)

        def project(x, name):
            heads = dense(width, self.dtype, name, init)(x).reshape(*x.shape[:-1], *split)
            return constrain(heads, BATCH, None, SPLIT)

        q, k, v = project(query, "query"), project(key, "key"), project(value, "value")
        if self.qk_norm:
            q = layer_norm(self.dtype, "query_norm")(q)
            k = layer_norm(self.dtype, "key_norm")(k)
        out = attention.attend(q, k, v)  # [b n h d]
        return dense(width, self.dtype, "out")(out.reshape(query.shape))


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[b n c] -> f[b n c]."""
        hidden = constrain(dense(4 * x.shape[-1], self.dtype, "up")(x), BATCH, None, SPLIT)
        return dense(x.shape[-1], self.dtype, "down")(activation.gelu(hidden))


class QFormerBlock(nn.Module):
    """Pre-norm self-attention of the queries, cross-attention to the memory, MLP.

    Positions are added to queries and keys, never to values; the memory is not normed here.
    """

    heads: int
    qk_norm: bool = False
    own_memory: bool = False  # the memory is this block's own input (the 2D variant)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, memory, positions, memory_positions) -> tuple[jax.Array, None]:
        """f[b n c], f[b m c], f[n c], f[m c] -> (f[b n c], None): the form that a scan wants."""
        x = stream(x)
        memory = x if self.own_memory else memory
        fields = {"heads": self.heads, "qk_norm": self.qk_norm, "dtype": self.dtype}
        y = layer_norm(self.dtype, "norm1")(x)
        q = y + positions
        x = x + Attention(**fields, name="self_attention")(q, q, y)
        q = layer_norm(self.dtype, "norm2")(x) + positions
        k = memory + memory_positions
        x = x + Attention(**fields, name="cross_attention")(q, k, memory)
        x = x + MLP(self.dtype, name="mlp")(layer_norm(self.dtype, "norm3")(x))
        return x, None


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP; positions are already in the residual stream."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """f[b n c] -> (f[b n c], None)."""
        x = stream(x)
        y = layer_norm(self.dtype, "norm1")(x)
        x = x + Attention(self.heads, dtype=self.dtype, name="self_attention")(y, y, y)
        x = x + MLP(self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(x))
        return x, None


def scan(block: type[nn.Module], layers: int, loop: Loop, in_axes=nn.broadcast, **fields):
    """`layers` copies of a block as one module, their parameters stacked on a leading axis.

    One compiled body whatever the depth. On platforms of `loop.unroll` one for each block instead:
    what the backward pass needs stays where it is made, instead of being copied into stacks and out
    of them again, and the program takes longer to compile.

    Args:
        block: takes the running value first, then what `in_axes` says, by default the same values
            for all blocks.
        layers: of the stack.
        loop: see there.
        in_axes: as for `nn.scan`.
        **fields: of the block.
    """
    if loop.remat != "none":
        # In a loop nothing can be merged with what was computed before it; unrolled it could.
        block = nn.remat(block, prevent_cse=loop.unrolled, policy=REMAT[loop.remat])
    stacked = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=layers,
        unroll=layers if loop.unrolled else 1,
    )
    return stacked(**fields)


class AlignmentMLP(nn.Module):
    """Three linear layers from decoder width to the teacher's, SiLU between (arXiv:2504.08736)."""

    out: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[b n c] -> f[b n out]."""
        hidden = 4 * x.shape[-1]
        x = constrain(dense(hidden, self.dtype, "dense_0")(x), BATCH, None, SPLIT)
        x = constrain(dense(hidden, self.dtype, "dense_1")(nn.silu(x)), BATCH)
        return constrain(dense(self.out, self.dtype, "dense_2")(nn.silu(x)), BATCH, None, SPLIT)
