"""The task `generate`: files, and what kills, damage and other settings do to them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import tiny_pair
from PIL import Image

from configs import generate as generate_config
from gigatok_jax import library
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.evaluation import generation, metrics, pair
from gigatok_jax.run import pictures
from gigatok_jax.run import workdir as workdir_lib

COUNT = 10  # images, which batches of 4 do not divide


@pytest.fixture(autouse=True, scope="module")
def programs():
    with tiny.small_programs(tiny.session() / "cache"):
        yield


@pytest.fixture(scope="module")
def models(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    tiny_pair.save_pair(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run; not to be changed."""
    workdir = tmp_path_factory.mktemp("whole")
    tiny_pair.generate(models, workdir, num_images=COUNT)
    return workdir


def content(workdir) -> dict[str, bytes]:
    """Every file that shows images; nothing of them may depend on time."""
    paths = [*workdir.glob("images/*"), *workdir.glob("pictures/*"), workdir / "samples.npz"]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def load(workdir, name="results.json"):
    return json.loads((workdir / name).read_text())


def test_each_image_is_a_file_named_by_id_and_class(whole):
    names = sorted(path.name for path in (whole / "images").iterdir())
    assert names == [f"{i:06d}_{i % 3:03d}_{i % 3}.png" for i in range(COUNT)]
    assert {pixels(path).shape for path in whole.glob("images/*")} == {(tiny.SIZE, tiny.SIZE, 3)}
    grids = sorted(path.name for path in whole.glob("pictures/*"))
    assert grids == [f"class_{i:04d}_{i}.png" for i in range(3)]


def test_npz_holds_the_pictures_in_the_order_of_their_ids(whole):
    with np.load(whole / "samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.dtype == np.uint8 and labels.tolist() == [i % 3 for i in range(COUNT)]
    files = sorted((whole / "images").iterdir())
    np.testing.assert_array_equal(images, np.stack([pixels(path) for path in files]))


def test_an_image_is_what_its_id_and_class_say(whole, models):
    prior = library.load_prior(models / "prior")
    tokenizer = library.load_tokenizer(models / "tokenizer")
    for i in (0, 7):
        codes = prior.generate([i % 3], seed=0, image_ids=[i])
        expected = metrics.to_uint8(np.asarray(tokenizer.decode(codes)))[0]
        made = pixels(next(whole.glob(f"images/{i:06d}_*")))
        assert abs(made.astype(int) - expected).max() <= 1  # rounding of another batch size
    first = [pixels(path) for path in sorted(whole.glob("images/*"))[:4]]
    assert len({one.tobytes() for one in first}) == 4


def test_record_and_results(whole, models):
    record, results = load(whole, "generation.json"), load(whole)
    assert record["settings"]["cfg"]["scale"] == results["cfg_scale"] == 1.75
    assert record["settings"]["seed"] == 0 and record["class_ids"] == [0, 1, 2]
    assert (record["prior"]["step"], record["tokenizer"]["step"]) == (7, 3)
    assert record["prior"]["trained_on"] == record["tokenizer"]["codes"]
    assert record["tokenizer"]["codes"] == library.load_tokenizer(models / "tokenizer").fingerprint
    assert {name: one["images"] for name, one in record["images_by_class"].items()} == {
        "0": 4, "1": 3, "2": 3,
    }  # fmt: skip
    assert "jax" in record["environment"]["packages"]
    assert (results["images"], results["classes"], results["made"]) == (COUNT, 3, COUNT)
    assert results["images_per_second"] > 0 and results["seconds"] > 0
    page = (whole / "index.html").read_text()
    assert "pictures/class_0002_2.png" in page


def test_any_ids_and_batches_give_the_same_pictures(whole, models, tmp_path):
    tiny_pair.generate(models, tmp_path, image_ids="9, 2-4", batch=3)
    names = sorted(path.name for path in tmp_path.glob("images/*"))
    assert [int(name[:6]) for name in names] == [2, 3, 4, 9]
    for name in names:
        there, here = (pixels(folder / "images" / name) for folder in (whole, tmp_path))
        assert abs(there.astype(int) - here).max() <= 1
    assert load(tmp_path)["image_ids"] == "2-4,9"


def test_a_longer_run_adds_to_what_is_there(whole, models, tmp_path):
    tiny_pair.generate(models, tmp_path, num_images=3)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("images/*")}
    tiny_pair.generate(models, tmp_path, num_images=COUNT, batch=5)
    assert {path.name for path in tmp_path.glob("images/*")} == set(os.listdir(whole / "images"))
    assert all((tmp_path / "images" / n).stat().st_mtime_ns == t for n, t in before.items())
    results = load(tmp_path)
    assert (results["images"], results["made"]) == (COUNT, COUNT - 3)
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == COUNT


def test_the_same_command_again_makes_nothing(models, tmp_path, monkeypatch):
    tiny_pair.generate(models, tmp_path, num_images=4)
    before = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "results.json", tmp_path / "samples.npz")
    }
    monkeypatch.setattr(generation, "draw", lambda *_: pytest.fail("drew again"))
    tiny_pair.generate(models, tmp_path, num_images=4)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def copy(whole, models, tmp_path):
    """A finished run of its own."""
    workdir = tmp_path / "run"
    tiny_pair.generate(models, workdir, num_images=COUNT)
    assert content(workdir) == content(whole)
    return workdir


def test_damaged_pictures_are_made_again(whole, models, tmp_path):
    workdir, rng = copy(whole, models, tmp_path), random.Random(0)
    paths = sorted((workdir / "images").iterdir())
    good = [path.read_bytes() for path in paths]
    flip = rng.randrange(60, len(good[1]))
    paths[0].write_bytes(good[0][: rng.randrange(1, len(good[0]))])
    paths[1].write_bytes(good[1][:flip] + bytes([good[1][flip] ^ 1]) + good[1][flip + 1 :])
    paths[2].write_bytes(b"")
    paths[3].write_bytes(bytes(len(good[3])))
    Image.new("RGB", (8, 8)).save(paths[4])
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(paths[5], "JPEG")
    paths[6].unlink()
    (workdir / "samples.npz").unlink()
    tiny_pair.generate(models, workdir, num_images=COUNT)
    assert load(workdir)["made"] == 7
    assert content(workdir) == content(whole)


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_bit_and_every_cut_is_noticed(whole, seed):
    rng = random.Random(seed)
    good = sorted(whole.glob("images/*"))[seed].read_bytes()
    assert pictures.is_whole(good, tiny.SIZE) and not pictures.is_whole(good, 2 * tiny.SIZE)
    for _ in range(300):
        place, bit = rng.randrange(len(good)), rng.randrange(8)
        flipped = good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
        assert not pictures.is_whole(flipped, tiny.SIZE)
        assert not pictures.is_whole(good[: rng.randrange(len(good))], tiny.SIZE)
    assert not pictures.is_whole(good + good, tiny.SIZE)
    assert not pictures.is_whole(good + b"x", tiny.SIZE)


def test_sigterm_ends_cleanly_and_the_same_command_goes_on(whole, models, tmp_path, monkeypatch):
    drawn, draw = [], generation.draw

    def draw_then_stop(job, ids):
        drawn.append(list(ids))
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(job, ids)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "draw", draw_then_stop)
        with pytest.raises(SystemExit) as ended:
            tiny_pair.generate(models, tmp_path, num_images=COUNT)
    assert ended.value.code == 128 + signal.SIGTERM
    assert drawn == [[0, 1, 2, 3]] and len(list(tmp_path.glob("images/*"))) == 4
    assert not (tmp_path / "results.json").exists() and (tmp_path / "index.html").exists()
    tiny_pair.generate(models, tmp_path, num_images=COUNT)
    assert content(tmp_path) == content(whole)


def kill_often(models, workdir, count, kills, rng):
    """Runs the task in processes that die by SIGKILL once some more files have been written."""
    command = [sys.executable, "-c", tiny_pair.SCRIPT, str(tiny.session() / "cache")]
    command += [str(models), str(workdir), repr({"num_images": count})]
    path = os.pathsep.join(["tests/helpers", "."])
    for _ in range(kills):
        aim = len(list(workdir.glob("images/*"))) + rng.randrange(1, 6)
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
        while process.poll() is None and len(list(workdir.glob("images/*"))) < aim:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_nothing_is_lost_doubled_or_half_written(models, tmp_path, kills):
    whole, killed, count = tmp_path / "whole", tmp_path / "killed", 15 * kills
    tiny_pair.generate(models, whole, num_images=count)
    kill_often(models, killed, count, kills, random.Random(kills))
    for path in killed.glob("images/*.png"):
        assert path.read_bytes() == (whole / "images" / path.name).read_bytes()
    tiny_pair.generate(models, killed, num_images=count)
    assert content(killed) == content(whole)  # no drafts either


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prior": ""}, "prior is empty"),
        ({"tokenizer": ""}, "tokenizer is empty"),
        ({"weights_kind": "best"}, "weights is 'best', expected one of auto"),
        ({"class_ids": "3"}, "class 3 does not exist, expected 0 to 2"),
        ({"class_ids": "panda"}, "no class 'panda'; there are 0 to 2"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"cfg": {"scale": 0.5}}, "guidance scale is 0.5, expected 1"),
        ({"cfg": {"start": -0.1}}, "guidance window is -0.1 to 1.0, expected 0 <= start"),
        ({"cfg": {"end": 1.1}}, "guidance window is 0.18 to 1.1"),
        ({"cfg": {"start": 0.8, "end": 0.2}}, "guidance window is 0.8 to 0.2"),
        (
            {"cfg": {"schedule": "sigmoid"}},
            "guidance schedule is 'sigmoid', expected one of constant",
        ),
        ({"cfg": {"interval": -2}}, "cfg.interval is -2, expected -1 or more"),
        ({"num_images": -1}, "num_images is -1, expected 0 or more"),
        ({"batch": 0}, "batch is 0, expected 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"image_ids": "1,3,1"}, "image_ids names 1 twice"),
        ({"image_ids": "-4"}, "'-4' is no number or range"),
        ({"image_ids": ","}, "image_ids is ',', expected ids like"),
        ({"image_ids": "1", "num_images": 4}, "image_ids and num_images are both given"),
        ({"dtype": "float16"}, "dtype is 'float16', expected one of auto, float32, bfloat16"),
        ({"mesh": {"data": 3}}, "mesh data=3, fsdp=1, tensor=1 does not cover 1 devices"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(models, tmp_path, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        tiny_pair.generate(models, tmp_path / "run", **values)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_classes_go_by_the_names_of_the_data_that_was_learned(models, tmp_path):
    names = ["cat", "dog", "house mouse"]
    tiny_pair.save(tmp_path / "prior", *tiny_pair.prior(), class_names=names)
    where = {"prior": f"{tmp_path}/prior", "tokenizer": f"{models}/tokenizer"}
    tiny_pair.generate(models, tmp_path / "run", class_ids="mouse, cat", num_images=3, **where)
    made = sorted(path.name for path in (tmp_path / "run/images").iterdir())
    assert made == [
        "000000_002_house_mouse.png",
        "000001_000_cat.png",
        "000002_002_house_mouse.png",
    ]
    with pytest.raises(ConfigError, match="no class 'panda'"):
        tiny_pair.generate(models, tmp_path / "other", class_ids="panda", **where)


def test_many_classes_have_to_be_chosen():
    with pytest.raises(ConfigError, match="class_ids is empty: name some of the 1000 classes"):
        generation._class_ids("", generation.classes.names_of(1000))


def test_a_folder_of_other_settings_is_refused(models, whole):
    with pytest.raises(ConfigError, match=r"seed is 1 here and 0 there; choose another --workdir"):
        tiny_pair.generate(models, whole, num_images=COUNT, seed=1)


def test_a_folder_of_other_weights_is_refused(models, tmp_path):
    path = tmp_path / "pair"
    tiny_pair.save_pair(path)
    tiny_pair.generate(path, tmp_path / "run", num_images=2)
    trained_on = library.load_prior(path / "prior").trained_on
    tiny_pair.save(path / "prior", *tiny_pair.prior(seed=1), step=9, tokenizer=trained_on)
    with pytest.raises(ConfigError, match=r"holds images of another prior: .*'step': 9.*'step': 7"):
        tiny_pair.generate(path, tmp_path / "run", num_images=2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocab": 64}, "images of 16 codes with 64 values, the tokenizer has 16 codes with 32"),
        ({"tokens": 8}, "images of 8 codes with 32 values, the tokenizer has 16 codes with 32"),
    ],
)
def test_a_tokenizer_of_other_codes_is_refused(models, fields, message):
    prior = library.Prior(*reversed(tiny_pair.prior(**fields)))
    tokenizer = library.load_tokenizer(models / "tokenizer")
    with pytest.raises(ConfigError, match=message):
        pair.check_tokenizer(prior, tokenizer)


def test_a_tokenizer_that_the_prior_does_not_know_is_refused(models):
    model, params = tiny_pair.tokenizer(seed=5)
    other = library.Tokenizer(params, model)
    prior = library.load_prior(models / "prior")
    with pytest.raises(ConfigError, match=f"{prior.trained_on}, this one is {other.fingerprint}"):
        pair.check_tokenizer(prior, other)
    unknown = library.Prior(*reversed(tiny_pair.prior()))
    pair.check_tokenizer(unknown, other)  # a prior that does not say takes any that fits


def test_checkpoints_that_are_swapped_are_refused(models, tmp_path):
    config = generate_config.get_config()
    config.update(prior=f"{models}/tokenizer", tokenizer=f"{models}/prior")
    with pytest.raises(CheckpointError, match="holds a tokenizer, expected a prior"):
        generation.generate(config, tmp_path)


def test_what_may_change_between_two_calls():
    # Where the tokenizer lies is free too; the record in the folder compares its weights.
    free = {"batch", "cluster", "image_ids", "num_images", "mesh", "tokenizer"}
    assert free <= set(workdir_lib.FREE_KEYS)
    keys = set(generate_config.get_config()) - free
    assert keys.isdisjoint(workdir_lib.FREE_KEYS)
