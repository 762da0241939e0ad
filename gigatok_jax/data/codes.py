"""Codes of a set of images: batches to learn from, out of the files of `codes_file`.

Axes: b batch, a augmentations, n codes of an image.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np
from etils import epath

from gigatok_jax.data import codes_file, pipeline, transforms
from gigatok_jax.data.codes_file import Header, Part
from gigatok_jax.errors import DataError

READERS = 8  # threads that compute checksums
COUNTED = 4096  # records whose codes are counted at once


def crops_of(image: np.ndarray, size: int, crops: str) -> np.ndarray:
    """The crops of one image whose codes are kept.

    Args:
        image: uint8[h w 3].
        size: of a crop, pixels a side.
        crops: "center", "flip" (and its mirror image), "ten_crop" of a centre crop 1.1 times as
            large, or "ten_crop_both" (and 1.05 times; the original mixes the two half and half).

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
    """Codes of a finished folder; a sized sequence of the images that could be read.

    Attributes:
        header: what they are of.
        labels: i32[length], -1 for an image without a class.
        class_names: of the labels.
        fingerprint: 16 hex digits of what it holds, to notice a changed set.
    """

    def __init__(self, folder: epath.PathLike):
        """Reads every code once, to check it.

        Raises:
            DataError: not a folder of codes, records missing, a damaged file, or a code outside
                the vocabulary.
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
        digest = hashlib.sha256(f"{self.header.data}\n{self.header.crops}\n".encode())
        digest.update(self._records)
        return digest.hexdigest()[:16]

    @property
    def augmentations(self) -> int:
        """Codes kept of each image."""
        return self._codes.shape[1]

    @property
    def middle(self) -> int:
        """The augmentation that shows the middle of the image upright."""
        return 4 if self.header.crops in codes_file.RATIOS else 0

    def codes(self, indices: np.ndarray, augmentations: np.ndarray | int) -> np.ndarray:
        """int16 or int32 [b n]: codes of images i64[b], each under its augmentation i64[b]."""
        return self._codes[self._records[indices], augmentations]

    def counts(self) -> np.ndarray:
        """i64[vocab]: how often each code was chosen, over all images and augmentations."""
        total = np.zeros(self.header.vocab, np.int64)
        for part in np.array_split(self._records, -(-len(self._records) // COUNTED)):
            total += np.bincount(self._codes[part].reshape(-1), minlength=len(total))
        return total

    def take(self, indices: np.ndarray) -> "CodesSource":
        """The same folder with these of its images only, in this order."""
        part = object.__new__(CodesSource)
        part.__dict__ |= self.__dict__
        part._records, part.labels = self._records[indices], self.labels[indices]
        return part


def open_codes(folder, eval_folder, eval_images: int = 0) -> tuple[CodesSource, CodesSource]:
    """Codes to train on, and held-out ones.

    Args:
        folder: of the codes.
        eval_folder: of the held-out codes; "" takes a share out of the others.
        eval_images: size of that share; 0 is one in twenty, at most 5000.

    Raises:
        DataError: whatever `CodesSource` refuses, held-out codes of another tokenizer, or nothing
            left to train on.
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
    count = eval_images or min(max(len(source) // 20, 1), 5000)
    if count >= len(source):
        raise DataError(
            f"data.eval_images={count} leaves none of the {len(source)} images in {folder} to train"
            " on: lower it or give eval_codes"
        )
    chosen = np.argsort(_mixed(0, np.arange(len(source))), kind="stable")
    return source.take(np.sort(chosen[count:])), source.take(np.sort(chosen[:count]))


def train_batches(
    source: CodesSource,
    global_batch: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches from step `start_step` on; the place costs nothing to reach.

    The order is that of `pipeline.train_batches` over as many images, and the augmentation is drawn
    from (seed, position), so processes and resuming change nothing.

    Yields:
        {"codes": int16 or int32 [b n], "label": i32[b], "index": i64[b]}, b = global_batch /
        process_count.

    Raises:
        ConfigError: a batch that the processes do not divide, or a negative seed.
    """
    pipeline.check_division(global_batch, process_count)
    order, size = pipeline.order(len(source), seed), global_batch // process_count

    def batch(step: int) -> dict[str, np.ndarray]:
        first = step * global_batch + process_index * size
        positions = np.arange(first, first + size)
        indices = np.fromiter((order[p] for p in positions), np.int64, size)
        drawn = _mixed(seed, positions) % source.augmentations
        return _batch(source, indices, drawn.astype(np.int64))

    return (batch(step) for step in itertools.count(start_step))


def eval_batches(
    source: CodesSource, batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Codes of every image once, of its middle crop, in order and in batches of one shape.

    Yields:
        As `train_batches`, and "mask" bool[b], False where the last batch is padded.
    """
    pipeline.check_division(batch, process_count)
    size = batch // process_count
    for first in range(0, len(source), batch):
        places = first + process_index * size + np.arange(size)
        mask = places < len(source)
        yield _batch(source, np.where(mask, places, 0), source.middle) | {"mask": mask}


def _batch(source: CodesSource, indices: np.ndarray, augmentations) -> dict[str, np.ndarray]:
    codes = source.codes(indices, augmentations)
    return {"codes": codes, "label": source.labels[indices], "index": indices}


def _mixed(seed: int, values: np.ndarray) -> np.ndarray:
    """u64[b], hashes of (seed, value): splitmix64 (doi:10.1145/2660193.2660195), vectorised."""
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = start + values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check_complete(folder: epath.Path, header: Header, parts: Sequence[Part]) -> None:
    found = sum(part.records for part in parts)
    if header.complete and found == header.records:
        return
    raise DataError(
        f"{folder} holds {found} of {header.records} records: run extract_codes there again"
    )


def _check_parts(folder, header: Header, codes: np.ndarray, parts: Sequence[Part]) -> list[int]:
    """Refuses codes that are damaged or outside the vocabulary; gives the unreadable records."""
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
    """Memory map of a whole .npy file; DataError when it is not what the header says."""
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
