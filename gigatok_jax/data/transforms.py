"""Decodes, resizes and crops uint8 images, without jax. Axes: h height, w width."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from gigatok_jax.errors import DataError

MIN_CROP_SHARE = 0.8  # a random crop shows at least this share of the short side

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # orientation tag to the operation that turns the image upright: EXIF 2.32, 4.6.4
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Crop(NamedTuple):
    """Record of the scale and position of a random crop."""

    short_side: int  # of the image after resizing, in [size, size / 0.8]
    y: int  # first row of the crop in the resized image
    x: int  # first column


def decode(data: bytes | epath.PathLike) -> np.ndarray:
    """Decodes one image to the pixels that a viewer would show.

    EXIF rotation is applied. Greyscale, palette and CMYK become RGB. 16-bit greyscale is scaled
    to 8 bits (65535 becomes 255). Transparent pixels are blended with white, while the original
    drops the alpha channel and so shows the colours beneath it.

    Args:
        data: byte string of a PNG, JPEG or WebP file, or the path of such a file.

    Returns:
        uint8[h w 3].

    Raises:
        DataError: the file is no whole image; the message gives the reason, but no file name.
    """
    try:
        data = data if isinstance(data, bytes) else epath.Path(data).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            upright = _UPRIGHT.get(_orientation(image))
            image.load()
            rgb = _to_rgb(image)
            return np.asarray(rgb if upright is None else rgb.transpose(upright))
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        raise DataError(_reason(error)) from error


def size_of(path: epath.PathLike) -> tuple[int, int]:
    """Reads the width and height, in pixels, from the header of an image file.

    Raises DataError if the file has no such header.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            return image.size
    except Exception as error:
        raise DataError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"  # Pillow's own message shows the address of a buffer
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels behind a damaged tag may be intact
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders; older Pillow opens them as I
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _halved(height: int, width: int, short_side: int) -> list[tuple[int, int]]:
    steps = []
    while min(height, width) >= 2 * short_side:
        height, width = height // 2, width // 2
        steps.append((height, width))
    return steps


def _resized_shapes(height: int, width: int, short_side: int) -> list[tuple[int, int]]:
    """Returns the shapes of an image after each step of `resize`.

    Halvings come first, then the bicubic step, whose shape is rounded half to even.
    """
    steps = _halved(height, width, short_side)
    height, width = steps[-1] if steps else (height, width)
    scale = short_side / min(height, width)
    return [*steps, (round(height * scale), round(width * scale))]


def resize(image: np.ndarray, short_side: int) -> np.ndarray:
    """Enlarges or reduces an image uint8[h w 3] until its short side has `short_side` pixels.

    A box filter halves the image while its short side stays at least that long; one antialiased
    bicubic step follows. Source: image_datasets.py of guided-diffusion (MIT), as in the published
    recipes.
    """
    *halves, (height, width) = _resized_shapes(*image.shape[:2], short_side)
    if image.shape[:2] == (height, width):
        return image  # Pillow would return the same pixels
    picture = Image.fromarray(image)
    for half_height, half_width in halves:
        picture = picture.resize((half_width, half_height), resample=Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), resample=Image.Resampling.BICUBIC))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image to the short side `size`, and cuts out its middle uint8[size size 3]."""
    image = resize(image, size)
    y, x = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[y : y + size, x : x + size]


def draw_crop(shape: Sequence[int], size: int, rng: np.random.Generator) -> Crop:
    """Draws the scale and position of a random crop: short side first, then y, then x.

    Args:
        shape: (height, width, ...) of the image.
        size: side of the crop in pixels.
        rng: source of three integers, each uniform over its range.
    """
    short_side = int(rng.integers(size, math.ceil(size / MIN_CROP_SHARE) + 1))
    height, width = _resized_shapes(shape[0], shape[1], short_side)[-1]
    y = int(rng.integers(height - size + 1))
    return Crop(short_side, y, int(rng.integers(width - size + 1)))


def crop(image: np.ndarray, size: int, drawn: Crop) -> np.ndarray:
    """Cuts the crop uint8[size size 3] at the position and scale that `draw_crop` chose."""
    image = resize(image, drawn.short_side)
    return image[drawn.y : drawn.y + size, drawn.x : drawn.x + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a random crop uint8[size size 3] out of an image that is resized at random.

    The short side of the image becomes 1 to 1.25 times `size`, rounded up.
    """
    return crop(image, size, draw_crop(image.shape, size, rng))


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrors an image left to right; returns a view of the array."""
    return image[:, ::-1]


def ten_crop(image: np.ndarray, size: int, ratio: float) -> np.ndarray:
    """Cuts ten crops from a larger centre crop: corners and middle, then the same mirrored.

    Args:
        image: uint8[h w 3].
        size: side of every crop in pixels.
        ratio: the centre crop is int(size * ratio) pixels wide; published 1.1 and 1.05.

    Returns:
        uint8[10 size size 3]: top left, top right, bottom left, bottom right, middle; then these
        five of the mirrored centre crop.
    """
    wide = center_crop(image, int(size * ratio))
    return np.stack([*_five_crop(wide, size), *_five_crop(flip(wide), size)])


def _five_crop(image: np.ndarray, size: int) -> list[np.ndarray]:
    far = image.shape[0] - size
    middle = round(far / 2)  # half to even, as the published codes were extracted
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    return [image[y : y + size, x : x + size] for y, x in corners]
