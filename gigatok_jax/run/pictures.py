"""Draws and writes pictures of a run as PNG.

Axes: b images, h height, w width, k codebook rows.
"""

import io
import zlib

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from gigatok_jax import files

GAP, SEAM = 8, 2  # pixels between tiles; between an original and its reconstruction
SMALLEST = 96  # pixels; smaller tiles are enlarged by a whole factor so that a person can see them
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
PAPER, INK, BAR, DEAD = (250, 250, 250), (60, 60, 60), (47, 111, 237), (217, 72, 65)


def save(workdir: epath.PathLike, kind: str, step: int, picture: np.ndarray) -> epath.Path:
    """Writes a picture to `pictures/<kind>_<step>.png` in a workdir.

    The page of the run shows a gallery of each kind.

    Args:
        workdir: folder of the run.
        kind: name of the gallery, such as "reconstruction".
        step: number of optimizer updates done.
        picture: uint8[h, w, 3].

    Returns:
        Path of the file.
    """
    return _write(workdir, f"{kind}_{step:08d}.png", picture)


def save_class(
    workdir: epath.PathLike, class_id: int, name: str, picture: np.ndarray
) -> epath.Path:
    """Writes a picture of a class to `pictures/class_<class id>_<name>.png` in a workdir.

    The page of the run shows classes in the order of their ids.

    Args:
        workdir: folder of the run.
        class_id: index of the class, 0 or more.
        name: name of the class, fit for a file's name.
        picture: uint8[h, w, 3].

    Returns:
        Path of the file.
    """
    return _write(workdir, f"class_{class_id:04d}_{name}.png", picture)


def _write(workdir: epath.PathLike, name: str, picture: np.ndarray) -> epath.Path:
    folder = epath.Path(workdir) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / name, encode(picture))
    return folder / name


def encode(picture: np.ndarray) -> bytes:
    """Encodes a picture uint8[h, w, 3] as PNG; returns the byte string of the file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def is_whole(data: bytes, size: int) -> bool:
    """Returns whether a byte string is an undamaged RGB PNG file of `size` x `size` pixels.

    Every checksum has to be right: Pillow would pass over damage in chunks that it takes for
    optional.
    """
    kind = size.to_bytes(4) * 2 + bytes([8, 2])  # width, height, bits, colour type
    if not (data.startswith(PNG_START + kind) and data.endswith(PNG_END)):
        return False
    start = len(PNG_START) - 8  # of a chunk: length, type, content, checksum
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return False
        start = end
    return start == len(data)


def comparison(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> np.ndarray:
    """Draws a grid of images in which each reconstruction stands under its original.

    Args:
        originals: uint8[b, h, w, 3].
        reconstructions: uint8[b, h, w, 3].
        columns: number of pairs side by side.

    Returns:
        uint8[H, W, 3]; tiles narrower than 96 pixels are enlarged by a whole factor.

    Raises:
        ValueError: originals and reconstructions differ in shape or are not uint8.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"{originals.shape} originals, {reconstructions.shape} reconstructions")
    if originals.dtype != np.uint8 or reconstructions.dtype != np.uint8:
        raise ValueError(f"pixels are {originals.dtype}, {reconstructions.dtype}, expected uint8")
    top, bottom = _enlarge(originals), _enlarge(reconstructions)
    seam = np.full((*top.shape[:1], SEAM, *top.shape[2:]), 255, np.uint8)
    return grid(np.concatenate([top, seam, bottom], axis=1), columns)


def grid(tiles: np.ndarray, columns: int = 8) -> np.ndarray:
    """Lays out images as tiles of one picture, row by row on white, with gaps.

    Args:
        tiles: uint8[b, h, w, 3], any b.
        columns: number of tiles side by side; fewer when b is smaller.

    Returns:
        uint8[H, W, 3]; tiles narrower than 96 pixels are enlarged by a whole factor.
    """
    tiles = _enlarge(tiles)
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    size = rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3
    picture = np.full(size, 255, np.uint8)
    for index, tile in enumerate(tiles):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        picture[top : top + height, left : left + width] = tile
    return picture


def _enlarge(tiles: np.ndarray) -> np.ndarray:
    factor = max(1, -(-SMALLEST // tiles.shape[2]))
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def codebook_usage(counts: np.ndarray, width: int = 720, height: int = 220) -> np.ndarray:
    """Draws how often each codebook row was chosen, most used first, on a log scale.

    Rows that were never chosen are a red bar on the axis.

    Args:
        counts: int[k], number of times that each row was chosen.
        width: width of the picture in pixels.
        height: height of the picture in pixels.

    Returns:
        uint8[height, width, 3].
    """
    counts = np.sort(np.asarray(counts))[::-1]
    used, top = int((counts > 0).sum()), max(int(counts.max()), 1)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    left, right, upper, lower = 56, width - 16, 34, height - 30
    levels = _column_means(counts, right - left)
    heights = np.log1p(levels) / np.log1p(top) * (lower - upper)
    for x, tall in enumerate(heights):
        if levels[x] > 0:
            draw.line([(left + x, lower - max(tall, 1)), (left + x, lower)], BAR)
    edge = left + round(used / counts.size * (right - left))
    if used < counts.size:
        draw.rectangle([edge, lower - 3, right, lower], DEAD)
    _label(draw, counts, used, (left, right, upper, lower))
    return np.asarray(image)


def _column_means(counts: np.ndarray, columns: int) -> np.ndarray:
    """Returns the mean count of codebook rows under each column of pixels.

    A row may span columns or share one.
    """
    edges = np.linspace(0, counts.size, columns + 1)
    totals = np.interp(edges, np.arange(counts.size + 1), np.concatenate([[0], counts.cumsum()]))
    return np.diff(totals) / np.diff(edges)


def _label(draw: ImageDraw.ImageDraw, counts: np.ndarray, used: int, box: tuple) -> None:
    left, right, upper, lower = box
    p = counts[counts > 0] / max(counts.sum(), 1)
    perplexity = np.exp(-(p * np.log(p)).sum()) if used else 0.0
    title = f"{used:,} of {counts.size:,} codes in use, {counts.size - used:,} dead"
    draw.text((left, 10), f"{title}; perplexity {perplexity:,.1f}", INK)
    draw.line([(left, upper), (left, lower), (right, lower)], INK)
    draw.text((left - 6, upper), f"{int(counts.max()):,}", INK, anchor="rt")
    draw.text((left - 6, lower), "0", INK, anchor="rb")
    draw.text((left, lower + 8), "codes, most used first (times chosen, log scale)", INK)
