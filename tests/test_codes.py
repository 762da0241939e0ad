"""Codes on disk: what is written is read, a cut-off writer goes on, damage is told."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gigatok_jax.data import codes, codes_file, pipeline, transforms
from gigatok_jax.errors import ConfigError, DataError

ROOT = pathlib.Path(__file__).parents[1]
RECORDS, TOKENS, VOCAB = 23, 5, 300


def header(**changes):
    fields = {"tokenizer": "0123456789abcdef", "model": {"kind": "1d"}, "vocab": VOCAB}
    fields |= {"tokens": TOKENS, "crops": "flip", "data": "fedcba9876543210", "records": RECORDS}
    return codes_file.Header(**fields | {"class_names": ["a", "b"]} | changes)


def rows(made=None):
    made = made or header()
    rng = np.random.default_rng(0)
    return rng.integers(0, made.vocab, made.shape).astype(np.int32)


def labels():
    return np.random.default_rng(1).integers(0, 2, RECORDS).astype(np.int32)


def write(folder, made=None, batch=4, unreadable=(), values=None, until=RECORDS):
    made = made or header()
    values = rows(made) if values is None else values
    with codes_file.CodesWriter(folder, made, labels()) as writer:
        while writer.done < until:
            first = writer.done
            bad = [i - first for i in unreadable if first <= i < min(first + batch, RECORDS)]
            writer.write(values[first : first + batch], bad)
        if until == RECORDS:
            writer.finish()
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "codes")


@pytest.mark.parametrize("vocab, dtype", [(1 << 15, np.int16), ((1 << 15) + 1, np.int32)])
def test_what_is_written_is_read(tmp_path, vocab, dtype):
    made = header(vocab=vocab)
    values = rows(made)
    values[3, 1, 2], values[4, 0, 0] = vocab - 1, 0
    source = codes.CodesSource(write(tmp_path, made, values=values))
    assert len(source) == RECORDS and source.augmentations == 2
    assert source.class_names == ("a", "b")
    np.testing.assert_array_equal(source.labels, labels())
    indices, drawn = np.array([3, 22, 3, 4]), np.array([1, 0, 0, 0])
    read = source.codes(indices, drawn)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values[indices, drawn])
    assert np.load(tmp_path / "codes.npy").shape == made.shape  # a plain file of numpy's


@pytest.mark.parametrize("crops", codes_file.AUGMENTATIONS)
def test_crops(crops):
    image = np.random.default_rng(2).integers(0, 256, (40, 53, 3), np.uint8)
    made = codes.crops_of(image, 32, crops)
    assert made.shape == (codes_file.AUGMENTATIONS[crops], 32, 32, 3)
    middle = transforms.center_crop(image, 32)
    if crops in codes_file.RATIOS:
        np.testing.assert_array_equal(made[:10], transforms.ten_crop(image, 32, 1.1))
        np.testing.assert_array_equal(
            made[10:20], transforms.ten_crop(image, 32, 1.05)[: len(made) - 10]
        )
    else:
        np.testing.assert_array_equal(made[0], middle)
        np.testing.assert_array_equal(made[-1], middle if crops == "center" else middle[:, ::-1])


# Cut off.


def test_a_writer_goes_on_behind_the_last_whole_part(tmp_path):
    whole = write(tmp_path / "whole")
    size = (whole / "codes.npy").stat().st_size
    for until in (0, 4, 12):
        folder = write(tmp_path / f"cut{until}", until=until)
        with pytest.raises(DataError, match=f"holds {until} of 23 records: run extract_codes"):
            codes.CodesSource(folder)
        # Half a row behind its last part, and half a line.
        with (folder / "codes.npy").open("ab") as file:
            file.write(b"\x01\x02\x03")
        with (folder / "parts.jsonl").open("a") as file:
            file.write('{"records": 4, "crc32": "0')
        with codes_file.CodesWriter(folder, header(), labels()) as writer:
            assert writer.done == until
        write(folder)
        assert (folder / "codes.npy").stat().st_size == size
        for name in ("codes.npy", "labels.npy", "parts.jsonl", "codes.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_part_that_did_not_reach_the_disk_is_written_again(tmp_path):
    folder = write(tmp_path, until=12)
    data = bytearray((folder / "codes.npy").read_bytes())
    row = 2 * TOKENS * 2
    data[-row * 6] ^= 1  # in the second of three parts
    (folder / "codes.npy").write_bytes(bytes(data))
    with codes_file.CodesWriter(folder, header(), labels()) as writer:
        assert writer.done == 4
    write(folder)
    np.testing.assert_array_equal(codes.CodesSource(folder).codes(np.arange(23), 1), rows()[:, 1])


def test_other_codes_are_not_mixed_in(folder):
    for changes in ({"tokenizer": "0" * 16}, {"crops": "center"}, {"data": "1" * 16}):
        (name,) = changes
        with pytest.raises(ConfigError, match=f"holds other codes, {name} is .* --workdir"):
            codes_file.CodesWriter(folder, header(**changes), labels())
    with pytest.raises(ConfigError, match="labels_crc32"):
        codes_file.CodesWriter(folder, header(), labels() + 1)


SCRIPT = """
import sys, time
sys.path.insert(0, "tests")
import test_codes

folder, pause = sys.argv[1], float(sys.argv[2])
write = test_codes.codes_file.CodesWriter.write
def slow(self, rows, unreadable=()):
    write(self, rows, unreadable)
    time.sleep(pause)
test_codes.codes_file.CodesWriter.write = slow
test_codes.write(folder, batch=1, unreadable=(7,))
"""


def test_a_writer_killed_at_random_moments_loses_and_doubles_nothing(tmp_path):
    whole, folder = write(tmp_path / "whole", batch=1, unreadable=(7,)), tmp_path / "codes"
    rng, parts = random.Random(0), folder / "parts.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    for seen in (1, 9, 16):
        with subprocess.Popen([*command, "0.02"], cwd=ROOT) as process:
            while process.poll() is None and (
                not parts.exists() or len(parts.read_text().splitlines()) < seen
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
    subprocess.run([*command, "0"], cwd=ROOT, check=True)
    for name in ("codes.npy", "labels.npy", "parts.jsonl", "codes.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


# Refused.


def edit(folder, **changes):
    path = folder / "codes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_is_named(folder):
    original = (folder / "codes.npy").read_bytes()
    (folder / "codes.npy").write_bytes(original[:-9] + bytes([original[-9] ^ 1]) + original[-8:])
    with pytest.raises(DataError, match=r"codes.npy, records 20 to 22: damaged, run extract"):
        codes.CodesSource(folder)
    write(folder)  # the part that is damaged is made again
    assert (folder / "codes.npy").read_bytes() == original
    (folder / "codes.npy").write_bytes(original[:-1])
    with pytest.raises(DataError, match=r"codes.npy cannot be read"):
        codes.CodesSource(folder)
    (folder / "codes.npy").write_bytes(original)
    np.save(folder / "labels.npy", labels() + 1)
    with pytest.raises(DataError, match=r"labels.npy is damaged"):
        codes.CodesSource(folder)


def test_a_writer_names_codes_without_a_head(folder):
    with (folder / "codes.npy").open("r+b") as file:
        file.truncate(50)
    with pytest.raises(DataError, match=r"codes\.npy is damaged .*remove its folder"):
        codes_file.CodesWriter(folder, header(), labels())


def test_missing_records_are_counted(folder):
    lines = (folder / "parts.jsonl").read_text().splitlines(keepends=True)
    (folder / "parts.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="holds 20 of 23 records: run extract_codes there again"):
        codes.CodesSource(folder)


def test_other_shapes_and_codes_out_of_range_are_refused(folder):
    edit(folder, tokens=TOKENS + 1)
    with pytest.raises(DataError, match=r"is int16\[23, 2, 5\], codes.json says int16\[23, 2, 6\]"):
        codes.CodesSource(folder)
    edit(folder, tokens=TOKENS, vocab=int(rows().max()))
    with pytest.raises(DataError, match=f"codes go from .* to {rows().max()}, vocabulary"):
        codes.CodesSource(folder)
    (folder / "codes.json").write_text("{")
    with pytest.raises(DataError, match=r"codes.json is damaged"):
        codes.CodesSource(folder)
    with pytest.raises(DataError, match="holds no codes"):
        codes.CodesSource(folder / "nothing")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    writer = codes_file.CodesWriter(tmp_path, header(), labels())

    def full(*_):
        raise OSError(28, "No space left on device")

    writer._lines = type("Full", (), {"write": full, "close": lambda self: None})()
    with pytest.raises(DataError, match=r"cannot be written to .*No space left"):
        writer.write(rows()[:4])
    writer.close()
    with codes_file.CodesWriter(tmp_path, header(), labels()) as writer:
        assert writer.done == 0


# Unreadable.


def test_unreadable_images_are_left_out_and_shift_nothing(tmp_path):
    source = codes.CodesSource(write(tmp_path, unreadable=(0, 7, 22)))
    kept = np.delete(np.arange(RECORDS), [0, 7, 22])
    assert len(source) == 20
    np.testing.assert_array_equal(source.labels, labels()[kept])
    np.testing.assert_array_equal(source.codes(np.arange(20), 1), rows()[kept, 1])
    assert (np.load(tmp_path / "codes.npy")[7] == -1).all()


def test_a_hole_that_nobody_reported_is_refused(tmp_path):
    values = rows()
    values[7] = -1
    with pytest.raises(DataError, match="records 4 to 7: codes go from -1"):
        codes.CodesSource(write(tmp_path, values=values))


# Batches.


def take(source, count, batch=6, seed=3, start=0, index=0, processes=1):
    stream = codes.train_batches(source, batch, seed, start, index, processes)
    return [next(stream) for _ in range(count)]


def test_batches_hold_the_codes_they_name(folder):
    source, seen = codes.CodesSource(folder), set()
    for batch in take(source, 8):
        assert (batch["label"].dtype, batch["index"].dtype) == (np.int32, np.int64)
        np.testing.assert_array_equal(batch["label"], labels()[batch["index"]])
        for row, index in zip(batch["codes"], batch["index"], strict=True):
            (found,) = [a for a in (0, 1) if np.array_equal(row, rows()[index, a])]
            seen.add((int(index), found))
    assert 30 < len(seen) <= 46  # 48 draws of 23 images under 2 augmentations


def test_the_order_is_that_of_the_images(folder):
    """Images and their codes meet in the same steps."""
    source = codes.CodesSource(folder)
    order = pipeline.order(RECORDS, 3)
    indices = np.concatenate([batch["index"] for batch in take(source, 8)])
    assert indices.tolist() == [order[p] for p in range(48)]
    assert sorted(indices[:23]) == sorted(indices[23:46]) == list(range(23))


def test_augmentations_are_drawn_evenly():
    values = np.arange(200_000)
    drawn = codes._hashes(5, values) % np.uint64(20)
    counts = np.bincount(drawn.astype(int))
    assert np.abs(counts - 10_000).max() < 500  # five standard deviations
    other = codes._hashes(6, values) % np.uint64(20)
    for a, b in ((drawn, other), (drawn[1:], drawn[:-1])):
        assert abs((a == b).mean() - 0.05) < 0.003


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_and_resuming_change_nothing(folder, processes):
    source = codes.CodesSource(folder)
    whole = take(source, 9)
    parts = [take(source, 4, start=5, index=i, processes=processes) for i in range(processes)]
    for step, batch in enumerate(whole[5:]):
        for name, values in batch.items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, values)
    start = time.perf_counter()
    take(source, 1, start=10**9)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_shows_every_image_once(tmp_path, processes):
    source = codes.CodesSource(write(tmp_path, unreadable=(3,)))
    streams = [codes.eval_batches(source, 8, i, processes) for i in range(processes)]
    batches = [batch for pair in zip(*streams, strict=True) for batch in pair]
    assert sum(len(batch["mask"]) for batch in batches) == 24
    seen = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    assert sorted(seen) == list(range(22))
    shown = np.concatenate([batch["codes"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(shown[np.argsort(seen)], np.delete(rows()[:, 0], 3, axis=0))


def test_ten_crops_are_evaluated_on_the_middle_one(tmp_path):
    made = header(crops="ten_crop")
    source = codes.CodesSource(write(tmp_path, made))
    (batch,) = codes.eval_batches(source, 24)
    np.testing.assert_array_equal(batch["codes"][:23], rows(made)[:, 4])


def test_held_out_codes_are_a_share_or_a_folder(folder, tmp_path):
    train, held_out = codes.open_codes(folder, "", 6)
    assert (len(train), len(held_out)) == (17, 6)
    both = np.concatenate([train.codes(np.arange(17), 0), held_out.codes(np.arange(6), 0)])
    assert sorted(map(tuple, both)) == sorted(map(tuple, rows()[:, 0]))
    assert train.fingerprint != held_out.fingerprint != codes.CodesSource(folder).fingerprint
    assert len(codes.open_codes(folder, "")[1]) == 1
    other = write(tmp_path / "other")
    train, held_out = codes.open_codes(folder, other)
    assert len(train) == len(held_out) == RECORDS
    with pytest.raises(DataError, match=r"data.eval_images=23 leaves none"):
        codes.open_codes(folder, "", 23)
    edit(other, tokenizer="0" * 16)
    with pytest.raises(DataError, match=r"holds codes of tokenizer 0000000000000000, .* of 0123"):
        codes.open_codes(folder, other)
