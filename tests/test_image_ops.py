"""Facts about resizing, teacher inputs and differentiable augmentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rule import load, pixels, shared_path

from gigatok_jax import errors
from gigatok_jax.ops import diffaug, image


def images(batch=2, height=32, width=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


@functools.cache
def photographs():
    paths = [shared_path(f"images/00000{i}_gt.png") for i in (1, 2)]
    return pixels(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))


TORCH = [("bicubic", False, image.bicubic), ("bicubic", True, image.antialiased_bicubic)]


@pytest.mark.parametrize("sizes", [(32, 28), (37, 16), (16, 33), (8, 8)])
@pytest.mark.parametrize(("mode", "antialias", "method"), [*TORCH, ("area", False, image.area)])
def test_resize_agrees_with_torch(sizes, mode, antialias, method):
    torch = pytest.importorskip("torch")
    x = images(1, sizes[0], sizes[0] + 3)
    flags = {"antialias": antialias} if mode == "bicubic" else {}
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), (sizes[1], sizes[1]), mode=mode, **flags
    )
    ours = image.resize(x, sizes[1], method)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize("method", [image.bicubic, image.antialiased_bicubic, image.area])
def test_resize_keeps_a_flat_image(method):
    np.testing.assert_allclose(method(256, 224).sum(1), 1, atol=1e-6)


def test_bicubic_keeps_a_ramp_away_from_the_edges():
    ramp = np.arange(64, dtype=np.float32)
    positions = (np.arange(56) + 0.5) * 64 / 56 - 0.5
    np.testing.assert_allclose((image.bicubic(64, 56) @ ramp)[3:-3], positions[3:-3], atol=0.15)
    exact = image.antialiased_bicubic(64, 64) @ ramp
    np.testing.assert_allclose(exact, ramp, atol=1e-5)


def test_teacher_input_has_the_normalisation_of_its_teacher():
    x = images(1, 64, 64)
    for teacher, (mean, deviation) in image.NORMALISATION.items():
        seen = np.asarray(image.teacher_input(x, teacher, size=64))  # the same size: no resize
        np.testing.assert_allclose((seen * deviation + mean) * 2 - 1, x, atol=1e-5)
    with pytest.raises(errors.ConfigError, match="teacher is 'vgg', expected one of dinov2"):
        image.teacher_input(x, "vgg")


@pytest.mark.goldens
def test_teacher_inputs_match_the_original():
    golden, _ = load(shared_path("preprocessing.npz"))
    seen = np.asarray(image.teacher_input(photographs())).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(seen[0], golden["dinov2_pre_img0"], atol=1e-5)
    np.testing.assert_allclose(seen[1, :, ::4, ::4], golden["dinov2_pre_img1_s4"], atol=1e-5)
    for teacher in ("clip", "siglip"):
        seen = np.asarray(image.teacher_input(photographs(), teacher)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(seen[..., ::4, ::4], golden[f"{teacher}_pre_s4"], atol=1e-5)


# Draws that change nothing but the one in question: no shift, no recolouring.
NEUTRAL = {"row": 0.5, "column": 0.5, "brightness": 0.5, "saturation": 0.5, "contrast": 0.5}


def draws(batch=2, **changes):
    values = NEUTRAL | {"square_row": 0.5, "square_column": 0.5} | changes
    return np.repeat(np.array(list(values.values()), np.float32)[:, None], batch, 1)


augment = jax.jit(diffaug.augment)


def test_neutral_draws_leave_all_but_the_square():
    x = images()
    y = np.asarray(augment(x, draws()))
    blank = (y == 0).all(-1)
    side = round(32 * diffaug.CUTOUT)
    np.testing.assert_array_equal(blank.sum((1, 2)), side * side)
    np.testing.assert_allclose(y[~blank], x[~blank], atol=1e-6)


@pytest.mark.parametrize(("draw", "shift"), [(0.0, -4), (0.999, 4), (0.5, 0), (0.3, -2)])
def test_translation_moves_pixels_exactly(draw, shift):
    x = images(1)
    y = np.asarray(diffaug._shift(x[0], jnp.float32(draw), jnp.float32(0.5)))
    expected = np.zeros_like(x[0])
    kept = slice(max(0, -shift), 32 - max(0, shift))
    expected[kept] = x[0, kept.start + shift : kept.stop + shift]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("draw", [0.0, 0.1, 0.73, 0.999])
def test_cutout_is_a_square_cut_at_the_edges(draw):
    blank = 1 - np.asarray(
        diffaug._outside_square((20, 30), np.float32([draw]), np.float32([draw]))
    )
    rows, columns = np.nonzero(blank[0, ..., 0])
    for at, size in ((rows, 20), (columns, 30)):
        length = round(size * diffaug.CUTOUT)
        first = int(draw * (size + 1 - length % 2)) - length // 2
        assert (at.min(), at.max()) == (max(first, 0), min(first + length, size) - 1)
    assert blank.sum() == len(set(rows)) * len(set(columns))


def test_colour_changes_are_affine_about_their_means():
    x = images()
    y = np.asarray(augment(x, draws(brightness=0.75, saturation=0.0)))
    inside = y != 0
    grey = np.broadcast_to(x.mean(-1, keepdims=True) + 0.25, x.shape)
    np.testing.assert_allclose(y[inside], grey[inside], atol=1e-6)
    y = np.asarray(augment(x, draws(contrast=0.0)))
    level = x.mean((1, 2, 3), keepdims=True)
    halved = level + (x - level) / 2
    inside = y != 0
    np.testing.assert_allclose(y[inside], halved[inside], atol=1e-6)


def test_each_image_has_its_own_draws():
    x, d = images(3), np.random.default_rng(1).random((7, 3), np.float32)
    apart = [augment(x[i : i + 1], d[:, i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(augment(x, d), np.stack(apart), atol=1e-6)


@pytest.mark.parametrize("blur", [0.0, 0.3])
def test_augmentation_is_affine_in_the_image(blur):
    x, y = images(seed=1), images(seed=2)
    d = np.random.default_rng(3).random((7, 2), np.float32)
    run = jax.jit(functools.partial(diffaug.augment, draws=d, blur=blur))
    middle = run((x + y) / 2)
    np.testing.assert_allclose(middle, (run(x) + run(y)) / 2, atol=1e-5)
    # The derivative of an affine map is its own difference.
    slope = jax.jvp(run, (x,), (y - x,))[1]
    np.testing.assert_allclose(slope, run(y) - run(x), atol=1e-5)


def test_gradient_of_a_random_augmentation_is_finite_and_zero_in_the_square():
    x, key = images(), jax.random.key(0)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(diffaug.random_augment(key, x) ** 2)))(x)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_blur_keeps_the_mean_of_a_constant_and_widens_a_point():
    matrix = diffaug._blur_matrix(32, 32, 0.3)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix[16], matrix[16][::-1].take(range(-1, 31)), atol=1e-6)
    assert 0 < matrix[16, 18] < matrix[16, 17] < matrix[16, 16] < 1


@pytest.mark.goldens
def test_augmentation_matches_the_original():
    golden, _ = load(shared_path("dino_disc.npz"))
    y = np.asarray(augment(photographs(), golden["diffaug_rand01"])).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(y[..., ::2, ::2], golden["diffaug_out_s2"], atol=1e-5)
    y = diffaug.augment(photographs(), golden["diffaug_rand01"], blur=0.3)
    y = np.asarray(y).transpose(0, 3, 1, 2)[..., ::4, ::4]
    np.testing.assert_allclose(y, golden["diffaug_blur0.3_out_s4"], atol=1e-5)
