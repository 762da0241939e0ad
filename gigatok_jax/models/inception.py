"""Inception V3 for metrics of generated images. Axes: b batch, h w position, c channel.

FID is defined by the network of 2015, not by the later one of the same name: its average pooling
leaves out the padding, and its last block pools by the maximum. Blocks and layers are named as in
torch-fidelity, whose file holds the weights.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # side of the network's input in pixels
CLASSES = 1008
SPATIAL = 7  # channels of the spatial features


class Features(NamedTuple):
    """Record of the outputs of Inception V3 that metrics of generated images read."""

    pool: jax.Array  # f32[b 2048], for FID, precision and recall
    spatial: jax.Array  # f32[b 17 17 7], for sFID
    logits: jax.Array  # f32[b 1008]
    unbiased: jax.Array  # f32[b 1008], logits without the bias, for the Inception score


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """Resizes images bilinearly as TensorFlow 1 does, without antialiasing.

    The images float[b h w c] become f32[b s s c], s = `size`. Pixel i of the result lies at
    i * h / size in the image, without an offset of half a pixel; beyond the image's last pixel that
    pixel is repeated.
    """
    images = images.astype(jnp.float32)
    for axis in (1, 2):
        source = images.shape[axis]
        position = np.arange(size, dtype=np.float32) * np.float32(source / size)
        index = position.astype(int)
        weight = (position - index.astype(np.float32)).reshape(
            [-1 if i == axis else 1 for i in range(4)]
        )
        low = jnp.take(images, index, axis)
        high = jnp.take(images, np.minimum(index + 1, source - 1), axis)
        images = low + (high - low) * weight
    return images


class ConvNorm(nn.Module):
    """Module of a convolution, a batch norm with stored statistics, and a ReLU."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies convolution, norm and ReLU to f32[b h w c]; returns f32[b h w width]."""
        shape = (*self.kernel, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.width,))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        mean = self.param("mean", nn.initializers.zeros, (self.width,))
        variance = self.param("variance", nn.initializers.ones, (self.width,))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,  # metrics are compared to the third digit
        )
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(variance + 1e-3)) + bias)


def _mean_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _shrink(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
    """Module of an Inception block on 35 x 35 positions.

    Its branches have a kernel of 1, a kernel of 5, two kernels of 3, and a mean pool.
    """

    pool_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = ConvNorm(64, name="branch1x1")(x)
        five = ConvNorm(48, name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), name="branch5x5_2")(five)
        three = ConvNorm(64, name="branch3x3dbl_1")(x)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(three)
        three = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(three)
        pool = ConvNorm(self.pool_width, name="branch_pool")(_mean_pool(x))
        return _join(one, five, three, pool)


class BlockB(nn.Module):
    """Module of an Inception block that shrinks 35 x 35 positions to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        once = ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        twice = ConvNorm(64, name="branch3x3dbl_1")(x)
        twice = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(twice)
        twice = ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(twice)
        return _join(once, twice, _shrink(x))


class BlockC(nn.Module):
    """Module of an Inception block on 17 x 17 positions.

    Its branches have a kernel of 1, 7 x 7 as a row and a column, that pair twice, and a mean pool.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column, inner = (1, 7), (7, 1), self.width
        one = ConvNorm(192, name="branch1x1")(x)
        once = ConvNorm(inner, name="branch7x7_1")(x)
        once = ConvNorm(inner, row, name="branch7x7_2")(once)
        once = ConvNorm(192, column, name="branch7x7_3")(once)
        twice = ConvNorm(inner, name="branch7x7dbl_1")(x)
        twice = ConvNorm(inner, column, name="branch7x7dbl_2")(twice)
        twice = ConvNorm(inner, row, name="branch7x7dbl_3")(twice)
        twice = ConvNorm(inner, column, name="branch7x7dbl_4")(twice)
        twice = ConvNorm(192, row, name="branch7x7dbl_5")(twice)
        pool = ConvNorm(192, name="branch_pool")(_mean_pool(x))
        return _join(one, once, twice, pool)


class BlockD(nn.Module):
    """Module of an Inception block that shrinks 17 x 17 positions to 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = ConvNorm(192, name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = ConvNorm(192, name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return _join(three, seven, _shrink(x))


class BlockE(nn.Module):
    """Module of an Inception block on 8 x 8 positions.

    Its branches have a kernel of 1, 3 x 3 as a row beside a column, the same after a whole 3 x 3,
    and a pool, of the maximum if `max_pool`, else of the mean.
    """

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (1, 3), (3, 1)
        one = ConvNorm(320, name="branch1x1")(x)
        once = ConvNorm(384, name="branch3x3_1")(x)
        once_row = ConvNorm(384, row, name="branch3x3_2a")(once)
        once_column = ConvNorm(384, column, name="branch3x3_2b")(once)
        twice = ConvNorm(448, name="branch3x3dbl_1")(x)
        twice = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(twice)
        twice_row = ConvNorm(384, row, name="branch3x3dbl_3a")(twice)
        twice_column = ConvNorm(384, column, name="branch3x3dbl_3b")(twice)
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pool else _mean_pool(x)
        pool = ConvNorm(192, name="branch_pool")(pooled)
        return _join(one, once_row, once_column, twice_row, twice_column, pool)


class Inception(nn.Module):
    """Module of the Inception V3 whose features metrics of generated images compare.

    The metrics are FID, sFID, Inception score, precision and recall.

    Source: arXiv:1512.00567; weights of 2015-12-05, layers as in arXiv:1706.08500.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """Computes features of images of any size, uint8 or float[b h w 3] in [0, 255]."""
        x = (resize(images) - 128) / 128  # [b 299 299 3]
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)  # [b 147 147 64]
        x = ConvNorm(80, name="Conv2d_3b_1x1")(_shrink(x))
        x = _shrink(ConvNorm(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))  # [b 35 35 192]
        for name, width in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = BlockA(width, name=f"Mixed_{name}")(x)
        x = BlockB(name="Mixed_6a")(x)  # [b 17 17 768]
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160)):
            x = BlockC(width, name=f"Mixed_{name}")(x)
        spatial = x[..., :SPATIAL]  # from the first branch, "mixed_6/conv" in TensorFlow's graph
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)  # [b 8 8 1280]
        x = BlockE(False, name="Mixed_7b")(x)
        x = BlockE(True, name="Mixed_7c")(x)  # [b 8 8 2048]
        pool = x.mean((1, 2))  # [b 2048]
        shape = (pool.shape[-1], CLASSES)
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("fc_bias", nn.initializers.zeros, (CLASSES,))
        unbiased = jnp.dot(pool, kernel, precision=jax.lax.Precision.HIGHEST)
        return Features(pool, spatial, unbiased + bias, unbiased)
