"""Q-Former encoder and decoder between a 2D grid and 1D latent tokens.

Axes: b batch, h w image grid, n latent tokens, c width, t width of the teacher.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.model_config import pooled_grids
from gigatok_jax.models import layers
from gigatok_jax.models.cnn import TOKEN_WIDTH, conv
from gigatok_jax.models.layers import dense, layer_norm, position_embedding


class Encoded(NamedTuple):
    """Record of an encoder transformer's output: tokens f[b n c], their projection f[b n 256]."""

    tokens: jax.Array  # f[b n c], after the last norm, for probing the encoder
    projected: jax.Array  # f[b n 256]


class Decoded(NamedTuple):
    """Record of a decoder transformer's output: features for the CNN decoder, alignment outputs."""

    tapped: jax.Array | None  # f[b hw c], output of the alignment block
    aligned: jax.Array | None  # f[b hw t], output of the alignment MLP for it
    features: jax.Array  # f[b h w 256], for the CNN decoder


def pooled_queries(grid: jax.Array, latent_tokens: int) -> jax.Array:
    """Average-pools a grid into tokens at several levels, from coarse to fine.

    Args:
        grid: f[b h w c].
        latent_tokens: number of tokens, a power of two; the levels have 1, 1, 2, 4, ... tokens.

    Returns:
        f[b latent_tokens c]; tokens 0 and 1 are both the mean of the grid.
    """
    b, h, w, c = grid.shape
    levels = []
    for columns, rows in pooled_grids(latent_tokens):
        tiles = grid.reshape(b, rows, h // rows, columns, w // columns, c)
        levels.append(tiles.mean(axis=(2, 4)).reshape(b, rows * columns, c))
    return jnp.concatenate(levels, axis=1)


def region_queries(latents: jax.Array, grid: int, levels: str) -> jax.Array:
    """Spreads latent tokens over the grid cells of the regions that their queries were pooled from.

    Args:
        latents: f[b n c], n a power of two from 2 on, in the order of `pooled_queries`.
        grid: cells along one side of the image grid, a multiple of the finest level's sides.
        levels: "last_level" spreads the finest level alone; "multi_level" is the mean over all
            levels, where a level of k > 1 tokens reads tokens 0 to k - 1 instead of its own tokens,
            k to 2k - 1, as the original does.

    Returns:
        f[b grid*grid c]. The coarsest level is the mean of tokens 0 and 1.
    """
    b, n, c = latents.shape
    whole = latents[:, :2].mean(axis=1, keepdims=True)

    def spread(level: jax.Array, columns: int, rows: int) -> jax.Array:
        cells = level.reshape(b, rows, 1, columns, 1, c)
        cells = jnp.broadcast_to(cells, (b, rows, grid // rows, columns, grid // columns, c))
        return cells.reshape(b, grid**2, c)

    sides = pooled_grids(n)[1:]
    if levels == "last_level":
        return spread(latents[:, n // 2 :] if n > 2 else whole, *sides[-1])
    first, *finer = sides
    maps = [spread(whole, *first)]
    maps += [spread(latents[:, : columns * rows], columns, rows) for columns, rows in finer]
    return sum(maps) / len(maps)


class QFormerEncoder(nn.Module):
    """Module of the encoder to latent tokens: queries attend to the feature grid.

    By default the queries start as pooled features of the grid.
    """

    layers: int
    heads: int
    width: int
    latent_tokens: int = 256
    query_init: str = "multi_level"  # "mean": the grid's mean for all; "learnable": parameters
    qk_norm: bool = False
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> Encoded:
        """Encodes features f[b h w 256] as tokens f[b n c] and their projection f[b n 256]."""
        b, h, w, _ = features.shape
        memory = dense(self.width, self.dtype, "embed")(layer_norm(self.dtype, "norm_in")(features))
        x = self.queries(memory)  # [b n c]
        memory = memory.reshape(b, h * w, self.width)
        positions = position_embedding(self, "query_positions", self.latent_tokens)
        memory_positions = position_embedding(self, "positions", h * w)
        blocks = layers.scan(
            layers.QFormerBlock, self.layers, self.loop, name="blocks",
            heads=self.heads, qk_norm=self.qk_norm, dtype=self.dtype,
        )  # fmt: skip
        x, _ = blocks(x, memory, positions, memory_positions)
        tokens = layer_norm(self.dtype, "norm_out")(x)
        return Encoded(tokens, dense(TOKEN_WIDTH, self.dtype, "proj_out")(tokens))

    def queries(self, grid: jax.Array) -> jax.Array:
        """Computes the queries f[b n c] before the first block, from a grid f[b h w c]."""
        shape = (grid.shape[0], self.latent_tokens, self.width)
        if self.query_init == "learnable":
            return jnp.broadcast_to(position_embedding(self, "queries", self.latent_tokens), shape)
        if self.query_init == "multi_level":
            return dense(self.width, self.dtype, "query_proj")(
                pooled_queries(grid, self.latent_tokens)
            )
        mean = grid.mean(axis=(1, 2))[:, None]
        return jnp.broadcast_to(dense(self.width, self.dtype, "query_proj")(mean), shape)


class QFormerDecoder(nn.Module):
    """Module of the decoder from latent tokens to a grid: grid queries attend to latent tokens.

    The output of block `align_block` is also returned, and mapped to the teacher's width.
    """

    layers: int
    heads: int
    width: int
    grid: int  # tokens along one side of the image grid
    # Start of the queries: "first", the first latent token everywhere; "learnable", parameters;
    # "last_level", "multi_level", the latent tokens of the region that a cell lies in.
    query_init: str = "first"
    qk_norm: bool = False
    align_block: int = 3
    align_width: int = 768
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> Decoded:
        """Decodes latents f[b n 256] to features f[b h w 256] for the CNN decoder.

        Also returns the outputs of the alignment block and of the alignment MLP.
        """
        b, n, _ = latents.shape
        memory = dense(self.width, self.dtype, "embed")(layer_norm(self.dtype, "norm_in")(latents))
        x = self.queries(memory)
        positions = position_embedding(self, "positions", self.grid**2)
        memory_positions = position_embedding(self, "latent_positions", n)
        fields = {"heads": self.heads, "qk_norm": self.qk_norm, "dtype": self.dtype}
        tapped, aligned, x = run_tapped(
            self, layers.QFormerBlock, fields, x, (memory, positions, memory_positions)
        )
        return Decoded(tapped, aligned, grid_out(self, x, (b, self.grid, self.grid)))

    def queries(self, memory: jax.Array) -> jax.Array:
        """Computes the queries f[b hw c] before the first block, from a memory f[b n c]."""
        shape = (memory.shape[0], self.grid**2, self.width)
        if self.query_init == "learnable":
            return jnp.broadcast_to(position_embedding(self, "queries", self.grid**2), shape)
        if self.query_init in ("last_level", "multi_level"):
            return region_queries(memory, self.grid, self.query_init)
        return jnp.broadcast_to(memory[:, :1], shape)


def run_tapped(
    decoder: nn.Module, block: type[nn.Module], fields: dict, x: jax.Array, context: tuple
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """Runs all blocks of a decoder, as two scans with the alignment tap between the scans.

    Args:
        decoder: module with the fields layers, align_block, align_width, loop and dtype.
        block: class of the blocks.
        fields: constructor arguments of a block.
        x: f[b hw c], the stream before the first block.
        context: further inputs, the same for all blocks.

    Returns:
        The stream at the tap f[b hw c] and the alignment MLP's output f[b hw t], both None without
        alignment, and the stream after the last block f[b hw c].
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
    """Computes the CNN decoder's input f[b h w 256] from tokens f[b hw c].

    A layer norm is followed by a 3x3 convolution.
    """
    x = layer_norm(decoder.dtype, "norm_out")(x).reshape(*shape, x.shape[-1])
    return conv(TOKEN_WIDTH, decoder.dtype, "conv_out")(x)
