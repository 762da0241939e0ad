"""Where images come from: a folder, or scikit-learn's digits.

A source is a sized sequence of records `{"image": encoded bytes or uint8[h w 3], "label": int,
"name": str}`. It has `names`, `labels` i32[n] and `class_names`, and says with `decoded` whether
its records are pixels already.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from gigatok_jax.data import transforms
from gigatok_jax.errors import ConfigError, DataError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
NO_CLASS = -1  # label of an image that lies in no sub-folder

_HELD_OUT_SHARE = 20  # one in so many images is held out, at most
_MOST_HELD_OUT = 5000
_HEADER_THREADS = 16


class FolderSource:
    """Encoded images of a folder, sorted by relative path.

    The class of an image is the first sub-folder on its path, numbered from 0 in sorted order of
    those that contain images, however deep; an image that lies in the folder itself has label -1.
    Links are followed; hidden files and folders and `__MACOSX` are passed over.
    """

    decoded = False

    def __init__(self, folder):
        """Lists `folder`, a local or remote path.

        Raises:
            DataError: it does not exist or holds no image.
        """
        self.folder = epath.Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"data folder {folder} does not exist or is not a folder")
        self.names = sorted(_walk(self.folder, ""))
        if not self.names:
            raise DataError(f"no images in {folder}: expected files ending in {_listed()}")
        heads = [name.split("/")[0] if "/" in name else None for name in self.names]
        self.class_names = tuple(sorted({head for head in heads if head is not None}))
        number = {head: i for i, head in enumerate(self.class_names)}
        self.labels = np.array([number.get(head, NO_CLASS) for head in heads], np.int32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Record with the encoded bytes of one file; DataError when it cannot be read."""
        name = self.names[index]
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(str(error)) from error
        return {"image": data, "label": int(self.labels[index]), "name": name}

    def take(self, indices: Sequence[int]) -> "FolderSource":
        """The same folder and classes with these of its images only, in this order."""
        part = copy.copy(self)
        part.names, part.labels = [self.names[i] for i in indices], self.labels[list(indices)]
        return part


def _listed() -> str:
    return ", ".join(EXTENSIONS[:-1]) + " or " + EXTENSIONS[-1]


def _walk(folder: epath.Path, prefix: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.name.lower().endswith(EXTENSIONS):
            yield prefix + path.name  # without asking the disk what it is: there may be millions
        elif path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")


class DigitsSource:
    """The 1797 handwritten digits of scikit-learn, enlarged from 8x8 pixels.

    Every tenth image of each class is held out. Greyscale 0..16 becomes RGB 0..255.
    """

    decoded = True
    class_names = tuple("0123456789")

    def __init__(self, split: str, size: int):
        """`split` is "train" or "held_out"; `size` is the side in pixels, reached bicubically."""
        from sklearn.datasets import load_digits  # a second to import, and needed here alone

        digits = load_digits()
        rank = np.array([(digits.target[:i] == t).sum() for i, t in enumerate(digits.target)])
        chosen = np.flatnonzero((rank % 10 == 9) == (split == "held_out"))
        self.labels = digits.target[chosen].astype(np.int32)
        self.names = [f"{self.labels[i]}/{record:04d}" for i, record in enumerate(chosen)]
        small = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._grey = np.stack([_enlarged(one, size) for one in small])  # [n size size]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Record with uint8[size size 3]."""
        image = np.repeat(self._grey[index, ..., None], 3, axis=-1)
        return {"image": image, "label": int(self.labels[index]), "name": self.names[index]}

    def take(self, indices: Sequence[int]) -> "DigitsSource":
        """These of its images only, in this order."""
        part = copy.copy(self)
        part.names, part.labels = [self.names[i] for i in indices], self.labels[list(indices)]
        part._grey = self._grey[list(indices)]
        return part


def _enlarged(grey: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))


def make_source(data, split: str, image_size: int):
    """The images that a run trains on or is evaluated on.

    A folder's held-out images come from `data.eval_folder`, or else are a share of the folder,
    chosen by a hash of the file's name so that it stays the same when files come or go:
    `data.eval_images` of them, or with 0 one in twenty, at least 1 and at most 5000. A folder of
    one image is trained and evaluated on that image. `eval_images` also shortens an `eval_folder`
    and the held-out digits. The embedded digits stand in for a folder: naming one replaces them.

    Args:
        data: `config.data`; reads source, folder, eval_folder, eval_images and min_size.
        split: "train" or "held_out".
        image_size: side in pixels of the enlarged digits; folders keep their sizes.

    Returns:
        A FolderSource or DigitsSource; the two splits never share an image.

    Raises:
        ConfigError: unknown `source`, or no `folder`.
        DataError: nothing to read, too many images held out, or one smaller than `min_size`.
    """
    if split not in ("train", "held_out"):
        raise ConfigError(f"split is {split!r}, expected 'train' or 'held_out'")
    if data.source == "digits" and not data.folder:
        source = DigitsSource(split, image_size)
        if split == "train" or not 0 < data.eval_images < len(source):
            return source
        return source.take(range(data.eval_images))
    if data.source not in ("folder", "digits"):
        raise ConfigError(f"data.source is {data.source!r}, expected 'folder' or 'digits'")
    if not data.folder:
        raise ConfigError("data.folder is empty: name the images with --config.data.folder=DIR")
    source = _folder_split(data, split)
    if data.min_size > 0:
        refuse_small(source, data.min_size)
    return source


def _folder_split(data, split: str) -> FolderSource:
    if data.eval_folder:
        source = FolderSource(data.eval_folder if split == "held_out" else data.folder)
        if split == "train" or not 0 < data.eval_images < len(source):
            return source
        return source.take(np.sort(_by_hash(source.names)[: data.eval_images]))
    source = FolderSource(data.folder)
    if len(source) == 1:
        return source
    order, count = _by_hash(source.names), _held_out_count(data, len(source))
    return source.take(np.sort(order[:count] if split == "held_out" else order[count:]))


def _held_out_count(data, total: int) -> int:
    if data.eval_images >= total:
        raise DataError(
            f"data.eval_images={data.eval_images} leaves none of the {total} images in "
            f"{data.folder} to train on: lower it or give data.eval_folder"
        )
    return data.eval_images or min(max(total // _HELD_OUT_SHARE, 1), _MOST_HELD_OUT)


def _by_hash(names: Sequence[str]) -> np.ndarray:
    digests = [hashlib.blake2b(_bytes(name), digest_size=8).digest() for name in names]
    return np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable")


def _bytes(names: str) -> bytes:
    """Of file names, those too that are no text: they are what the file system holds."""
    return names.encode(errors="surrogateescape")


def refuse_small(source: FolderSource, min_size: int) -> None:
    """Reads every header; DataError names the first image whose short side is under `min_size`."""
    with futures.ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for name, size in zip(source.names, pool.map(_header, _paths(source)), strict=True):
            if size is not None and min(size) < min_size:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(
                    f"{name} is {size[0]}x{size[1]} pixels, data.min_size asks for {min_size}: "
                    "remove it or lower data.min_size"
                )


def _paths(source: FolderSource) -> list[epath.Path]:
    return [source.folder / name for name in source.names]


def _header(path: epath.Path) -> tuple[int, int] | None:
    try:
        return transforms.size_of(path)
    except DataError:
        return None  # damaged files are counted when they are read


def fingerprint(source) -> str:
    """16 hex digits of the number, names and order of a source's images, to notice a changed set.

    Kept with checkpoints; it does not change when the folder moves, nor with the pixels.
    """
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    digest.update(_bytes("\n".join(source.names)))
    return digest.hexdigest()[:16]


def load_images(path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of one image file, or of every image of a folder, in sorted order.

    Files that cannot be read are named in the log and passed over.

    Yields:
        (name relative to the folder, uint8[h w 3] of the image's own size).

    Raises:
        DataError: the path does not exist, or nothing in it could be read.
    """
    path = epath.Path(path)
    if not path.exists():
        raise DataError(f"input {path} does not exist: expected an image file or a folder")
    files = _paths(FolderSource(path)) if path.is_dir() else [path]
    root, reasons = (path if path.is_dir() else path.parent), []
    for file in files:
        name = str(file.relative_to(root))
        try:
            image = transforms.decode(file)
        except DataError as error:
            logging.warning("skipped %s: %s", name, error)
            reasons.append(f"{name} ({error})")
            continue
        yield name, image
    if len(reasons) == len(files):
        raise DataError(f"no readable image in {path}: {reasons[0]}")
