"""LPIPS, a perceptual distance of images, on VGG16. Axes: b batch, h w position, c channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five stages of VGG16
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each stage

_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class VGG16(nn.Module):
    """Module of VGG16's convolutions (arXiv:1409.1556), which returns all five stages' outputs."""

    widths: tuple[int, ...] = WIDTHS
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Computes the outputs of VGG16's five stages, after ReLU, for scaled images f[b h w 3].

        Returns f[b h w c], f[b h/2 w/2 c], ..., each with the stage's number of channels.
        """
        stages = []
        for i, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True), start=1):
            if i > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j in range(1, depth + 1):
                x = nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv{i}_{j}")(x)
                x = nn.relu(x)
            stages.append(x)
        return stages


def unit_channels(x: jax.Array) -> jax.Array:
    """Divides features f[b h w c] by their length over channels plus 1e-10; returns f32[b h w c].

    Where every channel is zero, value and gradient are zero; the gradient of the original is not
    finite there (the root of zero).
    """
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)  # [b h w 1]
    nonzero = square > 0
    length = jnp.sqrt(jnp.where(nonzero, square, 1.0))
    return jnp.where(nonzero, x / (length + 1e-10), 0.0)


class LPIPS(nn.Module):
    """Module of LPIPS, the learned perceptual distance of two images, version 0.1 with VGG16.

    Unlike the training code of the original the module has no dropout before the heads.

    Source: arXiv:1801.03924.
    """

    widths: tuple[int, ...] = WIDTHS
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vgg = VGG16(self.widths, self.dtype)
        self.heads = [
            self.param(f"head_{i}", nn.initializers.ones, (width, 1))
            for i, width in enumerate(self.widths)
        ]

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Computes the distances f32[b] between two batches of images float[b h w 3] in [-1, 1].

        With the published heads distances are >= 0. The sides h and w are at least 16.
        """
        # Two passes, so that images without a gradient keep no activations.
        pairs = zip(self.features(a), self.features(b), self.heads, strict=True)
        return sum(_stage_distance(x, y, head) for x, y, head in pairs)

    def features(self, images: jax.Array) -> list[jax.Array]:
        """Computes the outputs of five VGG16 stages for images float[b h w 3] in [-1, 1]."""
        return self.vgg((images.astype(jnp.float32) - _SHIFT) / _SCALE)


def _stage_distance(x: jax.Array, y: jax.Array, head: jax.Array) -> jax.Array:
    difference = jnp.square(unit_channels(x) - unit_channels(y))  # [b h w c]
    return (difference.mean((1, 2)) * head[:, 0]).sum(-1)  # [b]
