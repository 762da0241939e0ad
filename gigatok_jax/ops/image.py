"""Resizing of images as two matrix products, and the input of frozen teachers.

Axes: b batch, h w position, c channel. The matrices depend on sizes alone: numpy makes each matrix
once, and it is a constant of the compiled step.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.errors import one_of

Method = Callable[[int, int], np.ndarray]  # source and target size to a matrix
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of [0, 1] pixels
NORMALISATION = {
    "dinov2": IMAGENET,
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Evaluates Keys' cubic kernel, with slope `a` at distance 1, at distances `x`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def to_pixels(images: jax.Array) -> jax.Array:
    """Converts uint8 images to float32 pixels in [-1, 1]."""
    return (images.astype(jnp.float32) / 255.0 - 0.5) / 0.5


@functools.cache
def bicubic(source: int, target: int) -> np.ndarray:
    """Returns the matrix f32[target source] of bicubic interpolation without antialiasing.

    Edge pixels are repeated, pixel centres are at half integers, and a = -0.75, as in PyTorch's
    `interpolate(mode="bicubic")`.
    Source: Keys 1981, doi:10.1109/TASSP.1981.1163711.
    """
    # Positions in float32 as PyTorch computes them: their rounding shows at 1e-4 in a pixel.
    half, scale = np.float32(0.5), np.float32(source) / np.float32(target)
    centre = (np.arange(target, dtype=np.float32) + half) * scale - half
    left = np.floor(centre).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        at = np.clip(left + tap, 0, source - 1)
        np.add.at(matrix, (np.arange(target), at), _cubic(centre - left - tap, -0.75))
    return matrix.astype(np.float32)


@functools.cache
def antialiased_bicubic(source: int, target: int) -> np.ndarray:
    """Returns the matrix f32[target source] of bicubic interpolation with antialiasing.

    The filter, with a = -0.5, is widened by the shrinking factor; rows are cut at the edges and
    sum to one, as in Pillow and with PyTorch's `antialias=True`.
    """
    scale = source / target
    width = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    position = np.arange(source) + 0.5
    weights = _cubic((position - centre[:, None]) / width, -0.5)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@functools.cache
def area(source: int, target: int) -> np.ndarray:
    """Returns the matrix f32[target source] that averages the pixels each output pixel overlaps.

    Overlapped pixels count whole, not by their overlap, as in PyTorch's `interpolate(mode="area")`.
    """
    start = np.arange(target) * source // target
    stop = -(-(np.arange(1, target + 1) * source) // target)
    at = np.arange(source)
    inside = (at >= start[:, None]) & (at < stop[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def resize(images: jax.Array, target: int, method: Method = bicubic) -> jax.Array:
    """Resizes images float[b h w c] to squares, float32[b target target c].

    Args:
        images: pixels of any range, square or not.
        target: side of the result in pixels.
        method: `bicubic`, `antialiased_bicubic` or `area`.
    """
    rows, columns = (method(size, target) for size in images.shape[1:3])
    # Full float32 products: with half precision pixels would be off by half a grey level.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    images = product("th,bhwc->btwc", rows, images.astype(jnp.float32))
    return product("tw,bhwc->bhtc", columns, images)


def normalise(images: jax.Array, mean: Sequence[float], deviation: Sequence[float]) -> jax.Array:
    """Moves pixels from [-1, 1] to [0, 1], subtracts `mean`, divides by `deviation`; float32."""
    mean, deviation = np.float32(mean), np.float32(deviation)
    return ((images.astype(jnp.float32) + 1) / 2 - mean) / deviation


def teacher_input(images: jax.Array, teacher: str = "dinov2", size: int = 224) -> jax.Array:
    """Normalises and resizes images float[b h w 3] to a frozen teacher's float32[b size size 3].

    Bicubic rows sum to one, so normalising before the resize (as with DINOv2) or after it (CLIP,
    SigLIP) is the same up to rounding; here it is always before.

    Args:
        images: pixels in [-1, 1].
        teacher: a key of `NORMALISATION`.
        size: side of the result in pixels.

    Raises:
        ConfigError: the teacher is unknown.
    """
    one_of("teacher", teacher, NORMALISATION)
    return resize(normalise(images, *NORMALISATION[teacher]), size)
