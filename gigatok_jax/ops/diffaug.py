"""Differentiable augmentation of images. Axes: b batch, h w position, c channel.

Source: arXiv:2006.10738; strengths as in StyleGAN-T (arXiv:2301.09515).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

TRANSLATION = 0.125  # largest shift, as a share of the side
CUTOUT = 0.2  # side of the blanked square, as a share of the image's


def random_augment(key: jax.Array, images: jax.Array, blur: float = 0.0) -> jax.Array:
    """Blurs, shifts, recolours and partly blanks images, with each image's draws from a key."""
    return augment(images, jax.random.uniform(key, (7, images.shape[0])), blur)


def augment(images: jax.Array, draws: jax.Array, blur: float = 0.0) -> jax.Array:
    """Blurs, shifts and recolours images and blanks a square in each, in this order.

    Args:
        images: float[b h w c].
        draws: float[7 b] in [0, 1), for each image: shift of rows and columns, brightness,
            saturation, contrast, row and column of the square.
        blur: strength in [0, 1], static; 0 is no blur.

    Returns:
        float32[b h w c], differentiable in `images`.
    """
    x = images.astype(jnp.float32)
    if blur > 0:
        x = _blur(x, blur)
    x = jax.vmap(_shift)(x, draws[0], draws[1])
    x = _recolour(x, *draws[2:5])
    return x * _outside_square(x.shape[1:3], draws[5], draws[6])


def _shift(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Shifts one image by whole pixels; pixels from outside are zero."""
    reach = [round(size * TRANSLATION) for size in image.shape[:2]]
    start = [
        jnp.floor(draw * (2 * r + 1)).astype(jnp.int32)
        for draw, r in zip((row, column), reach, strict=True)
    ]
    padded = jnp.pad(image, [(r, r) for r in reach] + [(0, 0)])
    return jax.lax.dynamic_slice(padded, (*start, 0), image.shape)


def _recolour(x: jax.Array, brightness, saturation, contrast) -> jax.Array:
    """Changes brightness, saturation and contrast of images f32[b h w c] by draws f32[b]."""
    brightness, saturation, contrast = (
        draw[:, None, None, None] for draw in (brightness, saturation, contrast)
    )
    x = x + (brightness - 0.5)
    grey = x.mean(-1, keepdims=True)  # [b h w 1]
    x = grey + (x - grey) * (2 * saturation)
    level = x.mean((1, 2, 3), keepdims=True)  # [b 1 1 1]
    return level + (x - level) * (contrast + 0.5)


def _outside_square(size: tuple[int, int], row: jax.Array, column: jax.Array) -> jax.Array:
    """Returns a mask f32[b h w 1]: 0 inside a square around the drawn centre, 1 elsewhere."""
    inside = [_interval(n, draw) for n, draw in zip(size, (row, column), strict=True)]
    return 1.0 - (inside[0][:, :, None] & inside[1][:, None, :])[..., None]


def _interval(size: int, draw: jax.Array) -> jax.Array:
    """Returns bool[b size], which positions of a side lie in the blanked interval of each image.

    The interval's centre is drawn, and its part beyond the edges is cut off.
    """
    length = round(size * CUTOUT)
    first = jnp.floor(draw * (size + 1 - length % 2)) - length // 2  # [b]
    at = np.arange(size)
    return (at >= first[:, None]) & (at < first[:, None] + length)


def _blur(x: jax.Array, strength: float) -> jax.Array:
    rows, columns = (_blur_matrix(size, x.shape[1], strength) for size in x.shape[1:3])
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return product("tw,bhwc->bhtc", columns, product("th,bhwc->btwc", rows, x))


@functools.cache
def _blur_matrix(size: int, height: int, strength: float) -> np.ndarray:
    """Returns the matrix f32[size size] that blurs along one side of an image, with mirrored edges.

    The weight at distance t is proportional to 2^-(t/s)^2, with s = strength * sqrt(height / 2).
    """
    width = strength * math.sqrt(height / 2)
    radius = math.floor(3 * width)
    if radius < 1:
        return np.eye(size, dtype=np.float32)
    bell = np.exp2(-np.square(np.arange(-radius, radius + 1) / width))
    source = np.pad(np.arange(size), radius, mode="reflect")
    matrix = np.zeros((size, size))
    for i, weight in enumerate(bell / bell.sum()):
        np.add.at(matrix, (np.arange(size), source[i : i + size]), weight)
    return matrix.astype(np.float32)
