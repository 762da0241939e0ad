"""Transformers of the 2D tokenizers, one token per patch. Axes: b batch, h w grid, c width."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.models import layers
from gigatok_jax.models.cnn import TOKEN_WIDTH
from gigatok_jax.models.layers import dense, layer_norm, position_embedding
from gigatok_jax.models.qformer import Decoded, Encoded, grid_out, run_tapped


def _start(module: nn.Module, x: jax.Array):
    """Embeds a 2D tokenizer's tokens and chooses the blocks that `module.layer` names.

    Returns embedded tokens, the block's class, the block's constructor arguments, and the inputs
    that all blocks share.
    """
    x = dense(module.width, module.dtype, "embed")(layer_norm(module.dtype, "norm_in")(x))
    positions = position_embedding(module, "positions", x.shape[1])
    fields = {"heads": module.heads, "dtype": module.dtype}
    if module.layer == "transformer":
        return x + positions, layers.TransformerBlock, fields, ()
    # The memory of each block is its own input: the shared memory is None.
    return x, layers.QFormerBlock, fields | {"own_memory": True}, (None, positions, positions)


class Encoder2D(nn.Module):
    """Module of a 2D tokenizer's encoder: grid features to one token per patch."""

    layers: int
    heads: int
    width: int
    layer: str = "transformer"  # "qformer": cross-attention to the layer's own input
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> Encoded:
        """Encodes features f[b h w 256] as tokens f[b hw c] and their projection f[b hw 256]."""
        b, h, w, c = features.shape
        x, block, fields, context = _start(self, features.reshape(b, h * w, c))
        x, _ = layers.scan(block, self.layers, self.loop, name="blocks", **fields)(x, *context)
        tokens = layer_norm(self.dtype, "norm_out")(x)
        return Encoded(tokens, dense(TOKEN_WIDTH, self.dtype, "proj_out")(tokens))


class Decoder2D(nn.Module):
    """Module of a 2D tokenizer's decoder: one token per patch to grid features."""

    layers: int
    heads: int
    width: int
    grid: int
    layer: str = "transformer"
    align_block: int = 3
    align_width: int = 768
    loop: layers.Loop = layers.SCANNED
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> Decoded:
        """Decodes latents f[b hw 256] to features f[b h w 256] for the CNN decoder.

        Also returns the outputs of the alignment block and of the alignment MLP.
        """
        x, block, fields, context = _start(self, latents)
        tapped, aligned, x = run_tapped(self, block, fields, x, context)
        return Decoded(tapped, aligned, grid_out(self, x, (x.shape[0], self.grid, self.grid)))
