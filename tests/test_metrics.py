import json

import numpy as np
import pytest
import rule

from gigatok_jax.evaluation import metrics

GOLDEN = json.loads(rule.golden_path("evaluation.json").read_text())
CASES = GOLDEN["cases"]


def images(seed, shape=(3, 40, 33, 3), noise=0.2):
    """Smooth pictures in [-1, 1] and distorted copies of them."""
    rng = np.random.default_rng(seed)
    clean = np.cumsum(np.cumsum(rng.normal(size=shape), axis=1), axis=2)
    clean = (clean / np.abs(clean).max()).astype(np.float32)
    return clean, (0.9 * clean + noise * rng.normal(size=shape)).astype(np.float32)


def features(k, n, d, scale, shift):
    drawn = np.random.RandomState(GOLDEN["seed"] + 71 + k).standard_normal((n, d))
    return drawn.astype(np.float32) * np.float32(scale) + np.float32(shift)


def test_uint8_is_the_inverse_of_the_models_range():
    values = np.arange(256, dtype=np.uint8)
    pixels = (values / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(metrics.to_uint8(pixels), values)
    np.testing.assert_array_equal(
        metrics.to_uint8([-3.0, -1.004, 0.0, 0.99, 7.0]), [0, 0, 128, 254, 255]
    )


@pytest.mark.parametrize("quantised", [False, True])
def test_psnr_and_ssim_are_scikit_images(quantised):
    skimage = pytest.importorskip("skimage.metrics")
    clean, distorted = images(0)
    compared = metrics.to_uint8(distorted) if quantised else distorted
    ours = metrics.psnr(clean, compared), metrics.ssim(clean, compared, 1.0)
    published = metrics.ssim(clean, compared)
    for i, (x, y) in enumerate(zip(clean, compared, strict=True)):
        x = (x.astype(np.float64) + 1) / 2
        y = y / 255 if quantised else (y.astype(np.float64) + 1) / 2
        expected = skimage.peak_signal_noise_ratio(x, y, data_range=1)
        assert ours[0][i] == pytest.approx(expected, rel=1e-9)
        for similarity, span in ((ours[1][i], 1.0), (published[i], 2.0)):
            expected = skimage.structural_similarity(x, y, data_range=span, channel_axis=-1)
            assert similarity == pytest.approx(expected, rel=1e-8)


def test_equal_images_are_perfect():
    clean, _ = images(1)
    np.testing.assert_array_equal(metrics.psnr(clean, clean), np.inf)
    np.testing.assert_allclose(metrics.ssim(clean, clean), 1.0)


def test_shapes_that_cannot_be_compared_are_refused():
    clean, _ = images(2)
    with pytest.raises(ValueError, match="agree in shape"):
        metrics.psnr(clean, clean[:2])
    with pytest.raises(ValueError, match="at least 7"):
        metrics.ssim(clean[:, :6], clean[:, :6])


@pytest.mark.goldens
def test_psnr_and_ssim_of_photographs_are_the_originals():
    image = pytest.importorskip("PIL.Image")
    case = CASES["psnr_ssim"]
    files = [rule.shared_path(f"images/{name}.png") for name in case["images"]]
    x = np.stack([np.asarray(image.open(file)) for file in files]).astype(np.float32) / 127.5 - 1
    noise = np.random.RandomState(GOLDEN["seed"] + 91).standard_normal((2, 3, 256, 256))
    noise = noise.astype(np.float32).transpose(0, 2, 3, 1)
    reconstructed = metrics.to_uint8((x + np.float32(0.15) * noise) * np.float32(0.95))
    expected = {key: [v[key] for v in case["values"]] for key in ("psnr", "ssim", "ssim_dr1")}
    np.testing.assert_allclose(metrics.psnr(x, reconstructed), expected["psnr"], rtol=1e-4)
    np.testing.assert_allclose(metrics.ssim(x, reconstructed), expected["ssim"], rtol=1e-4)
    ssim = metrics.ssim(x, reconstructed, data_range=1.0)
    np.testing.assert_allclose(ssim, expected["ssim_dr1"], rtol=1e-4)


def test_codebook_use_counts_rows_and_their_evenness():
    use = metrics.codebook_use(np.bincount([3, 3, 5, 5, 5, 5, 0, 0], minlength=8))
    assert use.usage == 3 / 8 and use.dead_codes == 5
    assert use.perplexity == pytest.approx(2**1.5)  # frequencies 1/4, 1/4, 1/2: 1.5 bits
    even = metrics.codebook_use(np.full(64, 9))
    assert even.usage == 1 and even.dead_codes == 0 and even.perplexity == pytest.approx(64)
    with pytest.raises(ValueError, match="no codes"):
        metrics.codebook_use(np.zeros(4))


def test_frechet_distance_is_the_originals():
    case = CASES["frechet_d64"]
    a, b = (metrics.gaussian(features(*case[name])) for name in "ab")
    assert metrics.frechet_distance(a, b) == pytest.approx(case["value"], rel=1e-4)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.goldens
def test_frechet_distance_of_inception_width_is_the_originals():
    case = json.loads(rule.shared_path("evaluation_big.json").read_text())["cases"]["frechet_d2048"]
    a, b = (metrics.gaussian(features(*case[name])) for name in "ab")
    assert metrics.frechet_distance(a, b) == pytest.approx(case["value"], rel=1e-4)


def test_frechet_distance_of_few_samples():
    """Ten samples in 32 dimensions: singular covariances, checked by the matrix root."""
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(3)
    a, b = (metrics.gaussian(rng.normal(size=(10, 32)) * s) for s in (1.0, 1.3))
    regular = 1e-12 * np.eye(32)
    root = linalg.sqrtm((a.covariance + regular) @ (b.covariance + regular)).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_inception_score_is_the_originals():
    drawn = np.random.RandomState(GOLDEN["seed"] + 81).standard_normal((6000, 1008))
    weights = np.exp(drawn.astype(np.float32) * 2)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    case = CASES["inception_score"]
    assert metrics.inception_score(probabilities) == pytest.approx(case["value"], rel=1e-4)
    first = metrics.inception_score(probabilities[:5000])
    assert first == pytest.approx(case["value_first_5000"], rel=1e-4)


@pytest.mark.parametrize("name", ["prec_recall_d16_fp32", "prec_recall_d64_fp32"])
def test_precision_and_recall_are_the_originals(name):
    case = CASES[name]
    ours = metrics.precision_recall(features(*case["ref"]), features(*case["sample"]))
    np.testing.assert_allclose(ours, (case["precision"], case["recall"]), atol=0.002)


def test_precision_and_recall_of_the_same_points_are_one():
    points = features(5, 50, 4, 1.0, 0.0)
    assert metrics.precision_recall(points, points, block=16) == (1.0, 1.0)
    assert metrics.precision_recall(points, points + 1e3) == (0.0, 0.0)
