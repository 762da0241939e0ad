"""Reads and writes the files of a folder of codes.

    codes.npy     int16 or int32 [records, augmentations, n], records in the order of the images
    labels.npy    int32[records]
    parts.jsonl   records, CRC-32 and unreadable records of each part of codes.npy, in order
    codes.json    tokenizer, crops and images, see `Header`; `complete` once all records are written

A part counts only when its line is whole and its checksum is right, so a writer that is killed at
any moment goes on behind its last whole part. The folder is on a local disk: codes are read through
a memory map. Axes: b batch, a augmentations, n codes of an image.
"""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import ConfigError, DataError

CODES, LABELS, PARTS, HEADER = "codes.npy", "labels.npy", "parts.jsonl", "codes.json"
AUGMENTATIONS = {"center": 1, "flip": 2, "ten_crop": 10, "ten_crop_both": 20}
# Side of the centre crop that ten crops are cut from, over the side of a crop.
RATIOS = {"ten_crop": (1.1,), "ten_crop_both": (1.1, 1.05)}
UNREADABLE = -1  # stands for every code of an image that could not be read
SMALL_VOCAB = 1 << 15  # largest vocabulary whose codes are int16


@dataclasses.dataclass(frozen=True)
class Header:
    """Record of the tokenizer, the crops and the images that the codes of a folder come from."""

    tokenizer: str  # fingerprint of the tokenizer
    model: dict[str, Any]  # config of the tokenizer, JSON values
    vocab: int
    tokens: int  # codes of an image
    crops: str  # key of `AUGMENTATIONS`
    data: str  # fingerprint of the images
    records: int
    class_names: list[str]
    complete: bool = False
    labels_crc32: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the array of codes: (records, augmentations, codes of an image)."""
        return self.records, AUGMENTATIONS[self.crops], self.tokens

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored codes: int16, or int32 for a large vocabulary."""
        return dtype(self.vocab)


def dtype(vocab: int) -> np.dtype:
    """Returns the type of stored codes: int16, or int32 for a large vocabulary."""
    return np.dtype(np.int16 if vocab <= SMALL_VOCAB else np.int32)


@dataclasses.dataclass(frozen=True)
class Part:
    """Record of a part of codes.npy written at once: size, checksum and unreadable records."""

    records: int
    crc32: str
    unreadable: list[int]  # records, counted from the first of the file


class CodesWriter:
    """Writer of a folder of codes, part after part; continues the folder of a killed writer."""

    def __init__(self, folder: epath.PathLike, header: Header, labels: np.ndarray):
        """Makes the folder of codes, or opens an existing folder and checks the codes in it.

        Args:
            folder: local folder, created if missing.
            header: describes the codes to be written; its `labels_crc32` is filled in.
            labels: i32[records], -1 for an image without a class.

        Raises:
            ConfigError: the folder holds other codes.
            DataError: the folder cannot be written, or is damaged.
        """
        self._folder = epath.Path(folder)
        labels = np.ascontiguousarray(labels, np.int32)
        self._header = dataclasses.replace(header, labels_crc32=crc32(labels))
        with _writing(self._folder):
            if not (self._folder / HEADER).exists():
                self._start(labels)
            self._check_same()
            self.parts = self._whole_parts()
            self._codes = (self._folder / CODES).open("ab")
            self._lines = (self._folder / PARTS).open("a")

    @property
    def done(self) -> int:
        """Number of records whose codes are on disk."""
        return sum(part.records for part in self.parts)

    def write(self, codes: np.ndarray, unreadable: Sequence[int] = ()) -> None:
        """Appends the codes of the next b records to the folder.

        Args:
            codes: int[b a n].
            unreadable: indices in [0, b) of images that could not be read; every code of such an
                image is stored as -1.
        """
        if codes.shape[1:] != self._header.shape[1:]:
            raise DataError(f"codes are {codes.shape}, the folder is {self._header.shape}")
        rows = np.ascontiguousarray(codes, self._header.dtype)
        rows[list(unreadable)] = UNREADABLE
        part = Part(len(rows), crc32(rows), [self.done + int(i) for i in unreadable])
        with _writing(self._folder):
            self._codes.write(rows.tobytes())
            self._codes.flush()  # before the line that vouches for it
            self._lines.write(json.dumps(dataclasses.asdict(part)) + "\n")
            self._lines.flush()
        self.parts.append(part)

    def finish(self) -> None:
        """Marks the folder of codes complete; to be called once every record is written."""
        header = dataclasses.replace(self._header, complete=True)
        with _writing(self._folder):
            files.write_json(self._folder / HEADER, dataclasses.asdict(header))

    def close(self) -> None:
        """Closes the files of the folder of codes; the folder can be continued later."""
        self._codes.close()
        self._lines.close()

    def __enter__(self) -> "CodesWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self, labels: np.ndarray) -> None:
        """Makes the files of an empty folder of codes, the header last."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / PARTS).write_text("")
        with (self._folder / LABELS).open("wb") as file:
            np.save(file, labels)
        with (self._folder / CODES).open("wb") as file:
            form = {"descr": np.lib.format.dtype_to_descr(self._header.dtype)}
            form |= {"fortran_order": False, "shape": self._header.shape}
            np.lib.format.write_array_header_1_0(file, form)
        files.write_json(self._folder / HEADER, dataclasses.asdict(self._header))

    def _check_same(self) -> None:
        for name, theirs in dataclasses.asdict(read_header(self._folder)).items():
            ours = getattr(self._header, name)
            if name != "complete" and theirs != ours:
                raise ConfigError(
                    f"{self._folder} holds other codes, {name} is {_short(theirs)} there and"
                    f" {_short(ours)} here: choose another --workdir"
                )

    def _whole_parts(self) -> list[Part]:
        """Returns the parts whose codes on disk match their checksums; cuts off all behind."""
        start, row = _layout(self._folder / CODES, self._header)
        parts, end = [], start
        with (self._folder / CODES).open("rb") as file:
            file.seek(start)
            for part in read_parts(self._folder):
                data = file.read(part.records * row)
                if len(data) != part.records * row or crc32(data) != part.crc32:
                    break
                parts.append(part)
                end += len(data)
        os.truncate(self._folder / CODES, end)
        lines = "".join(json.dumps(dataclasses.asdict(part)) + "\n" for part in parts)
        files.write_bytes(self._folder / PARTS, lines.encode())
        return parts


def read_header(folder: epath.PathLike) -> Header:
    """Reads the header of a folder of codes; raises DataError if it is missing or damaged."""
    path = epath.Path(folder) / HEADER
    if not path.exists():
        raise DataError(f"{folder} holds no codes, expected {HEADER}: extract_codes makes it")
    try:
        return Header(**files.read_json(path))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged or of another version ({error})") from error


def read_parts(folder: epath.Path) -> Iterator[Part]:
    """Yields the parts of a folder of codes, up to the first damaged line in their list."""
    path = folder / PARTS
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            part = Part(**json.loads(line))
        except (ValueError, TypeError):
            return
        if not line.endswith("\n"):
            return
        yield part


def _layout(path: epath.Path, header: Header) -> tuple[int, int]:
    """Returns the number of bytes of codes.npy before its first record, and of one record."""
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): remove its folder") from error
        _, augmentations, tokens = header.shape
        return file.tell(), augmentations * tokens * header.dtype.itemsize


def crc32(data: bytes | np.ndarray) -> str:
    """Computes the CRC-32, in hex, of a byte string or of an array whose memory is contiguous."""
    return f"{zlib.crc32(data):08x}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    """Runs a block, and turns its errors of the disk into a DataError of one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"codes cannot be written to {folder}: {error}") from error
