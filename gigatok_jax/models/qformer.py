"""Q-Formers: a 2D grid to 1D latent tokens and back. Axes: b batch, m grid, n latents, c width."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.model_config import pooled_grids
from gigatok_jax.models import layers
from gigatok_jax.models.cnn import TOKEN_WIDTH, conv
from gigatok_jax.models.layers import dense, layer_norm, position_init


class Encoded(NamedTuple):
    tokens: jax.Array  # f[b n c], after the last norm: what encoder probing uses
    projected: jax.Array  # f[b n 256]


class Decoded(NamedTuple):
    tapped: jax.Array | None  # f[b hw c], output of the alignment block
    aligned: jax.Array | None  # f[b hw t], the same through the alignment MLP
    features: jax.Array  # f[b h w 256], for the CNN decoder


def pooled_queries(grid: jax.Array, latent_tokens: int) -> jax.Array:
    """Average-pooled tokens from coarse to fine.

    Args:
        grid: f[b h w c].
        latent_tokens: a power of two; levels of 1, 1, 2, 4, ... tokens sum to it.

    Returns:
        f[b latent_tokens c]; tokens 0 and 1 are both the mean of the grid.
    """
    b, h, w, c = grid.shape
    levels = []
    for columns, rows in pooled_grids(latent_tokens):
        tiles = grid.reshape(b, rows, h // rows, columns, w // columns, c)
        levels.append(tiles.mean(axis=(2, 4)).reshape(b, rows * columns, c))
    return jnp.concatenate(levels, axis=1)


class QFormerEncoder(nn.Module):
    """Queries that start as pooled features and read the feature grid."""

    layers: int
    heads: int
    width: int
    latent_tokens: int = 256
    query_init: str = "multi_level"  # "mean": the global mean for all; "learnable": parameters
    qk_norm: bool = False
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> Encoded:
        """f[b h w 256] -> tokens f[b n c] and f[b n 256]."""
        b, h, w, _ = features.shape
        memory = dense(self.width, self.dtype, "embed")(layer_norm(self.dtype, "norm_in")(features))
        x = self.queries(memory)  # [b n c]
        memory = memory.reshape(b, h * w, self.width)
        positions = self.positions("query_positions", self.latent_tokens)
        memory_positions = self.positions("positions", h * w)
        blocks = layers.scan(
            layers.QFormerBlock, self.layers, self.loop, name="blocks",
            heads=self.heads, qk_norm=self.qk_norm, dtype=self.dtype,
        )  # fmt: skip
        x, _ = blocks(x, memory, positions, memory_positions)
        tokens = layer_norm(self.dtype, "norm_out")(x)
        return Encoded(tokens, dense(TOKEN_WIDTH, self.dtype, "proj_out")(tokens))

    def positions(self, name: str, length: int) -> jax.Array:
        return self.param(name, position_init, (length, self.width)).astype(self.dtype)

    def queries(self, grid: jax.Array) -> jax.Array:
        """f[b h w c] -> f[b n c]."""
        shape = (grid.shape[0], self.latent_tokens, self.width)
        if self.query_init == "learnable":
            return jnp.broadcast_to(self.positions("queries", self.latent_tokens), shape)
        if self.query_init == "multi_level":
            return dense(self.width, self.dtype, "query_proj")(
                pooled_queries(grid, self.latent_tokens)
            )
        mean = grid.mean(axis=(1, 2))[:, None]
        return jnp.broadcast_to(dense(self.width, self.dtype, "query_proj")(mean), shape)


class QFormerDecoder(nn.Module):
    """Grid queries that read the latent tokens; an early block is tapped for the alignment."""

    layers: int
    heads: int
    width: int
    grid: int  # tokens along one side of the image grid
    query_init: str = "first"  # the first latent token everywhere; "learnable": parameters
    qk_norm: bool = False
    align_block: int = 3
    align_width: int = 768
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> Decoded:
        """f[b n 256] -> features f[b h w 256] and what the alignment needs."""
        b, n, _ = latents.shape
        memory = dense(self.width, self.dtype, "embed")(layer_norm(self.dtype, "norm_in")(latents))
        x = self.queries(memory)
        positions = self.positions("positions", self.grid**2)
        memory_positions = self.positions("latent_positions", n)
        fields = {"heads": self.heads, "qk_norm": self.qk_norm, "dtype": self.dtype}
        tapped, aligned, x = run_tapped(
            self, layers.QFormerBlock, fields, x, (memory, positions, memory_positions)
        )
        return Decoded(tapped, aligned, grid_out(self, x, (b, self.grid, self.grid)))

    def positions(self, name: str, length: int) -> jax.Array:
        return self.param(name, position_init, (length, self.width)).astype(self.dtype)

    def queries(self, memory: jax.Array) -> jax.Array:
        """f[b n c] -> f[b hw c]."""
        shape = (memory.shape[0], self.grid**2, self.width)
        if self.query_init == "learnable":
            return jnp.broadcast_to(self.positions("queries", self.grid**2), shape)
        return jnp.broadcast_to(memory[:, :1], shape)


def run_tapped(decoder: nn.Module, block, fields: dict, x: jax.Array, context: tuple):
    """All blocks of a decoder as two scans with the alignment tap between them.

    Returns:
        (tapped f[b hw c] | None, aligned f[b hw t] | None, f[b hw c] after the last block).
    """
    tapped = aligned = None
    if decoder.align_block:
        early = layers.scan(
            block, decoder.align_block, decoder.loop, name="blocks_to_tap", **fields
        )
        x, _ = early(x, *context)
        tapped = x
        aligned = layers.AlignmentMLP(decoder.align_width, decoder.dtype, name="align")(x)
    rest = decoder.layers - decoder.align_block
    if rest:
        x, _ = layers.scan(block, rest, decoder.loop, name="blocks", **fields)(x, *context)
    return tapped, aligned, x


def grid_out(decoder: nn.Module, x: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """f[b hw c] -> f[b h w 256]: norm and a 3x3 convolution on the grid."""
    x = layer_norm(decoder.dtype, "norm_out")(x).reshape(*shape, x.shape[-1])
    return conv(TOKEN_WIDTH, decoder.dtype, "conv_out")(x)
