"""Decoding and cropping."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from rule import load, shared_path

from gigatok_jax.data import transforms
from gigatok_jax.errors import DataError


def picture(height, width, seed=0):
    """uint8[h w 3], smooth enough that JPEG and resizing keep it recognisable."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Replay:
    """Hands out recorded draws and keeps the ranges they were asked from."""

    def __init__(self, values):
        self.values, self.ranges = list(values), []

    def integers(self, low, high=None):
        self.ranges.append([low] if high is None else [low, high])
        return self.values.pop(0)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_decode_exactly(kind, options):
    image = picture(20, 30)
    np.testing.assert_array_equal(transforms.decode(encoded(image, kind, **options)), image)


def test_a_path_decodes_like_its_bytes(tmp_path):
    image = picture(9, 7)
    (tmp_path / "a.png").write_bytes(encoded(image))
    np.testing.assert_array_equal(transforms.decode(tmp_path / "a.png"), image)
    assert transforms.size_of(tmp_path / "a.png") == (7, 9)


def test_cmyk_and_greyscale_become_the_same_colours():
    image = picture(24, 24)
    cmyk = transforms.decode(encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(cmyk.astype(int) - image).mean() < 3
    grey = image[..., 0]
    decoded = transforms.decode(encoded(grey))
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, -1))


def test_sixteen_bit_greyscale_is_scaled_not_clipped():
    grey = np.arange(0, 65536, 7, dtype=np.uint16)[:9216].reshape(96, 96)
    decoded = transforms.decode(encoded(grey))
    exact = grey.astype(np.float64) * 255 / 65535
    assert decoded.shape == (96, 96, 3)
    assert np.abs(decoded - exact[..., None]).max() <= 0.5
    white = transforms.decode(encoded(np.full((2, 2), 65535, np.uint16)))
    assert (white == 255).all()


def test_transparent_pixels_are_laid_over_white():
    image = picture(16, 16)
    alpha = np.random.default_rng(1).integers(0, 256, (16, 16, 1))
    rgba = np.concatenate([image, alpha], -1).astype(np.uint8)
    exact = (image * alpha + 255.0 * (255 - alpha)) / 255
    decoded = transforms.decode(encoded(rgba))
    assert np.abs(decoded - exact).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    decoded = transforms.decode(encoded(palette, transparency=0))
    np.testing.assert_array_equal(decoded, [[[255, 255, 255], [40, 50, 60]]])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_is_applied(kind):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :16] = 255  # white top left corner
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter clockwise to see it": top left goes to top right
    decoded = transforms.decode(encoded(image, kind, exif=exif))
    assert decoded.shape == (64, 32, 3)
    assert decoded[4:12, -12:-4].min() > 200 and decoded[:, :12].max() < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_match_pillow(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(5, 8), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(transforms.decode(data), expected)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_damaged_bytes_are_a_data_error(damage):
    whole = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    data = {"text": b"not an image", "empty": b"", "truncated": whole[: len(whole) // 2]}[damage]
    with pytest.raises(DataError):
        transforms.decode(data)


def test_crop_of_an_image_already_at_size_is_identity():
    image = picture(32, 32)
    np.testing.assert_array_equal(transforms.center_crop(image, 32), image)
    drawn = transforms.Crop(short_side=32, y=0, x=0)
    np.testing.assert_array_equal(transforms.crop(image, 32, drawn), image)


@pytest.mark.parametrize("shape", [(7, 9), (32, 90), (200, 61), (129, 128)])
def test_crops_have_their_size_and_draws_their_range(shape):
    image, rng = picture(*shape), np.random.default_rng(3)
    assert transforms.center_crop(image, 32).shape == (32, 32, 3)
    drawn = [transforms.draw_crop(shape, 32, rng) for _ in range(400)]
    assert {d.short_side for d in drawn} == set(range(32, 41))  # ceil(32 / 0.8) = 40
    for one in drawn[:20]:
        resized = transforms.resize(image, one.short_side)
        assert min(resized.shape[:2]) == one.short_side
        assert 0 <= one.y <= resized.shape[0] - 32 and 0 <= one.x <= resized.shape[1] - 32
        assert transforms.crop(image, 32, one).shape == (32, 32, 3)


def test_random_crop_draws_short_side_then_y_then_x():
    rng = Replay([36, 2, 5])
    result = transforms.random_crop(picture(40, 60), 32, rng)
    assert rng.ranges == [[32, 41], [5], [23]]  # 60 * 36 / 40 = 54 wide
    expected = transforms.resize(picture(40, 60), 36)[2:34, 5:37]
    np.testing.assert_array_equal(result, expected)


def test_ten_crops_are_five_and_the_mirrored_picture_of_them():
    image = picture(50, 70)
    crops = transforms.ten_crop(image, 32, 1.1)
    wide = transforms.center_crop(image, 35)
    np.testing.assert_array_equal(crops[0], wide[:32, :32])
    np.testing.assert_array_equal(crops[4], wide[2:34, 2:34])  # 1.5 rounds to even
    # Mirroring swaps left and right corners.
    np.testing.assert_array_equal(crops[[6, 5, 8, 7]], crops[:4, :, ::-1])
    np.testing.assert_array_equal(crops[5:], transforms.ten_crop(image[:, ::-1], 32, 1.1)[:5])


# The goldens were made from mosaics of the first four photographs. The nonsquare_*.png beside them
# show the same mosaics of four other photographs, so the sources are put together here.


def mosaic(name, numbers):
    """uint8[h w 3], the source picture `name` made of four photographs."""
    photographs = [transforms.decode(shared_path(f"images/00000{n}_gt.png")) for n in numbers]
    a, b, c, d = photographs
    if name == "wide":
        return np.concatenate([a, b], 1)[:230, 30:410]
    if name == "tall":
        return np.concatenate([c, d], 0)[10:470, 5:250]
    rows = [[a, b, c], [d, a[:, ::-1], b], [c, d, a]]
    return np.concatenate([np.concatenate(row, 1) for row in rows], 0)[20:620, 3:763]


@pytest.mark.goldens
@pytest.mark.parametrize("name", ["big", "wide", "tall"])
def test_mosaics_have_the_layout_of_the_shared_files(name):
    file = transforms.decode(shared_path(f"images/nonsquare_{name}.png"))
    np.testing.assert_array_equal(mosaic(name, (5, 7, 8, 9)), file)


@pytest.mark.goldens
@pytest.mark.parametrize("name", ["big", "wide", "tall"])
def test_crops_equal_the_goldens(name):
    arrays, meta = load(shared_path("preprocessing.npz"))
    source, image = meta["sources"][name], mosaic(name, (1, 2, 3, 4))
    assert list(image.shape[1::-1]) == source["size_wh"]
    np.testing.assert_array_equal(transforms.center_crop(image, 256), arrays[f"{name}_center256"])
    ranges, values = zip(*source["random_crop"]["draws"], strict=True)
    rng = Replay(values)
    result = transforms.random_crop(image, 256, rng)
    assert rng.ranges == list(ranges)
    np.testing.assert_array_equal(result, arrays[f"{name}_random256"])


@pytest.mark.goldens
@pytest.mark.parametrize("name", ["big", "wide", "tall"])
@pytest.mark.parametrize("ratio", ["1.1", "1.05"])
def test_ten_crops_equal_the_goldens(name, ratio):
    source = load(shared_path("preprocessing.npz"))[1]["sources"][name]
    crops = transforms.ten_crop(mosaic(name, (1, 2, 3, 4)), 256, float(ratio))
    digests = [hashlib.md5(one.tobytes()).hexdigest() for one in crops]
    assert digests == source[f"ten{ratio}_md5"]
