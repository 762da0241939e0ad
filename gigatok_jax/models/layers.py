"""Transformer blocks of the tokenizer. Axes: b batch, n queries, m memory tokens, c width."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gigatok_jax.ops import activation, attention, implementation
from gigatok_jax.ops.constrain import BATCH, SPLIT, constrain, stream

# Deviation 0.02. The original cuts the draws at +-2, a hundred deviations: none is ever cut.
weight_init = nn.initializers.normal(0.02)

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps matrix products
    "blocks": jax.checkpoint_policies.nothing_saveable,  # keeps only the inputs of blocks
    "full": jax.checkpoint_policies.nothing_saveable,  # the same, also for the blocks of the CNNs
}


class Loop(NamedTuple):
    """Record of settings for how a stack of blocks is compiled; its results stay the same."""

    remat: str = "none"  # what the backward pass recomputes, a key of `REMAT`
    unroll: tuple[str, ...] = ()  # platforms that compile one body per block instead of one for all

    @property
    def unrolled(self) -> bool:
        """Whether the platform being traced for compiles one body per block."""
        return implementation.platform() in self.unroll


SCANNED = Loop()


def in_proj_init(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws Xavier-uniform weights of a query, key or value projection.

    The bound is that of the three projections stacked as one matrix.
    """
    fan_in, fan_out = shape
    bound = (6 / (fan_in + 3 * fan_out)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def fan_in_uniform(fan_in: int) -> Callable:
    """Returns an initializer that draws uniformly from +-fan_in^-0.5, PyTorch's default.

    Some layers keep this default.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def position_init(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws position embeddings [length, width] from a normal with deviation width^-0.5."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def position_embedding(module: nn.Module, name: str, length: int) -> jax.Array:
    """Declares and returns learned vectors f[length width], a parameter of `module`.

    `module` has the fields width and dtype.
    """
    return module.param(name, position_init, (length, module.width)).astype(module.dtype)


def dense(features: int, dtype: DTypeLike, name: str, init: Callable = weight_init) -> nn.Dense:
    """Makes a linear layer with bias; by default its initial weights have deviation 0.02."""
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def layer_norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Makes a layer norm that computes in float32 and returns type `dtype`."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name, use_fast_variance=False)


class Attention(nn.Module):
    """Module of multi-head attention whose keys and values may differ in position embedding."""

    heads: int
    qk_norm: bool = False  # layer norm over each head's query and key, shared by the heads
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Attends with queries f[b n c] over keys and values f[b m c]; returns f[b n c]."""
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
    """Module of two linear layers around the exact (erf) GELU."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the two linear layers and the GELU to f[b n c]; returns f[b n c]."""
        hidden = constrain(dense(4 * x.shape[-1], self.dtype, "up")(x), BATCH, None, SPLIT)
        return dense(x.shape[-1], self.dtype, "down")(activation.gelu(hidden))


class QFormerBlock(nn.Module):
    """Module of one Q-Former block: self-attention of queries, cross-attention to a memory, MLP.

    Each of the three norms its input first. Positions are added to queries and keys, never to
    values; the memory is not normed here.
    """

    heads: int
    qk_norm: bool = False
    own_memory: bool = False  # the memory is this block's own input (the 2D variant)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None,
        positions: jax.Array,
        memory_positions: jax.Array,
    ) -> tuple[jax.Array, None]:
        """Applies the block to queries f[b n c] and a memory f[b m c].

        Positions of the queries are f[n c], of the memory f[m c]. Returns (f[b n c], None), the
        pair that a scan needs.
        """
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
    """Module of one transformer block: pre-norm self-attention and MLP.

    The block adds no positions: the residual stream already contains position embeddings.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Applies the block to f[b n c]; returns (f[b n c], None), the pair that a scan needs."""
        x = stream(x)
        y = layer_norm(self.dtype, "norm1")(x)
        x = x + Attention(self.heads, dtype=self.dtype, name="self_attention")(y, y, y)
        x = x + MLP(self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(x))
        return x, None


def scan(
    block: type[nn.Module], layers: int, loop: Loop, in_axes: Any = nn.broadcast, **fields
) -> nn.Module:
    """Makes a stack of blocks as one module, with parameters stacked on a leading axis.

    One body is compiled for all blocks. On the platforms of `loop.unroll` each block has its own
    body: compilation takes longer, but values for the backward pass are not copied into stacks and
    out of stacks again.

    Args:
        block: class of the block; a call takes the stream first, then the inputs of `in_axes`.
        layers: number of blocks.
        loop: rematerialisation and unrolling.
        in_axes: the argument of `nn.scan`, which says what inputs are split over blocks; by default
            all blocks get the same inputs.
        **fields: constructor arguments of the block.
    """
    if loop.remat != "none":
        # In a loop the compiler cannot merge the recomputation with the forward pass.
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
    """Module of three linear layers from the decoder's width to the teacher's.

    Source: arXiv:2504.08736.
    """

    out: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies three linear layers, SiLU between, to f[b n c]; returns f[b n out]."""
        hidden = 4 * x.shape[-1]
        x = constrain(dense(hidden, self.dtype, "dense_0")(x), BATCH, None, SPLIT)
        x = constrain(dense(hidden, self.dtype, "dense_1")(nn.silu(x)), BATCH)
        return constrain(dense(self.out, self.dtype, "dense_2")(nn.silu(x)), BATCH, None, SPLIT)
