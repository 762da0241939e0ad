"""Reads images from their sources: a folder, or scikit-learn's digits.

A source is a sized sequence of records `{"image": byte string of a PNG, JPEG or WebP file, or
uint8[h w 3], "label": int, "name": str}`. A source has `names`, `labels` i32[n] and `class_names`,
and says with `decoded` whether the images of its records are pixels already.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from concurrent import futures

import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from gigatok_jax import errors
from gigatok_jax.data import transforms
from gigatok_jax.errors import ConfigError, DataError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
NO_CLASS = -1  # label of an image that lies in no sub-folder

_HELD_OUT_SHARE = 20  # one image in so many is held out
_MOST_HELD_OUT = 5000  # but no more than this
_HEADER_THREADS = 16


class FolderSource:
    """Source of the image files of a folder, sorted by relative path.

    The class of an image is the first sub-folder on its path, numbered from 0 in sorted order of
    the sub-folders that contain images, however deep; an image that lies in the folder itself has
    label -1. Links are followed; hidden files and folders and `__MACOSX` are passed over.
    """

    decoded = False

    def __init__(self, folder: epath.PathLike, names: Sequence[str] | None = None):
        """Lists the images of a folder, without reading the files.

        Args:
            folder: a local or remote path.
            names: relative paths of the images; None takes all images that the folder holds.

        Raises:
            DataError: the folder does not exist or holds no image.
        """
        self.folder = epath.Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"data folder {folder} does not exist or is not a folder")
        self.names = sorted(_walk(self.folder, "") if names is None else names)
        if not self.names:
            endings = ", ".join(EXTENSIONS[:-1]) + " or " + EXTENSIONS[-1]
            raise DataError(f"no images in {folder}: expected files ending in {endings}")
        heads = [name.split("/")[0] if "/" in name else None for name in self.names]
        self.class_names = tuple(sorted({head for head in heads if head is not None}))
        number = {head: i for i, head in enumerate(self.class_names)}
        self.labels = np.array([number.get(head, NO_CLASS) for head in heads], np.int32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Reads the byte string of an image file as a record; raises DataError if that fails."""
        name = self.names[index]
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(str(error)) from error
        return {"image": data, "label": int(self.labels[index]), "name": name}

    def take(self, indices: Sequence[int]) -> "FolderSource":
        """Returns a source of some of the images, in the order of `indices`; class numbers stay."""
        subset = copy.copy(self)
        subset.names, subset.labels = [self.names[i] for i in indices], self.labels[list(indices)]
        return subset


def _walk(folder: epath.Path, prefix: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.name.lower().endswith(EXTENSIONS):
            yield prefix + path.name  # without asking the disk what it is: there may be millions
        elif path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")


class DigitsSource:
    """Source of the 1797 handwritten digits of scikit-learn, enlarged from 8x8 pixels.

    Every tenth image of each class is held out. Greyscale 0..16 becomes RGB 0..255.
    """

    decoded = True
    class_names = tuple("0123456789")

    def __init__(self, split: str, size: int):
        """Enlarges the digits of a split.

        Args:
            split: "train" or "held_out".
            size: side of the images in pixels.
        """
        from sklearn.datasets import load_digits  # a second to import, and needed here alone

        digits = load_digits()
        rank = np.array([(digits.target[:i] == t).sum() for i, t in enumerate(digits.target)])
        records = np.flatnonzero((rank % 10 == 9) == (split == "held_out"))
        self.labels = digits.target[records].astype(np.int32)
        self.names = [f"{self.labels[i]}/{record:04d}" for i, record in enumerate(records)]
        small = np.round(digits.images[records] * (255 / 16)).astype(np.uint8)
        large = [Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in small]
        self._grey = np.stack([np.asarray(image) for image in large])  # [n size size]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """Returns the record of a digit, whose image is uint8[size size 3]."""
        image = np.repeat(self._grey[index, ..., None], 3, axis=-1)
        return {"image": image, "label": int(self.labels[index]), "name": self.names[index]}

    def take(self, indices: Sequence[int]) -> "DigitsSource":
        """Returns a source of some of the digits, in the order of `indices`."""
        subset = copy.copy(self)
        subset.names, subset.labels = [self.names[i] for i in indices], self.labels[list(indices)]
        subset._grey = self._grey[list(indices)]
        return subset


def make_source(
    data: ml_collections.ConfigDict, split: str, image_size: int
) -> FolderSource | DigitsSource:
    """Makes the source of the images that a run trains on or is evaluated on.

    A folder's held-out images come from `data.eval_folder`, or else are `held_out_count` images of
    the folder. A hash of the file's name chooses these images, so that most stay the same when
    files come or go. A folder of one image is trained and evaluated on that image.
    `data.eval_images` also limits the images of an `eval_folder` and the held-out digits. Setting
    `data.folder` replaces the digits.

    Args:
        data: `config.data`; reads source, folder, eval_folder, eval_images and min_size.
        split: "train" or "held_out".
        image_size: side in pixels of the enlarged digits; folders keep their sizes.

    Returns:
        The source of one split. The splits of the digits, or of a folder of several images, share
        no image.

    Raises:
        ConfigError: the source or split is unknown, or no folder is named.
        DataError: the folder has no image, all would be held out, or an image is smaller than
            `data.min_size`.
    """
    errors.one_of("split", split, ("train", "held_out"))
    errors.one_of("data.source", data.source, ("folder", "digits"))
    if data.source == "digits" and not data.folder:
        source = DigitsSource(split, image_size)
        if split == "train" or not 0 < data.eval_images < len(source):
            return source
        return source.take(range(data.eval_images))
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
    order = _by_hash(source.names)
    count = held_out_count(data.eval_images, len(source), data.folder, "data.eval_folder")
    return source.take(np.sort(order[:count] if split == "held_out" else order[count:]))


def held_out_count(eval_images: int, total: int, folder: epath.PathLike, instead: str) -> int:
    """Returns the number of images that are held out of a set: `eval_images`, if that is not 0.

    If 0, a twentieth of the set is held out, at least 1 and at most 5000 images.

    Args:
        eval_images: `data.eval_images` of the config.
        total: number of images of the set.
        folder: folder of the set, for the error.
        instead: config key that names a folder of held-out images.

    Raises:
        DataError: no image is left to train on.
    """
    count = eval_images or min(max(total // _HELD_OUT_SHARE, 1), _MOST_HELD_OUT)
    if count >= total:
        raise DataError(
            f"data.eval_images={count} leaves none of the {total} images in {folder} to train on:"
            f" lower it or name {instead}"
        )
    return count


def _by_hash(names: Sequence[str]) -> np.ndarray:
    digests = [hashlib.blake2b(_bytes(name), digest_size=8).digest() for name in names]
    return np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable")


def _bytes(names: str) -> bytes:
    """Returns the bytes of file names on disk, which need not be valid UTF-8."""
    return names.encode(errors="surrogateescape")


def refuse_small(source: FolderSource, min_size: int) -> None:
    """Reads the header of every image; raises DataError if a short side is under `min_size` px.

    Files whose header cannot be read are passed over.
    """
    with futures.ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for name, size in zip(
            source.names,
            pool.map(_header, [source.folder / name for name in source.names]),
            strict=True,
        ):
            if size is not None and min(size) < min_size:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(
                    f"{name} is {size[0]}x{size[1]} pixels, data.min_size asks for {min_size}: "
                    "remove it or lower data.min_size"
                )


def _header(path: epath.Path) -> tuple[int, int] | None:
    try:
        return transforms.size_of(path)
    except DataError:
        return None  # damaged files are counted when they are read


def fingerprint(source: FolderSource | DigitsSource) -> str:
    """Returns 16 hex digits that change with number, names and order of a source's images.

    Checkpoints keep the digits, to notice another set of images. The digits do not depend on the
    pixels, nor on where the folder lies.
    """
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    digest.update(_bytes("\n".join(source.names)))
    return digest.hexdigest()[:16]


def images_at(path: epath.PathLike) -> FolderSource:
    """Returns a source of a single image file, or of every image of a folder.

    Raises:
        DataError: the path does not exist, or the folder holds no image.
    """
    path = epath.Path(path)
    if not path.exists():
        raise DataError(f"input {path} does not exist: expected an image file or a folder")
    return FolderSource(path) if path.is_dir() else FolderSource(path.parent, [path.name])
