"""Streams of batches."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest
from PIL import Image

from gigatok_jax.data import pipeline, sources, transforms
from gigatok_jax.errors import ConfigError, DataError

SIZE = 16


def data_config(**changes):
    base = {"crop": "random", "flip": True, "workers": 0, "max_unreadable": 100}
    return ml_collections.ConfigDict(base | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """70 images of two classes: more than the pipeline reads without worker processes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(70):
        rng = np.random.default_rng(i)
        shape = (*rng.integers(SIZE, 40, 2), 3)
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return sources.FolderSource(folder)


def take(count, source, batch=8, seed=1, start=0, index=0, processes=1, size=SIZE, **changes):
    data = data_config(**changes)
    stream = pipeline.train_batches(data, source, size, batch, seed, start, index, processes)
    with stream:
        return [next(stream) for _ in range(count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_are_crops_of_the_records_they_name(source):
    for batch in take(3, source, crop="center", flip=False):
        assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (8, SIZE, SIZE, 3))
        assert (batch["label"].dtype, batch["index"].dtype) == (np.int32, np.int64)
        for image, label, index in zip(
            *(batch[k] for k in ("image", "label", "index")), strict=True
        ):
            whole = transforms.decode(source[index]["image"])
            np.testing.assert_array_equal(image, transforms.center_crop(whole, SIZE))
            assert label == source.labels[index]


def test_every_epoch_is_another_permutation(source):
    indices = np.concatenate([batch["index"] for batch in take(30, source, batch=7)])
    epochs = indices.reshape(3, 70)
    for epoch in epochs:
        assert sorted(epoch) == list(range(70))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = np.concatenate([batch["index"] for batch in take(30, source, batch=7, seed=2)])
    assert (other != indices).mean() > 0.9
    # Neighbouring seeds share no epoch.
    assert not {tuple(e) for e in epochs} & {tuple(e) for e in other.reshape(3, 70)}


def test_crops_and_flips_are_drawn_anew_each_epoch(source):
    batches = take(20, source, batch=7)
    seen = {}
    for batch in batches:
        for image, index in zip(batch["image"], batch["index"], strict=True):
            seen.setdefault(int(index), []).append(image)
    changed = [not np.array_equal(*pair) for pair in seen.values()]
    assert np.mean(changed) > 0.8


@pytest.mark.parametrize("flip, share", [(False, 0), (True, 0.5)])
def test_half_of_the_images_are_mirrored(flip, share):
    source = sources.DigitsSource("train", SIZE)
    mirrored = []
    for batch in take(4, source, batch=64, crop="center", flip=flip):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            mirrored.append(not np.array_equal(image, source[index]["image"]))
    assert abs(np.mean(mirrored) - share) < 0.12


@pytest.mark.parametrize("step", [1, 9, 23])
def test_a_resumed_stream_equals_one_that_went_on(source, step):
    assert_equal(take(step + 3, source)[step:], take(3, source, start=step))


def test_resuming_far_away_costs_nothing(source):
    start = time.perf_counter()
    take(1, source, start=10**9)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(source, processes):
    whole = take(3, source, start=7)
    parts = [take(3, source, start=7, index=i, processes=processes) for i in range(processes)]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        for step in range(3)
    ]
    assert_equal(joined, whole)


def test_worker_processes_change_nothing(source):
    # 70 images in batches of 6: epochs end inside a batch. 64 px: the batches are in shared memory.
    plan = {"source": source, "batch": 6, "start": 3, "size": 64}
    assert_equal(take(25, **plan, workers=2), take(25, **plan))


def test_workers_report_damaged_and_small_images(tmp_path, caplog, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=0)  # no shared memory: pipes carry the batches
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: full)
    for i in range(66):
        Image.new("RGB", (SIZE + 2, SIZE - 1 if i < 3 else SIZE)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "30.png").write_bytes(b"nothing")
    (tmp_path / "65.png").write_bytes((tmp_path / "64.png").read_bytes()[:45])
    source = sources.FolderSource(tmp_path)
    for workers in (1, 0):
        caplog.clear()
        batches = take(20, source, batch=11, workers=workers)
        messages = [record.getMessage() for record in caplog.records]
        assert sorted(m.split(":")[0].split()[-1] for m in messages[:2]) == ["1", "2"]
        assert {m.split(": ")[1].split(" ")[0] for m in messages[:2]} == {"30.png", "65.png"}
        assert messages[2:] == [f"3 images smaller than {SIZE} px were enlarged"]
        indices = np.concatenate([batch["index"] for batch in batches])
        counts = np.bincount(indices[:66], minlength=66)
        # Each stands in for the record before it; the last is followed by the first.
        assert counts[30] == counts[65] == 0 and counts[31] == counts[0] == 2


def test_a_damaged_file_moves_no_other_position(source, folder, tmp_path):
    for name in source.names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / source.names[5]).write_bytes(b"")
    whole, damaged = (take(10, s, batch=7) for s in (source, sources.FolderSource(tmp_path)))
    for a, b in zip(whole, damaged, strict=True):
        same = a["index"] != 5
        np.testing.assert_array_equal(a["image"][same], b["image"][same])
        np.testing.assert_array_equal(b["index"][~same], 6)


def test_too_many_damaged_files_end_the_stream(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of the 8 images .*\d.png \(not an image\)"):
        take(1, sources.FolderSource(tmp_path))  # none is readable
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "8.png")
    source = sources.FolderSource(tmp_path)
    assert take(1, source, max_unreadable=8)[0]["index"].tolist() == [8] * 8
    with pytest.raises(DataError, match="5 unreadable images where 4 are allowed"):
        take(2, source, max_unreadable=4)


def test_fewer_images_than_a_batch_are_repeated(folder):
    source = sources.FolderSource(folder).take([3, 4, 5])
    counts = np.bincount(take(1, source, batch=12)[0]["index"])
    np.testing.assert_array_equal(counts, [4, 4, 4])


def test_bad_settings_are_one_line(source):
    with pytest.raises(ConfigError, match=r"global batch of 8 .* 3 processes"):
        take(1, source, processes=3)
    with pytest.raises(ConfigError, match="'middle'"):
        take(1, source, crop="middle")
    with pytest.raises(ConfigError, match="seed is -1"):
        take(1, source, seed=-1)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_record_once_in_order(source, processes):
    streams = [pipeline.eval_batches(source, SIZE, 16, i, processes) for i in range(processes)]
    parts = [list(stream) for stream in streams]
    joined = [np.concatenate([b[key] for batches in zip(*parts, strict=True) for b in batches])
              for key in ("index", "mask", "label", "image")]  # fmt: skip
    index, mask, label, image = joined
    assert len(mask) == 80 and mask.sum() == 70 and mask[:70].all()
    np.testing.assert_array_equal(index[mask], np.arange(70))
    np.testing.assert_array_equal(label[mask], source.labels)
    expected = transforms.center_crop(transforms.decode(source[33]["image"]), SIZE)
    np.testing.assert_array_equal(image[33], expected)


def test_evaluation_masks_damaged_files(tmp_path, caplog):
    for i in range(5):
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    Image.new("RGB", (SIZE, SIZE - 1)).save(tmp_path / "3.png")
    report = pipeline.Report()
    for _ in range(2):  # a second evaluation has nothing new to say
        (batch,) = pipeline.eval_batches(sources.FolderSource(tmp_path), SIZE, 5, report=report)
        assert batch["mask"].tolist() == [True, False, True, True, True]
        assert len(caplog.records) == 2 and "1.png" in caplog.text
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of the 5 images can be read"):
        list(pipeline.eval_batches(sources.FolderSource(tmp_path), SIZE, 4))


PROGRAM = """
import sys, time
import ml_collections
from gigatok_jax.data import pipeline, sources

if __name__ == "__main__":
    data = dict(crop="random", flip=True, workers=1, max_unreadable=3)
    source = sources.FolderSource(sys.argv[1])
    stream = pipeline.train_batches(ml_collections.ConfigDict(data), source, 16, 8, 0, 0)
    next(stream)
    print("ready", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


def start(folder, program, mode):
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder), mode]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    return process


def members(session):
    """Processes of a session that still run: what `ps` would show, zombies left out."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("ending", ["left open", "killed"])
def test_no_worker_outlives_its_program(folder, tmp_path, ending):
    process = start(folder, tmp_path / "program.py", "leave" if ending == "left open" else "wait")
    if ending == "killed":
        assert len(members(process.pid)) >= 3  # itself, its worker, Python's tracker
        process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    deadline = time.monotonic() + 15
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == []
