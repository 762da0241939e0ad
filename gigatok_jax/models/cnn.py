"""Encoders and decoders between pixels and a feature grid.

Axes: b batch, h height, w width, c channel.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gigatok_jax.models.layers import dense, weight_init
from gigatok_jax.ops import attention
from gigatok_jax.ops.constrain import BATCH, constrain

TOKEN_WIDTH = 256  # channels of the feature grid, the same for every published model
LEVELS = (1, 1, 2, 2, 4)  # channel multipliers from full resolution down


def conv(
    features: int, dtype: DTypeLike, name: str, kernel: int = 3, stride: int = 1, padding: Any = 1
) -> nn.Conv:
    """Makes a square convolution with normal initial weights of deviation 0.02.

    `padding` is any padding that `flax.linen.Conv` accepts.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding,
        dtype=dtype,
        kernel_init=weight_init,
        conv_general_dilated=_with_whole_kernel,
        name=name,
    )


def _with_whole_kernel(x: jax.Array, kernel: jax.Array, *arguments, **options) -> jax.Array:
    # Without the constraint XLA divides small images by channel, which gathers all examples.
    return jax.lax.conv_general_dilated(x, constrain(kernel), *arguments, **options)


def group_norm(dtype: DTypeLike, name: str | None, affine: bool = True) -> nn.GroupNorm:
    """Makes a group norm with 32 groups, epsilon 1e-6 and statistics in float32.

    In half precision one pass takes the mean and the mean of squares. In float32, which is for
    exact results, the mean is subtracted before squares are taken.
    """
    return nn.GroupNorm(
        32,
        epsilon=1e-6,
        dtype=dtype,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=dtype != jnp.float32,
        name=name,
    )


def channels(base: int, patch_size: int) -> list[int]:
    """Returns the number of channels of each level of the CNN, full resolution first.

    The image is halved log2(patch_size) times; each halving adds a level.
    """
    halvings = int(math.log2(patch_size))
    # The published models halve four times; further levels repeat the last multiplier.
    return [base * LEVELS[min(i, len(LEVELS) - 1)] for i in range(halvings + 1)]


def depth_to_space(x: jax.Array, block: int = 2) -> jax.Array:
    """Rearranges channels into pixels: f[b h w block^2*c] -> f[b block*h block*w c].

    Along the input's channels, a pixel's offset in its block varies slower than its channel.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, block, block, c // block**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * block, w * block, c // block**2)


class ResnetBlock(nn.Module):
    """Module of a residual block: norm, SiLU and convolution, twice, beside a shortcut."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the residual block to f[b h w c]; returns f[b h w features]."""
        x = constrain(x, BATCH)
        y = nn.silu(group_norm(self.dtype, "norm1")(x))
        y = conv(self.features, self.dtype, "conv1")(y)
        y = nn.silu(group_norm(self.dtype, "norm2")(y))
        y = conv(self.features, self.dtype, "conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, self.dtype, "shortcut", kernel=1, padding=0)(x)
        return x + y


class SpatialAttention(nn.Module):
    """Module of single-head self-attention over all positions, with a residual connection."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds self-attention over all positions to f[b h w c]; returns f[b h w c]."""
        b, h, w, c = x.shape
        y = group_norm(self.dtype, "norm")(x).reshape(b, h * w, c)
        q, k, v = (dense(c, self.dtype, name)(y)[:, :, None] for name in ("query", "key", "value"))
        y = attention.attend(q, k, v)[:, :, 0]  # [b hw c]
        return x + dense(c, self.dtype, "out")(y).reshape(x.shape)


class AdaptiveGroupNorm(nn.Module):
    """Module of a group norm whose scale and shift depend on the decoder's input grid.

    Scale and shift are linear in the grid's deviation and mean over positions.

    Source: arXiv:2310.05737 (MAGVIT-v2). As in the original the scale multiplies directly, without
    an added 1, and the variance over positions is the unbiased one.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        """Norms features f[b h w c], scaled and shifted by f[b g g e]; returns f[b h w c].

        `style`, f[b g g e], is the input grid of the decoder.
        """
        style = style.reshape(style.shape[0], -1, style.shape[-1]).astype(jnp.float32)
        deviation = jnp.sqrt(style.var(axis=1, ddof=1) + 1e-6)  # [b e]
        scale = dense(x.shape[-1], self.dtype, "scale")(deviation)[:, None, None]
        shift = dense(x.shape[-1], self.dtype, "shift")(style.mean(axis=1))[:, None, None]
        return scale * group_norm(self.dtype, None, affine=False)(x) + shift


class CNNEncoder(nn.Module):
    """Module of the CNN encoder from image to feature grid.

    Its levels are residual blocks; between two levels the resolution is halved.
    """

    base: int = 128  # channels at full resolution
    patch_size: int = 16
    attention: bool = False  # after each block at the lowest resolution and in the middle
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Encodes images f[b H W 3] in [-1, 1] as feature grids f[b h w 256]."""
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        widths = channels(self.base, self.patch_size)
        last = len(widths) - 1
        x = conv(self.base, self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            for j in range(2):
                x = block(width, self.dtype, name=f"level_{i}_block_{j}")(x)
                if self.attention and i == last:
                    x = SpatialAttention(self.dtype, name=f"level_{i}_attention_{j}")(x)
            if i != last:
                # An even image and a stride of 2: zeros below and to the right only.
                pad = ((0, 1), (0, 1))
                x = conv(width, self.dtype, f"level_{i}_down", stride=2, padding=pad)(x)
        x = middle(x, block, self.attention, self.dtype)
        x = nn.silu(group_norm(self.dtype, "norm_out")(x))
        return conv(TOKEN_WIDTH, self.dtype, "conv_out")(x)


class CNNDecoder(nn.Module):
    """Module of the CNN decoder from feature grid to image.

    It mirrors `CNNEncoder`, with three residual blocks per level instead of two.
    """

    base: int = 128  # channels at full resolution
    patch_size: int = 16
    attention: bool = False
    adaptive_group_norm: bool = True
    depth_to_space: bool = True  # else nearest-neighbour enlargement
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Decodes feature grids f[b h w 256] to images f[b H W 3], nominally in [-1, 1]."""
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        widths = channels(self.base, self.patch_size)[::-1]
        x = conv(widths[0], self.dtype, "conv_in")(features)
        x = middle(x, block, self.attention, self.dtype)
        for i, width in enumerate(widths):
            if self.adaptive_group_norm:
                x = AdaptiveGroupNorm(self.dtype, name=f"level_{i}_adaptive")(x, features)
            for j in range(3):
                x = block(width, self.dtype, name=f"level_{i}_block_{j}")(x)
                if self.attention and i == 0:
                    x = SpatialAttention(self.dtype, name=f"level_{i}_attention_{j}")(x)
            if i != len(widths) - 1:
                x = self.upsample(x, f"level_{i}_up")
        x = nn.silu(group_norm(self.dtype, "norm_out")(x))
        return conv(3, self.dtype, "conv_out")(x)

    def upsample(self, x: jax.Array, name: str) -> jax.Array:
        """Enlarges f[b h w c] to f[b 2h 2w c], with a convolution."""
        if self.depth_to_space:
            return depth_to_space(conv(4 * x.shape[-1], self.dtype, name)(x))
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return conv(x.shape[-1], self.dtype, name)(x)


def middle(x: jax.Array, block: type[nn.Module], attention: bool, dtype: DTypeLike) -> jax.Array:
    """Applies two residual blocks at the lowest resolution, and attention between them if set."""
    x = block(x.shape[-1], dtype, name="mid_block_0")(x)
    if attention:
        x = SpatialAttention(dtype, name="mid_attention")(x)
    return block(x.shape[-1], dtype, name="mid_block_1")(x)


class PatchEncoder(nn.Module):
    """Module of an encoder from image to feature grid that maps each patch linearly.

    It is fast on a CPU and serves the demo; it is not in the paper.
    """

    patch_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Encodes images f[b H W 3] in [-1, 1] as feature grids f[b h w 256]."""
        p = self.patch_size
        b, h, w, c = x.shape
        x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, h // p, w // p, p * p * c)
        return dense(TOKEN_WIDTH, self.dtype, "embed", nn.initializers.lecun_normal())(x)


class PatchDecoder(nn.Module):
    """Module of a decoder from feature grid to image: norm, SiLU, a linear map for each patch.

    It is fast on a CPU and serves the demo, with `PatchEncoder`; it is not in the paper.
    """

    patch_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Decodes feature grids f[b h w 256] to images f[b H W 3]."""
        x = nn.silu(nn.LayerNorm(dtype=self.dtype, name="norm_out")(features))
        return depth_to_space(dense(self.patch_size**2 * 3, self.dtype, "out")(x), self.patch_size)
