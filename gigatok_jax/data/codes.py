"""Reads the codes of a set of images, from the files of `codes_file`, in batches to learn from.

Axes: b batch, a augmentations, n codes of an image.
"""

import copy
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np
from etils import epath

from gigatok_jax.data import codes_file, pipeline, sources, transforms
from gigatok_jax.data.codes_file import Header, Part
from gigatok_jax.errors import DataError

READERS = 8  # threads that compute checksums
COUNTED = 4096  # records whose codes are counted at once


def crops_of(image: np.ndarray, size: int, crops: str) -> np.ndarray:
    """Cuts the crops of an image whose codes `extract_codes` keeps.

    Args:
        image: uint8[h w 3].
        size: side of a crop in pixels.
        crops: "center", "flip" (centre and mirrored), "ten_crop" of a centre crop 1.1 times as
            large, or "ten_crop_both" (and of a centre crop 1.05 times as large; the original mixes
            the two half and half).

    Returns:
        uint8[a size size 3].
    """
    if crops in codes_file.RATIOS:
        return np.concatenate(
            [transforms.ten_crop(image, size, r) for r in codes_file.RATIOS[crops]]
        )
    middle = transforms.center_crop(image, size)
    return np.stack([middle, transforms.flip(middle)][: codes_file.AUGMENTATIONS[crops]])


class CodesSource:
    """Source of the codes in a finished folder: a sized set of the images that could be read.

    Attributes:
        header: record of the tokenizer, crops and images that the codes come from.
        labels: i32[length], -1 for an image without a class.
        class_names: name of each label.
    """

    def __init__(self, folder: epath.PathLike):
        """Opens a folder of codes, and reads every code once to check it.

        Args:
            folder: local folder that `extract_codes` has finished.

        Raises:
            DataError: the folder holds no codes, lacks records, has damaged files or codes outside
                the vocabulary, or none of its images could be read.
        """
        self.folder = epath.Path(folder)
        self.header = codes_file.read_header(self.folder)
        parts = list(codes_file.read_parts(self.folder))
        _check_complete(self.folder, self.header, parts)
        self._codes = _map(self.folder / codes_file.CODES, self.header.shape, self.header.dtype)
        labels = _map(self.folder / codes_file.LABELS, (self.header.records,), np.dtype(np.int32))
        if codes_file.crc32(labels) != self.header.labels_crc32:
            raise DataError(f"{self.folder / codes_file.LABELS} is damaged, extract the codes anew")
        unreadable = _check_parts(self.folder, self.header, self._codes, parts)
        self._records = np.setdiff1d(np.arange(self.header.records), unreadable)
        if not len(self._records):
            raise DataError(f"{self.folder} holds no code: none of its images could be read")
        self.labels = np.asarray(labels)[self._records]
        self.class_names = tuple(self.header.class_names)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def fingerprint(self) -> str:
        """Hash, 16 hex digits, of images, crops and chosen records, to notice a changed set."""
        digest = hashlib.sha256(f"{self.header.data}\n{self.header.crops}\n".encode())
        digest.update(self._records)
        return digest.hexdigest()[:16]

    @property
    def augmentations(self) -> int:
        """Number of crops of each image."""
        return self._codes.shape[1]

    @property
    def middle(self) -> int:
        """Index of the crop that shows the middle of the image upright."""
        return 4 if self.header.crops in codes_file.RATIOS else 0

    def codes(self, indices: np.ndarray, augmentations: np.ndarray | int) -> np.ndarray:
        """Returns the codes, int16 or int32 [b n], of images i64[b], each of one crop.

        `augmentations` is the index of each image's crop, i64[b], or one index for all images.
        """
        return self._codes[self._records[indices], augmentations]

    def counts(self) -> np.ndarray:
        """Counts how often each code was chosen, i64[vocab], over all images and crops."""
        total = np.zeros(self.header.vocab, np.int64)
        for records in np.array_split(self._records, -(-len(self._records) // COUNTED)):
            total += np.bincount(self._codes[records].reshape(-1), minlength=len(total))
        return total

    def take(self, indices: np.ndarray) -> "CodesSource":
        """Returns a source of the codes of some images, in the order of `indices` i64[b]."""
        subset = copy.copy(self)
        subset._records, subset.labels = self._records[indices], self.labels[indices]
        return subset


def open_codes(
    folder: epath.PathLike, eval_folder: epath.PathLike, eval_images: int = 0
) -> tuple[CodesSource, CodesSource]:
    """Opens the codes to train on, and held-out codes; returns a source of each.

    Args:
        folder: codes of the training images.
        eval_folder: codes of held-out images; "" holds out a share of the training images.
        eval_images: number of images in that share; 0 is a twentieth, at most 5000.

    Raises:
        DataError: a folder holds no complete and undamaged codes, the held-out codes are of another
            tokenizer, or no image is left to train on.
    """
    source = CodesSource(folder)
    if eval_folder:
        held_out = CodesSource(eval_folder)
        if held_out.header.tokenizer != source.header.tokenizer:
            raise DataError(
                f"{eval_folder} holds codes of tokenizer {held_out.header.tokenizer}, {folder} of"
                f" {source.header.tokenizer}: extract both with the same checkpoint"
            )
        return source, held_out
    count = sources.held_out_count(eval_images, len(source), folder, "eval_codes")
    order = np.argsort(_hashes(0, np.arange(len(source))), kind="stable")
    return source.take(np.sort(order[count:])), source.take(np.sort(order[:count]))


def train_batches(
    source: CodesSource,
    global_batch: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns endless training batches of codes from step `start_step` on, at no cost to get there.

    The order is that of `pipeline.train_batches` over as many images, and the crop of an image is
    drawn from (seed, position), so processes and resuming change nothing.

    Yields:
        {"codes": int16 or int32 [b n], "label": i32[b], "index": i64[b]}, b = global_batch /
        process_count.

    Raises:
        ConfigError: the processes do not divide the batch, or the seed is negative.
    """
    pipeline.check_division(global_batch, process_count)
    order, size = pipeline.order(len(source), seed), global_batch // process_count

    def batch(step: int) -> dict[str, np.ndarray]:
        first = step * global_batch + process_index * size
        positions = np.arange(first, first + size)
        indices = np.fromiter((order[p] for p in positions), np.int64, size)
        crops = _hashes(seed, positions) % source.augmentations
        return _batch(source, indices, crops.astype(np.int64))

    return (batch(step) for step in itertools.count(start_step))


def eval_batches(
    source: CodesSource, batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the codes of the middle crop of every image once, in order, in batches of one shape.

    Yields:
        {"codes": int16 or int32 [b n], "label": i32[b], "index": i64[b], "mask": bool[b]},
        b = batch / process_count; the mask is False where the last batch is padded.
    """
    pipeline.check_division(batch, process_count)
    size = batch // process_count
    for first in range(0, len(source), batch):
        indices = first + process_index * size + np.arange(size)
        mask = indices < len(source)
        yield _batch(source, np.where(mask, indices, 0), source.middle) | {"mask": mask}


def _batch(
    source: CodesSource, indices: np.ndarray, augmentations: np.ndarray | int
) -> dict[str, np.ndarray]:
    codes = source.codes(indices, augmentations)
    return {"codes": codes, "label": source.labels[indices], "index": indices}


def _hashes(seed: int, values: np.ndarray) -> np.ndarray:
    """Computes hashes u64[b] of (seed, value) by splitmix64 (doi:10.1145/2660193.2660195)."""
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = start + values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check_complete(folder: epath.Path, header: Header, parts: Sequence[Part]) -> None:
    records = sum(part.records for part in parts)
    if not header.complete or records != header.records:
        raise DataError(
            f"{folder} holds {records} of {header.records} records: run extract_codes there again"
        )


def _check_parts(
    folder: epath.Path, header: Header, codes: np.ndarray, parts: Sequence[Part]
) -> list[int]:
    """Raises DataError if codes are damaged or outside the vocabulary.

    Returns the indices of the records that could not be read.
    """
    ends = np.cumsum([part.records for part in parts])

    def check(part: Part, end: int) -> None:
        first, rows = end - part.records, np.asarray(codes[end - part.records : end])
        where = f"{folder / codes_file.CODES}, records {first} to {end - 1}"
        if codes_file.crc32(rows) != part.crc32:
            raise DataError(f"{where}: damaged, run extract_codes there again")
        readable = np.delete(rows, [i - first for i in part.unreadable], axis=0)
        if readable.size and not 0 <= readable.min() <= readable.max() < header.vocab:
            low, high = readable.min(), readable.max()
            raise DataError(f"{where}: codes go from {low} to {high}, vocabulary {header.vocab}")

    with futures.ThreadPoolExecutor(READERS) as pool:
        list(pool.map(check, parts, ends))
    return [i for part in parts for i in part.unreadable]


def _map(path: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Opens a .npy file as a memory map.

    Raises DataError if the file cannot be read, or its shape or type is not that of the header.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if (array.shape, array.dtype) != (shape, dtype):
        raise DataError(
            f"{path} is {array.dtype}{list(array.shape)}, {codes_file.HEADER} says"
            f" {dtype}{list(shape)}"
        )
    return array
