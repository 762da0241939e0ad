"""What a run writes down: one JSON line per call, cut back when it resumes."""

import json
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from gigatok_jax.errors import GigatokError
from gigatok_jax.run import metric_writer, pictures
from gigatok_jax.run import workdir as workdir_lib


@pytest.fixture
def writer(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, total_steps=100, images_per_step=8)
    yield writer
    writer.close()


def test_lines_are_on_disk_at_once_and_not_finite_is_null(writer, tmp_path):
    writer.write(3, {"loss": np.float32(0.5), "bad": float("nan")}, "train")
    writer.write(3, {"psnr": np.array(21.25), "worse": -float("inf")}, "eval")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert strict == [
        {"step": 3, "train/loss": 0.5, "train/bad": None},
        {"step": 3, "eval/psnr": 21.25, "eval/worse": None},
    ]


def test_numbers_survive_bit_for_bit(writer, tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    for step, value in enumerate(values):
        writer.write(step, {"x": value}, "train")
    found = [row["train/x"] for row in metric_writer.read(tmp_path)]
    np.testing.assert_array_equal(np.float32(found), values)


BROKEN = (b"", b'{"step": 40, "train/lo', b'{"step": 40}\n{"st', b"\0\0", b"\xff{")


@pytest.mark.parametrize("broken", BROKEN)
def test_resuming_gives_the_file_of_an_uninterrupted_run(tmp_path, broken):
    def run(workdir, first, last, resume=False):
        writer = metric_writer.MetricWriter(workdir, 100, 8)
        if resume:
            writer.truncate_after(first)
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": 1 / step}, "train")
        writer.close()

    run(tmp_path / "whole", 0, 50)
    run(tmp_path / "killed", 0, 39)
    with (tmp_path / "killed/metrics.jsonl").open("ab") as file:
        file.write(broken)
    run(tmp_path / "killed", 30, 50, resume=True)
    whole, killed = ((tmp_path / d / "metrics.jsonl").read_bytes() for d in ("whole", "killed"))
    assert killed == whole


def test_truncating_before_anything_was_written_is_fine(writer, tmp_path):
    writer.truncate_after(0)
    assert metric_writer.read(tmp_path) == []


def test_tensorboard_shows_the_same_numbers_and_drops_what_was_undone(tmp_path):
    for resumed, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        writer = metric_writer.MetricWriter(tmp_path, 100, 8)
        if resumed:
            writer.truncate_after(resumed)
        for step in steps:
            writer.write(step, {"loss": step / 4, "bad": float("nan")}, "train")
        writer.picture(step, "grid", np.zeros((4, 6, 3), np.uint8))
        writer.close()
    scalars, sessions = {}, []
    for event in events(tmp_path):
        if event.HasField("session_log"):
            sessions.append((event.session_log.status, event.step))
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars[event.step, value.tag] = value.simple_value
    assert scalars == {(step, "train/loss"): step / 4 for step in (1, 2, 3, 4)}
    assert (event_pb2.SessionLog.START, 3) in sessions  # TensorBoard forgets step 3 and later


def events(folder):
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: length u64, its crc u32, the event, its crc u32
            length = int.from_bytes(data[at : at + 8], "little")
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16


def test_a_file_that_cannot_be_written_is_one_clear_error(writer, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(GigatokError, match=r"metrics\.jsonl cannot be written"):
        writer.write(1, {"loss": 1.0}, "train")


def test_timer_shares_add_up_to_the_wall_time():
    timer = metric_writer.StepTimer()
    start = time.perf_counter()
    for part, seconds in (("data", 0.02), ("compute", 0.06), ("data", 0.02)):
        with timer.measure(part):
            time.sleep(seconds)
    seconds, shares = timer.interval()
    assert seconds == pytest.approx(time.perf_counter() - start, abs=0.01)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["data"] * seconds >= 0.04 and shares["compute"] * seconds >= 0.06
    assert set(timer.interval()[1]) == {"other"}  # a new interval; the total goes on
    assert timer.total()[1]["compute"] > 0


def test_timer_counts_a_part_that_raised():
    timer = metric_writer.StepTimer()
    with pytest.raises(KeyError), timer.measure("data"):
        time.sleep(0.01)
        raise KeyError
    assert timer.interval()[1]["data"] > 0


def test_progress_line_says_where_the_time_went(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metric_writer.time, "perf_counter", lambda: now[0])
    writer, timer = metric_writer.MetricWriter(tmp_path, 1000, 8), metric_writer.StepTimer()
    writer.truncate_after(20)  # the speed counts the steps of this process only
    for part, seconds in (("data", 2.0), ("compute", 7.0), ("save", 0.5)):
        with timer.measure(part):
            now[0] += seconds
    now[0] += 0.5
    writer.progress(40, {"loss": 0.123456, "psnr": 20.5}, timer)
    writer.close()
    assert capsys.readouterr().out == (
        "step   40/1000 | 16.0 images/s | 8 min left"
        " | data 20% compute 70% save 5% other 5% | loss 0.1235 psnr 20.5\n"
    )
    row = metric_writer.read(tmp_path)[0]
    assert row["time/images_per_second"] == pytest.approx(16)
    assert row["time/data_share"] == pytest.approx(0.2)


DURATIONS = {0: "0 s", 99: "99 s", 100: "2 min", 3599: "1 h 00 min", 11100: "3 h 05 min"}
DURATIONS |= {86400: "1 d 00 h", 200000: "2 d 07 h"}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_durations_read_well(seconds, text):
    assert metric_writer.duration(seconds) == text


@pytest.mark.parametrize(("count", "size"), [(1, 32), (8, 128), (11, 20)])
def test_each_reconstruction_stands_under_its_original(count, size):
    rng = np.random.default_rng(count)
    originals, made = rng.integers(0, 256, (2, count, size, size, 3), dtype=np.uint8)
    picture = pictures.comparison(originals, made, columns=4)
    tile = -(-pictures.SMALLEST // size) * size if size < pictures.SMALLEST else size
    factor, gap = tile // size, pictures.GAP
    for index in range(count):
        left = gap + index % 4 * (tile + gap)
        top = gap + index // 4 * (2 * tile + pictures.SEAM + gap)
        column = picture[:, left : left + tile : factor]
        np.testing.assert_array_equal(column[top : top + tile : factor], originals[index])
        top += tile + pictures.SEAM
        np.testing.assert_array_equal(column[top : top + tile : factor], made[index])


def test_pictures_refuse_floats_and_other_shapes():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="expected uint8"):
        pictures.comparison(images, images.astype(np.float32))
    with pytest.raises(ValueError, match="reconstructions"):
        pictures.comparison(images, images[:1])


@pytest.mark.parametrize("rows", [16, 700, 16384])  # fewer than pixels, about as many, more
def test_usage_picture_shows_the_share_of_dead_codes(rows):
    counts = np.random.default_rng(rows).integers(1, 50, rows)
    counts[: rows // 4] = 0
    picture = pictures.codebook_usage(np.random.default_rng(0).permutation(counts))
    red = (picture == pictures.DEAD).all(-1).any(0).sum()
    blue = (picture == pictures.BAR).all(-1).any(0).sum()
    assert red / (red + blue) == pytest.approx(0.25, abs=0.01)


def test_saved_picture_is_a_png_with_its_step(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = pictures.save(tmp_path, "reconstruction", 1200, picture)
    assert path.name == "reconstruction_00001200.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


def test_environment_is_json_with_versions_and_devices(tmp_path):
    workdir_lib.write_environment(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["packages"]["jax"] == jax.__version__
    assert sum(found["devices"].values()) >= 1
    assert found["backend"] == "cpu"


def test_progress_says_how_fast_without_the_first_piece(monkeypatch, capsys):
    """The first piece of work compiles: 50 s for it, then 2 s for each."""
    now = iter([0.0, 50.0, 50.0, 52.0, 52.0, 52.0, 54.0, 54.0, 54.0])
    monkeypatch.setattr(metric_writer.time, "perf_counter", lambda: next(now))
    progress = metric_writer.Progress("encoded", 100, "images", done=10)
    progress.add(30)  # told, since the last line is older than PROGRESS_SECONDS
    progress.add(30)  # not told so soon after it
    progress.add(30)  # the last
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "encoded 40/100 images | 0.6 images/s | 2 min left"
    assert lines[1].startswith("encoded 100/100 images | ")
    assert len(lines) == 2


def test_progress_of_bytes_ends_with_all_of_them(capsys):
    count = metric_writer.count_bytes("model.pt", 3 * 10**9 + 1)
    for _ in range(3):
        count(10**9)
    count(1)
    assert capsys.readouterr().err.startswith("model.pt 3.00/3.00 GB | ")
