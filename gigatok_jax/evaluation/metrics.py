"""Metrics of images, codes and features as pure functions, computed on the host unless noted.

Axes: b images, h w position, k codebook rows, m and n feature vectors, c their width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 7  # pixels, side of SSIM's uniform window
PUBLISHED_SSIM_RANGE = 2.0  # range that the published numbers assume for pixels in [0, 1]


class CodebookUse(NamedTuple):
    """Record of how much of a codebook a set of codes uses."""

    usage: float  # fraction of rows that are used, in [0, 1]
    perplexity: float  # exp of the entropy of the codes' frequencies, in [1, k]
    dead_codes: int  # rows that are never used


class Gaussian(NamedTuple):
    """Record of a normal distribution of features: mean and covariance."""

    mean: np.ndarray  # f64[c]
    covariance: np.ndarray  # f64[c c], unbiased


def to_uint8(images: np.ndarray | jax.Array) -> np.ndarray:
    """Converts pixels in [-1, 1] to uint8 as the original does: clamps 127.5 x + 128, truncates.

    This inverts `x / 127.5 - 1` for every uint8 value.

    Args:
        images: float of any shape, nominally in [-1, 1].

    Returns:
        uint8 of the same shape.
    """
    return np.clip(127.5 * np.asarray(images, np.float32) + 128.0, 0, 255).astype(np.uint8)


def psnr(images: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Computes the peak signal-to-noise ratio of each image, over all pixels and channels.

    The published numbers compare the images that the model sees with `to_uint8(reconstructed)`.

    Args:
        images: uint8 or float in [-1, 1], [b h w 3].
        reconstructed: uint8 or float in [-1, 1], [b h w 3].

    Returns:
        f64[b] in dB, with peak 1 for pixels in [0, 1]; infinite for equal images.

    Raises:
        ValueError: the shapes differ.
    """
    pairs = _pairs(images, reconstructed)
    error = np.array([np.square(x - y).mean() for x, y in pairs])
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(
    images: np.ndarray, reconstructed: np.ndarray, data_range: float = PUBLISHED_SSIM_RANGE
) -> np.ndarray:
    """Computes the structural similarity (SSIM) of each image, in a uniform 7 x 7 window.

    The published numbers assume a range of 2 for pixels in [0, 1], which raises them; other work
    reports `data_range=1`.

    Args:
        images: uint8 or float in [-1, 1], [b h w 3].
        reconstructed: uint8 or float in [-1, 1], [b h w 3]; see `psnr`.
        data_range: distance between the largest and the smallest possible pixel in [0, 1].

    Returns:
        f64[b], in [-1, 1]; the mean over windows and channels.

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.

    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, with K1 0.01, K2 0.03 and, as in
        scikit-image, unbiased variances and without a border of half a window.
    """
    if min(np.shape(images)[1:3]) < WINDOW:
        raise ValueError(f"images are {np.shape(images)}, expected sides of at least {WINDOW}")
    return np.array([_ssim(x, y, data_range) for x, y in _pairs(images, reconstructed)])


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """Computes the use of a codebook from the number of times int[k] that each code occurs.

    Raises:
        ValueError: all counts are zero.
    """
    counts = np.asarray(counts, np.float64)
    if counts.sum() == 0:
        raise ValueError("no codes were counted, expected at least one")
    frequency = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-np.sum(frequency * np.log(frequency)))
    dead = int(np.sum(counts == 0))
    return CodebookUse(1 - dead / len(counts), float(perplexity), dead)


def gaussian(features: np.ndarray) -> Gaussian:
    """Computes mean and covariance of features float[n c], n >= 2, in float64."""
    features = np.asarray(features, np.float64)
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Computes the squared Frechet distance of two Gaussians: the FID if of Inception features.

    The trace of sqrt(A B) is computed as the sum of the singular values of sqrt(A) sqrt(B), which
    stays real for the singular covariances of few samples.

    Source: arXiv:1706.08500, eq. 6.
    """
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(np.sum(np.square(a.mean - b.mean)) + spread - 2 * cross)


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Computes the Inception score: exp of mean divergence from the marginal, averaged over splits.

    Args:
        probabilities: float[n classes], rows that sum to one and hold no zero.
        split: number of rows of a split; the last split may be shorter.

    Returns:
        A number in [1, classes].

    Source: arXiv:1606.03498; splits of 5000 as in the evaluation of arXiv:2105.05233.
    """
    probabilities = np.asarray(probabilities, np.float64)
    scores = []
    for start in range(0, len(probabilities), split):
        rows = probabilities[start : start + split]
        divergence = np.sum(rows * (np.log(rows) - np.log(rows.mean(axis=0))), axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Computes precision and recall of generated images' features against features of real images.

    Precision is the share of samples inside the manifold of the reference, recall the share of the
    reference inside the manifold of the samples. A manifold is the union of balls around its
    points; the radius of a ball is the distance to the point's k-th neighbour. Distances are
    computed on jax's default device in float32, `block` points at a time.

    Args:
        reference: float[m c], features of real images.
        samples: float[n c], features of generated images.
        neighbours: the k of the k-th neighbour.
        block: rows of the distance matrix that are held at once.

    Returns:
        Precision and recall, each in [0, 1].

    Source: arXiv:1904.06991, eq. 1 and 2.
    """
    reference, samples = jnp.asarray(reference), jnp.asarray(samples)
    precision = _share_inside(samples, reference, _radii(reference, neighbours, block), block)
    recall = _share_inside(reference, samples, _radii(samples, neighbours, block), block)
    return precision, recall


def _pairs(images, reconstructed):
    """Pairs each image with its reconstruction, as float64 in [0, 1], lazily to save memory."""
    images, reconstructed = np.asarray(images), np.asarray(reconstructed)
    if images.shape != reconstructed.shape:
        raise ValueError(f"images {images.shape} and {reconstructed.shape} must agree in shape")
    return ((_unit_range(x), _unit_range(y)) for x, y in zip(images, reconstructed, strict=True))


def _unit_range(image):
    """Converts an image of uint8, or of floats in [-1, 1], to float64 in [0, 1]."""
    if image.dtype == np.uint8:
        return image / 255.0
    return (image.astype(np.float64) + 1) / 2


def _ssim(x, y, data_range):
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variances = _window_mean(x * x) - mean_x**2 + _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    structure = (2 * unbiased * covariance + c2) / (unbiased * variances + c2)
    return np.mean(structure * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1))


def _window_mean(x):
    """Averages an image [h w c] over every whole SSIM window, by differences of running sums."""
    for axis in (0, 1):
        sums = np.insert(np.cumsum(x, axis=axis), 0, 0, axis=axis)
        size = sums.shape[axis]
        last = np.take(sums, np.arange(WINDOW, size), axis)
        x = (last - np.take(sums, np.arange(size - WINDOW), axis)) / WINDOW
    return x


def _root(covariance):
    """Computes the symmetric square root of a covariance; negative eigenvalues count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


@jax.jit
def _square_distances(a, b):
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)
    return jnp.maximum(squares - 2 * product, 0)


def _radii(points, neighbours, block):
    """Computes each point's squared distance to its k-th neighbour; the 0-th is itself."""
    radii = []
    for start in range(0, len(points), block):
        distances = _square_distances(points[start : start + block], points)
        radii.append(-jax.lax.top_k(-distances, neighbours + 1)[0][:, -1])
    return jnp.concatenate(radii)


def _share_inside(points, centres, radii, block):
    """Computes the share of points inside at least one ball; `radii` are squared."""
    inside = 0
    for start in range(0, len(points), block):
        distances = _square_distances(points[start : start + block], centres)
        inside += int(jnp.sum(jnp.any(distances <= radii, axis=1)))
    return inside / len(points)
