"""Reads batches of images as numpy arrays through Grain.

Axes: b batch of this process, h height, w width.

The stream is an endless sequence of positions. The record at a position depends on the seed alone:
position p belongs to step p // global_batch, epoch p // len(source) is one permutation of the
records, and crop and flip are drawn from (seed, p). Workers, processes and the step at which a run
resumes decide only which process computes which positions. This module, and so every worker, uses
no jax.
"""

import functools
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from typing import NamedTuple

import grain
import ml_collections
import numpy as np
from absl import flags, logging

from gigatok_jax import errors
from gigatok_jax.data import transforms
from gigatok_jax.data.sources import DigitsSource, FolderSource
from gigatok_jax.errors import ConfigError, DataError

_FEW_RECORDS = 64  # up to here, decoding is faster than starting worker processes
_THREADS = 2  # of this process; Pillow releases the GIL while it decodes and resizes
_BATCHES_AHEAD = 2
_MOST_UNREADABLE = 100  # default limit of an evaluation
_PIPED_BYTES = 1 << 16  # arrays from this size on travel between processes in shared memory


Source = FolderSource | DigitsSource


class _Record(NamedTuple):
    image: np.ndarray  # uint8[h w 3]
    label: int
    index: int  # in the source; that of a later record if the requested one is unreadable
    small: bool  # the short side is under the crop size, so the image is enlarged
    unreadable: tuple[tuple[str, str], ...]  # (name, reason) of each record passed over
    mask: bool = True  # False for padding


class Report:
    """Record of the unreadable and enlarged images that this process has read; logs faults once.

    Attributes:
        unreadable: name -> reason of every damaged file, in the order of reading.
        enlarged: indices of the images that are smaller than the crop.
    """

    def __init__(self):
        self.unreadable: dict[str, str] = {}
        self.enlarged: set[int] = set()
        self._logged = False

    def add_unreadable(self, name: str, reason: str) -> None:
        """Notes an image file as damaged, and logs the name and reason the first time."""
        if name not in self.unreadable:
            self.unreadable[name] = reason
            logging.warning("unreadable image %d: %s (%s)", len(self.unreadable), name, reason)

    def log_enlarged(self, size: int) -> None:
        """Logs, once, how many images were enlarged to crops of `size` pixels."""
        if self.enlarged and not self._logged:
            logging.warning("%d images smaller than %d px were enlarged", len(self.enlarged), size)
            self._logged = True


class Batches:
    """Iterator of batches `{"image": uint8[b h w 3], "label": int32[b], "index": int64[b]}`.

    Closing the iterator, or leaving its `with` statement, ends the worker processes. `report` lists
    the faults of the images so far.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        image_size: int,
        source: Source,
        process_count: int,
        limit: int,
        report: Report,
    ):
        self.report = report
        self._iterator = iter(dataset)
        self._image_size = image_size
        self._source, self._limit = source, limit
        self._records_left = len(source) // process_count  # of this process in the first pass

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        for name, reason in batch.pop("unreadable"):
            self.report.add_unreadable(name, reason)
        if len(self.report.unreadable) > self._limit:
            self.close()
            raise _too_many(list(self.report.unreadable.items()), self._limit, self._source)
        self.report.enlarged.update(batch["index"][batch.pop("small")].tolist())
        self._records_left -= len(batch["index"])
        if self._records_left <= 0:
            self.report.log_enlarged(self._image_size)
        return batch

    def close(self) -> None:
        """Ends the worker processes; logs the number of enlarged images if it is not logged yet."""
        self.report.log_enlarged(self._image_size)
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def train_batches(
    data: ml_collections.ConfigDict,
    source: Source,
    image_size: int,
    global_batch: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Returns endless training batches from step `start_step` on, which costs nothing to reach.

    Process i of n gets rows i * b to (i + 1) * b of every global batch, b = global_batch / n, so
    that the processes' batches joined in order are the batch of a single process. An unreadable
    file is replaced by the next readable record of the source. With `data.workers` > 0, spawned
    processes read the images, and the main module needs a `__main__` guard; threads of this process
    read images whose pixels are in memory, and sources of up to 64 images.

    Args:
        data: `config.data`; reads crop ("random" | "center"), flip, workers and max_unreadable.
        source: images of `gigatok_jax.data.sources`.
        image_size: side of the crops in pixels.
        global_batch: images per step over all processes.
        seed: 0 or more.
        start_step: number of steps whose batches are passed over.
        process_index: index of this process, in [0, process_count).
        process_count: number of processes that share each global batch.

    Raises:
        ConfigError: the processes do not divide the batch, the crop is unknown or the seed is
            negative.
        DataError: while iterating: more than `data.max_unreadable` damaged files in this process.
    """
    check_division(global_batch, process_count)
    errors.one_of("data.crop", data.crop, ("random", "center"))
    load = functools.partial(_train_record, source, data.to_dict(), image_size, seed)
    positions = order(len(source), seed)
    local_batch = global_batch // process_count
    batches = positions.map_with_index(load).batch(local_batch, batch_fn=_stack)
    batches = batches[start_step * process_count + process_index :: process_count]
    workers = 0 if source.decoded or len(source) <= _FEW_RECORDS else data.workers
    dataset = _prefetched(batches, workers, local_batch * image_size**2 * 3)
    return Batches(dataset, image_size, source, process_count, data.max_unreadable, Report())


def eval_batches(
    source: Source,
    image_size: int,
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
    max_unreadable: int = _MOST_UNREADABLE,
    report: Report | None = None,
    *,
    views: Callable[[np.ndarray, int], np.ndarray] = transforms.center_crop,
    first: int = 0,
    workers: int = 0,
) -> Batches:
    """Returns the centre crops of every record once, in order, in batches of one shape.

    The batches have a `mask`, bool[b]: False for padding of the last batch and for unreadable
    files, whose images are black. All processes get the same number of batches.

    Args:
        source: images of `gigatok_jax.data.sources`.
        image_size: side of the crops in pixels.
        batch: images per batch over all processes.
        process_index: index of this process, in [0, process_count).
        process_count: number of processes that share each batch.
        max_unreadable: number of damaged files that this process tolerates.
        report: report of an earlier evaluation, so that nothing is logged twice.
        views: function that cuts crops uint8[...], of one shape for all images, from an image and
            `image_size`.
        first: index of the first record.
        workers: number of spawned processes that read more than 64 images of a folder; 0 reads
            them in threads.

    Raises:
        ConfigError: the processes do not divide `batch`.
        DataError: while iterating: too many damaged files, or no readable file.
    """
    check_division(batch, process_count)
    load = functools.partial(_eval_record, source, image_size, views)
    count = -(-(len(source) - first) // batch) * batch
    records = grain.MapDataset.range(first, first + count).map(load)
    batches = records.batch(batch // process_count, batch_fn=_stack_masked)
    workers = 0 if source.decoded or count <= _FEW_RECORDS else workers
    shape = views(np.zeros((image_size, image_size, 3), np.uint8), image_size).shape
    shown = batch // process_count * math.prod(shape)
    dataset = _prefetched(batches[process_index::process_count], workers, shown)
    limit = min(max_unreadable, len(source) - 1)
    return Batches(dataset, image_size, source, process_count, limit, report or Report())


def order(records: int, seed: int) -> grain.MapDataset:
    """Returns the index of the record at each position of the endless stream of a seed.

    Each epoch is a permutation of the records.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected 0 or more")
    # Grain adds the epoch to its seed: without the hash, epoch 1 of seed 0 is epoch 0 of seed 1.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(records).shuffle(seed=hashed).repeat()


def check_division(global_batch: int, process_count: int) -> None:
    """Raises ConfigError if the processes cannot share a global batch equally."""
    if global_batch < 1 or global_batch % process_count:
        raise ConfigError(
            f"a global batch of {global_batch} images is not a multiple of the "
            f"{process_count} processes that share it: change train.global_batch"
        )


def _train_record(source, data: dict, size: int, seed: int, position: int, index: int) -> _Record:
    record = _readable(source, index, size, data["max_unreadable"])
    rng = np.random.default_rng((seed, position))
    if data["crop"] == "random":
        image = transforms.random_crop(record.image, size, rng)
    else:
        image = transforms.center_crop(record.image, size)
    if data["flip"] and rng.random() < 0.5:
        image = transforms.flip(image)
    return record._replace(image=image)


def _eval_record(source, size: int, views: Callable, index: int) -> _Record:
    unreadable = ()
    if index < len(source):
        try:
            record = _read(source, index, size)
            return record._replace(image=views(record.image, size))
        except DataError as error:
            unreadable = ((source.names[index], str(error)),)
    black = views(np.zeros((size, size, 3), np.uint8), size)
    return _Record(black, -1, -1, False, unreadable, mask=False)


def _readable(source, index: int, size: int, limit: int) -> _Record:
    """Reads the first readable record from `index` on; the first record follows the last.

    Raises DataError if more than `limit` records, or all, are unreadable.
    """
    unreadable = []
    for turned in range(index, index + min(len(source), limit + 1)):
        try:
            record = _read(source, turned % len(source), size)
            return record._replace(unreadable=tuple(unreadable))
        except DataError as error:
            unreadable.append((source.names[turned % len(source)], str(error)))
    if len(unreadable) <= limit:
        name, reason = unreadable[0]
        raise DataError(f"none of the {len(source)} images can be read, first {name} ({reason})")
    raise _too_many(unreadable, limit, source)


def _read(source, index: int, size: int) -> _Record:
    record = source[index]
    image = record["image"] if source.decoded else transforms.decode(record["image"])
    return _Record(image, record["label"], index, min(image.shape[:2]) < size, ())


def _too_many(unreadable: list[tuple[str, str]], limit: int, source: Source) -> DataError:
    if len(unreadable) >= len(source):
        name, reason = unreadable[0]
        return DataError(f"none of the {len(source)} images can be read, first {name} ({reason})")
    first = ", ".join(f"{name} ({reason})" for name, reason in unreadable[:3])
    return DataError(
        f"{len(unreadable)} unreadable images where {limit} are allowed, first {first}: repair or"
        " remove them, or raise data.max_unreadable"
    )


def _stack(records: list[_Record]) -> dict:
    return {
        "image": np.stack([record.image for record in records]),  # [b h w 3]
        "label": np.array([record.label for record in records], np.int32),
        "index": np.array([record.index for record in records], np.int64),
        "small": np.array([record.small for record in records]),
        "unreadable": tuple(fault for record in records for fault in record.unreadable),
    }


def _stack_masked(records: list[_Record]) -> dict:
    return _stack(records) | {"mask": np.array([record.mask for record in records])}


def _prefetched(batches: grain.MapDataset, workers: int, batch_bytes: int) -> grain.IterDataset:
    if not workers:
        return batches.to_iter_dataset(grain.ReadOptions(_THREADS, _BATCHES_AHEAD))
    # A worker computes one batch at a time, since it stops only when its batch is finished.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which other programs do not parse
    # Each worker has a batch in its queue, a batch that waits, and a batch that the trainer reads.
    smallest = _PIPED_BYTES if _shared_memory(3 * workers * batch_bytes) else 2**62
    options = grain.experimental.DatasetOptions(min_shm_size=smallest)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return dataset.mp_prefetch(options, worker_init_fn=_start_worker)


def _shared_memory(needed: int) -> bool:
    # A container's /dev/shm often has 64 MB; a process that exceeds it dies of a bus error.
    if not os.path.isdir("/dev/shm"):
        return True
    free = shutil.disk_usage("/dev/shm").free
    if free < needed:
        logging.info("/dev/shm has %d MB free: batches travel in pipes, slower", free >> 20)
    return free >= needed


def _start_worker(index: int, count: int) -> None:
    del index, count
    # Ctrl-C and a cluster's SIGTERM reach every process; only the trainer handles them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # A trainer that is killed cannot stop its workers, which would wait for ever.
    multiprocessing.parent_process().join()
    os._exit(1)
