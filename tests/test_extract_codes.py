"""The task extract_codes: right codes, no record lost, bad input in one line."""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import tiny_pair
from PIL import Image

from configs import extract_codes as config_file
from gigatok_jax import library
from gigatok_jax.data import codes, codes_file, sources, transforms
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.models import tokenizer as tokenizer_lib
from gigatok_jax.train import extract_codes

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("codes.npy", "labels.npy", "parts.jsonl", "codes.json")
IMAGES = 29


@pytest.fixture(autouse=True, scope="module")
def programs():
    with tiny.small_programs(tiny.session() / "cache"):
        yield


@functools.cache
def checkpoint() -> pathlib.Path:
    tiny_pair.save(tiny.session() / "tokenizer", *tiny_pair.tokenizer())
    return tiny.session() / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return library.load_tokenizer(checkpoint())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 photographs of two classes, of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (7 + i % 3, 9, 3), np.uint8)
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((50 + i, 40)).save(folder / f"class{i % 2}" / f"{i:02d}.png")
    return folder


def config(folder="", **changes):
    made = config_file.get_config()
    made.update(checkpoint=str(checkpoint()), crops="flip", batch=8)
    # Every image, in the order of their names.
    made.data.update(folder=str(folder), eval_folder=str(folder), workers=0)
    if not folder:
        made.data.source = "digits"
    made.update(changes)
    return made


def extract(workdir, made) -> codes.CodesSource:
    extract_codes.extract(made, workdir)
    return codes.CodesSource(workdir)


def read(workdir) -> dict[str, bytes]:
    return {name: (workdir / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    extract(workdir, config(folder))
    return workdir


def nearest(tokenizer, images) -> np.ndarray:
    """Codes by float64 distances to every row: int[b n], and the gap to the second."""
    module = tokenizer_lib.make(tokenizer.config)
    pixels = images.astype(np.float32) / 127.5 - 1
    latents = module.apply({"params": tokenizer.params}, pixels, method="encode").latents
    rows = np.asarray(tokenizer.codebook, np.float64)
    z, rows = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (np.asarray(latents), rows))
    return np.square(z[:, :, None] - rows).sum(-1).argmin(-1)


@pytest.mark.parametrize("crops", ["center", "flip", "ten_crop"])
def test_codes_are_of_the_crops_they_stand_for(folder, whole, tokenizer, tmp_path, crops):
    source = codes.CodesSource(whole)
    if crops != "flip":
        source = extract(tmp_path, config(folder, crops=crops))
    images = sources.FolderSource(folder)
    assert len(source) == IMAGES
    for i in (0, 8, 28):
        image = transforms.decode(images[i]["image"])
        views = codes.crops_of(image, tiny.SIZE, crops)
        ours = source.codes(np.full(len(views), i), np.arange(len(views)))
        assert (ours == nearest(tokenizer, views)).mean() > 0.99
    np.testing.assert_array_equal(source.labels, images.labels)
    assert source.class_names == ("class0", "class1")


def test_results_say_what_was_made(whole, tokenizer):
    results, source = json.loads((whole / "results.json").read_text()), codes.CodesSource(whole)
    assert (results["records"], results["augmentations"], results["unreadable"]) == (IMAGES, 2, 0)
    assert results["tokenizer"] == tokenizer.fingerprint == source.header.tokenizer
    assert results["seconds"] > 0 and results["images_per_second"] > 0
    every = np.load(whole / "codes.npy")
    assert every.dtype == np.int16 and every.shape == (IMAGES, 2, tiny_pair.TOKENS)
    assert results["codebook_usage"] == len(np.unique(every)) / tiny.ROWS
    shares = np.bincount(every.reshape(-1)) / every.size
    entropy = -sum(p * np.log(p) for p in shares if p)
    assert results["perplexity"] == pytest.approx(np.exp(entropy))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_digits_have_both_splits(tmp_path, split):
    source = extract(tmp_path, config(split=split, crops="center", batch=512))
    images = sources.DigitsSource(split, tiny.SIZE)
    np.testing.assert_array_equal(source.labels, images.labels)
    assert source.class_names == images.class_names


def test_a_finished_folder_has_nothing_to_do(folder, whole, capsys):
    before, results = read(whole), (whole / "results.json").read_bytes()
    extract(whole, config(folder, batch=2))
    assert read(whole) == before and (whole / "results.json").read_bytes() == results


# Unreadable.


def damaged(folder, tmp_path, count):
    images = tmp_path / "images"
    names = sources.FolderSource(folder).names
    for i, name in enumerate(names):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        data = (folder / name).read_bytes()
        (images / name).write_bytes(data[:40] if i % 5 == 4 and i < 5 * count else data)
    return images


def test_an_unreadable_image_is_named_and_shifts_nothing(folder, whole, tmp_path, caplog):
    images = damaged(folder, tmp_path, 2)
    source = extract(tmp_path / "codes", config(images))
    told = [r.getMessage() for r in caplog.records if "unreadable image" in r.getMessage()]
    assert [line.split(": ")[1].split(" ")[0] for line in told] == [
        sources.FolderSource(folder).names[i] for i in (4, 9)
    ]
    kept = np.delete(np.arange(IMAGES), [4, 9])
    expected = codes.CodesSource(whole)
    assert len(source) == len(kept)
    np.testing.assert_array_equal(source.labels, expected.labels[kept])
    for a in (0, 1):
        np.testing.assert_array_equal(source.codes(np.arange(27), a), expected.codes(kept, a))
    assert json.loads((tmp_path / "codes/results.json").read_text())["unreadable"] == 2


def test_too_many_unreadable_images_stop_it(folder, tmp_path):
    made = config(damaged(folder, tmp_path, 4))
    made.data.max_unreadable = 2
    with pytest.raises(DataError, match="3 unreadable images where 2 are allowed"):
        extract(tmp_path / "codes", made)
    # The one that is written already counts as well, when it goes on.
    with pytest.raises(DataError, match="2 unreadable images where 1 are allowed"):
        extract(tmp_path / "codes", made)


# Cut off.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_between_batches(folder, whole, tmp_path, monkeypatch, number, capsys):
    write, seen = codes_file.CodesWriter.write, []

    def interrupted(self, rows, unreadable=()):
        write(self, rows, unreadable)
        seen.append(len(rows))
        if len(seen) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(codes_file.CodesWriter, "write", interrupted)
    with pytest.raises(SystemExit) as ended:
        extract(tmp_path, config(folder))
    assert ended.value.code == 128 + number
    assert "stopped at image 12 of 29; the same command resumes" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(DataError, match="12 of 29 records"):
        codes.CodesSource(tmp_path)
    extract(tmp_path, config(folder))
    assert read(tmp_path) == read(whole)


SCRIPT = """
import sys
import test_extract_codes, tiny
from test_extract_codes import codes_file, config, extract_codes, time

cache, checkpoint, folder, workdir, pause = sys.argv[1:]
write = codes_file.CodesWriter.write
def slow(self, rows, unreadable=()):
    write(self, rows, unreadable)
    time.sleep(float(pause))
codes_file.CodesWriter.write = slow
test_extract_codes.checkpoint = lambda: checkpoint
with tiny.small_programs(cache):
    extract_codes.extract(config(folder), workdir)
"""


def killed(folder, workdir, moments, rng):
    """Extracts, killed when that many parts are written, and lets it end at last."""
    arguments = [str(x) for x in (tiny.session() / "cache", checkpoint(), folder, workdir)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    # Two devices share its batches; the codes are those of one.
    environment = os.environ | {"PYTHONPATH": tiny.PYTHONPATH, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    parts = workdir / "parts.jsonl"
    for seen in moments:
        with subprocess.Popen([*command, "0.05"], cwd=ROOT, env=environment) as process:
            while process.poll() is None and (
                not parts.exists() or parts.read_text().count("\n") < seen
            ):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.06))
            process.kill()
    subprocess.run([*command, "0"], cwd=ROOT, env=environment, check=True)


def test_killed_at_random_moments_it_loses_and_doubles_nothing(folder, whole, tmp_path):
    killed(folder, tmp_path / "codes", [1, 5], random.Random(0))
    assert read(tmp_path / "codes") == read(whole)


@pytest.mark.slow
def test_killed_ten_times_it_loses_and_doubles_nothing(folder, whole, tmp_path):
    rng = random.Random(1)
    moments = sorted(rng.randint(0, 7) for _ in range(10))
    killed(folder, tmp_path / "codes", moments, rng)
    assert read(tmp_path / "codes") == read(whole)


# Refused.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"crops": "five"}, ConfigError, "crops is 'five', expected one of center, flip"),
        ({"batch": 0}, ConfigError, "batch is 0"),
        ({"split": "test"}, ConfigError, "split is 'test'"),
        ({"checkpoint": ""}, ConfigError, "no checkpoint is named"),
        ({"checkpoint": "nowhere"}, CheckpointError, "nowhere does not exist"),
        ({"weights_kind": "best"}, ConfigError, "'best'"),
    ],
)
def test_bad_values_are_refused(folder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as refused:
        extract(tmp_path / "new", config(folder, **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()  # so that the value can be put right


def test_a_folder_of_other_codes_is_refused(folder, whole, tmp_path):
    with pytest.raises(ConfigError, match="crops is 'center' here and 'flip' there"):
        extract(whole, config(folder, crops="center"))
    tiny_pair.save(tmp_path / "other", *tiny_pair.tokenizer(seed=1))
    with pytest.raises(ConfigError, match="holds other codes, tokenizer is"):
        extract(whole, config(folder, checkpoint=str(tmp_path / "other")))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for i in range(3):
        Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(fewer / f"{i}.png")
    with pytest.raises(ConfigError, match="holds other codes, data is"):
        extract(whole, config(fewer))
