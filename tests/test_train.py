"""Whole runs: what they leave, that a resumed one is the uninterrupted one, what stops one."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from gigatok_jax.data import sources
from gigatok_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingWeightsError,
    NonFiniteError,
)
from gigatok_jax.run import checkpoint, metric_writer
from gigatok_jax.train import loop, networks, program
from gigatok_jax.train import tokenizer as training

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def programs():
    with tiny.small_programs(tiny.session() / "cache"):
        yield


@pytest.fixture
def whole():
    return tiny.finished_run()


def arrays(workdir) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by path."""
    root, _ = checkpoint.find(workdir)
    newest = max(int(folder.name) for folder in root.iterdir() if folder.name.isdigit())
    names = list(checkpoint._saved_tree(root / str(newest)))  # no discriminator leaves no entry
    assert {"params", "ema_params", "opt_state", "rng", "step"} <= set(names)
    trees, _ = checkpoint.load_params(workdir, names)
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(trees)[0]}


def metrics(workdir) -> list[dict]:
    """Rows without what depends on the machine."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in metric_writer.read(workdir)
    ]
    return [row for row in rows if set(row) != {"step"}]


TIMES = ("seconds", "useful_share", "images_per_second")  # how a result's name ends


def results(workdir) -> dict:
    """Those that do not depend on the machine."""
    read = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in read.items() if not name.endswith(TIMES)}


def assert_same_run(workdir, whole):
    """Bit for bit."""
    ours, expected = arrays(workdir), arrays(whole)
    assert set(ours) == set(expected)
    assert [p for p in expected if not np.array_equal(ours[p], expected[p])] == []
    assert metrics(workdir) == metrics(whole)
    assert results(workdir) == results(whole)


def cut(whole, workdir, step) -> pathlib.Path:
    """A copy of a run as it was just after the checkpoint of `step`."""
    shutil.copytree(whole, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    (workdir / "results.json").unlink()
    return workdir


def test_a_run_leaves_everything_behind(whole):
    for name in ("config.json", "environment.json", "results.json", "index.html"):
        assert (whole / name).stat().st_size > 0, name
    assert list(whole.glob("events.out.tfevents*"))
    assert {int(folder.name) for folder in (whole / "checkpoints").iterdir()} == {2, 4, 6, 8}
    pictures = {path.name for path in (whole / "pictures").glob("*.png")}
    for kind in ("reconstruction", "codebook_usage"):
        assert sum(kind in name for name in pictures) == 2  # at steps 4 and 8
    read = json.loads((whole / "results.json").read_text())
    held_out = sources.DigitsSource("held_out", tiny.SIZE)
    assert read["step"] == 8 and read["images"] == len(held_out)
    assert {"psnr", "ssim", "codebook_usage", "perplexity", "seconds"} <= set(read)
    assert 0 < read["useful_share"] <= 1


def test_metrics_are_of_every_step_and_phase(whole):
    rows = {row["step"]: row for row in metrics(whole) if "train/loss" in row}
    assert sorted(rows) == list(range(1, 9))
    assert [step for step in rows if "train/feature" in rows[step]] == [1, 2, 3]
    assert [step for step in rows if "train/adversarial" in rows[step]] == [4, 5, 6, 7, 8]
    held_out = [row["step"] for row in metrics(whole) if "eval/psnr" in row]
    assert held_out == [4, 8]


def test_shares_of_time_add_up(whole):
    for row in metric_writer.read(whole):
        shares = [value for name, value in row.items() if name.endswith("_share")]
        if shares:
            assert sum(shares) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("step", [2, 6])  # in either phase
def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, step):
    workdir = cut(whole, tmp_path / "run", step)
    tiny.train(workdir)
    assert_same_run(workdir, whole)


def test_a_finished_run_has_nothing_to_do(whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    tiny.train(workdir)
    assert "step 8 of 8" in capsys.readouterr().out
    assert_same_run(workdir, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(whole, tmp_path, monkeypatch, number, capsys):
    workdir, seen = cut(whole, tmp_path / "run", 4), []
    original = training.objective.phase_at

    def phase_at(done, *rest):
        if done == 4 and not seen:
            seen.append(done)
            os.kill(os.getpid(), number)
        return original(done, *rest)

    monkeypatch.setattr(training.objective, "phase_at", phase_at)
    before, started = signal.getsignal(number), time.time()
    with pytest.raises(SystemExit) as ended:
        tiny.train(workdir)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert "stopped at step 5 of 8" in capsys.readouterr().out
    assert not (workdir / "results.json").exists()
    assert (workdir / "index.html").stat().st_mtime > started
    assert checkpoint.damage(workdir / "checkpoints" / "5") is None
    tiny.train(workdir)
    assert_same_run(workdir, whole)


def test_a_run_that_dies_in_an_evaluation_has_saved_its_step(whole, tmp_path, monkeypatch):
    workdir, original = tmp_path / "run", training.HeldOut.figures

    def figures(self, *arguments):
        monkeypatch.setattr(training.HeldOut, "figures", original)
        raise OSError("taken away")

    monkeypatch.setattr(training.HeldOut, "figures", figures)
    with pytest.raises(OSError, match="taken away"):
        tiny.train(workdir)
    assert checkpoint.damage(workdir / "checkpoints" / "4") is None
    assert not any("eval/psnr" in row for row in metrics(workdir))
    tiny.train(workdir)
    assert_same_run(workdir, whole)


def test_metrics_may_be_written_at_the_ends_alone(tmp_path):
    made = tiny.run_config()
    made.log.every = 0
    tiny.train(tmp_path / "run", made)
    rows = [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert rows == [1, 8]


def spoil(path, how):
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    else:
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_a_damaged_checkpoint_costs_one_interval(whole, tmp_path, how, monkeypatch):
    workdir = cut(whole, tmp_path / "run", 6)
    files = [path for path in (workdir / "checkpoints/6/state").rglob("*") if path.is_file()]
    spoil(max(files, key=lambda path: path.stat().st_size), how)
    told = []
    monkeypatch.setattr(checkpoint.logging, "warning", lambda text, *a: told.append(text % a))
    tiny.train(workdir)
    assert "checkpoints/6 is damaged" in told[0]
    assert (workdir / "checkpoints" / "6.bad").exists()
    assert_same_run(workdir, whole)


# Killed.


def killed_run(command, environment, workdir, moments, rng):
    """Starts a run, kills it at each moment, and lets it end at last."""
    for rows in moments:
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            wait_for_rows(process, workdir, rows)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def wait_for_rows(process, workdir, step):
    """Until the metrics of a step are written, or the process has ended by itself."""
    while process.poll() is None:
        if any(row["step"] >= step for row in metric_writer.read(workdir)):
            return
        time.sleep(0.01)


def environment(**more) -> dict:
    return os.environ | {"PYTHONPATH": tiny.PYTHONPATH, "JAX_PLATFORMS": "cpu"} | more


def test_a_run_killed_at_random_moments_ends_the_same(whole, tmp_path):
    rng = random.Random(0)
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", tiny.SCRIPT, str(tiny.session() / "cache"), str(workdir)]
    killed_run(command, environment(), workdir, [2, 4, 7], rng)
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_the_demo_killed_twenty_times_ends_the_same(tmp_path):
    rng, steps = random.Random(1), 120
    options = [f"--config.train.steps={steps}", "--config.save.every=10", "--config.log.every=1"]
    config = [sys.executable, "main.py", "--config=configs/demo.py:smoke", *options]
    keep = environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    keep["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    subprocess.run([*config, f"--workdir={whole}"], cwd=ROOT, env=keep, check=True)
    # Over and over the same steps too: a kill may come before the next checkpoint.
    moments = sorted(rng.randint(1, steps - 1) for _ in range(20))
    killed_run([*config, f"--workdir={workdir}"], keep, workdir, moments, rng)
    assert_same_run(workdir, whole)


# Stopped.


def spoiled_step(monkeypatch, at, spoil):
    """From update `at` on, `spoil` changes what goes into a step or comes out of it."""

    def call(self, before, *rest):
        if int(before.step) + 1 < at:
            return original(self, before, *rest)
        return spoil(before, lambda s: original(self, s, *rest))

    original = program.Program.__call__
    monkeypatch.setattr(program.Program, "__call__", call)


def stopped_run(workdir) -> str:
    with pytest.raises(NonFiniteError) as stopped:
        tiny.train(workdir)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_a_loss_that_is_no_number_stops_the_run(whole, tmp_path, monkeypatch):
    workdir = cut(whole, tmp_path / "run", 4)

    def spoil(before, step):
        after, scalars = step(before)
        return after, scalars | {"commitment": np.float32(np.nan), "loss": np.float32(np.nan)}

    spoiled_step(monkeypatch, 6, spoil)
    assert stopped_run(workdir).startswith("step 6: commitment is nan")
    assert checkpoint.Checkpoints(workdir).latest() == 4
    assert max(row["step"] for row in metrics(workdir)) == 5
    monkeypatch.undo()
    tiny.train(workdir)
    assert_same_run(workdir, whole)


def test_parameters_that_are_no_numbers_stop_the_run(whole, tmp_path, monkeypatch):
    workdir = cut(whole, tmp_path / "run", 2)

    def spoil(before, step):
        return step(before.replace(params=jax.tree.map(lambda x: x * np.inf, before.params)))

    spoiled_step(monkeypatch, 3, spoil)
    message = stopped_run(workdir)
    assert message.startswith("step 3: ") and "loss" not in message.split(" is ")[0]
    assert checkpoint.Checkpoints(workdir).latest() == 2


def test_gradients_alone_stop_the_run_too():
    good = {"loss": 1.0, "reconstruction": 0.5}
    with pytest.raises(NonFiniteError, match="step 9: gradient_norm is inf"):
        loop.check_finite(9, good | {"gradient_norm": np.inf})
    loop.check_finite(9, good)


def test_numbers_come_one_step_late_and_none_is_lost():
    late = loop.LateScalars()
    assert late.push(1, {"loss": jax.numpy.float32(1)}) is None
    assert late.push(2, {"loss": jax.numpy.float32(2)}) == (1, {"loss": 1.0})
    assert late.pop() == (2, {"loss": 2.0})
    assert late.pop() is None


# Refused.


def refused(error, workdir, **values) -> str:
    """The one line that a run with other values is refused with."""
    made = tiny.run_config()
    for name, value in values.items():
        *parts, key = name.split("__")
        (made[parts[0]] if parts else made)[key] = value
    with pytest.raises(error) as refused:
        tiny.train(workdir, made)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_run_that_left_nothing_does_not_bind_its_workdir(tmp_path, monkeypatch):
    """Who mends a mistake need not look for another folder."""
    made = tiny.run_config()
    made.optim.clip = 5.0
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no images"):
        patched.setattr(loop, "restore", mock.Mock(side_effect=OSError("no images")))
        tiny.train(tmp_path, made)
    monkeypatch.setattr(loop, "restore", mock.Mock(side_effect=OSError("at last")))
    with pytest.raises(OSError, match="at last"):
        tiny.train(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["clip"] != 5.0


def test_a_workdir_of_another_task_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "extract_codes"}')
    told = refused(ConfigError, tmp_path)
    assert "holds a run of task 'extract_codes', this is 'train_tokenizer'" in told
    (tmp_path / "config.json").write_text('{"task": "extr')
    assert "config.json is damaged" in refused(ConfigError, tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(whole, tmp_path):
    workdir, rows = cut(whole, tmp_path / "run", 4), metrics(whole)
    for step in (2, 4):
        spoil(workdir / "checkpoints" / str(step) / "extras.json", "truncated")
    for _ in range(2):  # the second time they are set aside already
        told = refused(CheckpointError, workdir)
        assert "no whole checkpoint is left" in told and "2.bad, 4.bad are damaged" in told
    assert metrics(workdir) == rows


def test_a_workdir_of_another_config_is_refused(whole):
    message = refused(ConfigError, whole, optim__learning_rate=0.5)
    assert "optim.learning_rate is 0.5 here and 0.001 there" in message


def test_a_checkpoint_of_another_model_lists_what_differs(whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    monkeypatch.setattr(tiny, "ROWS", 64)
    (workdir / "config.json").unlink()
    with pytest.raises(CheckpointError) as refused:
        tiny.train(workdir)
    lines = str(refused.value).splitlines()
    assert "of another model, 4 arrays differ" in lines[0]  # two moments and the average too
    assert (
        "  params/quantizer/codebook: float32[32, 4] in the checkpoint, float32[64, 4] here"
        in lines
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train__global_batch": 6, "train__micro_batches": 4}, "train.global_batch is 6"),
        ({"train__micro_batches": 0}, "train.micro_batches is 0, expected 1 or more"),
        (
            {"train__statistics": "some"},
            "train.statistics is 'some', expected one of global, local",
        ),
        ({"train__dtype": "float16"}, "train.dtype is 'float16'"),
        ({"train__remat": "some"}, "train.remat is 'some', expected one of"),
        ({"train__unroll": "yes"}, "train.unroll is 'yes', expected some of cpu, gpu, tpu"),
        ({"loss__discriminator": "some"}, "loss.discriminator is 'some', expected one of patchgan"),
        ({"loss__adversarial_type": "some"}, "loss.adversarial_type is 'some', expected one of"),
        ({"loss__missing_weights": "some"}, "loss.missing_weights is 'some'"),
        ({"optim__schedule": "some"}, "optim.schedule is 'some', expected one of"),
        ({"optim__decay_mask": "some"}, "optim.decay_mask is 'some', expected one of"),
        ({"model__image_size": 33}, "model.image_size is 33"),
        ({"data__source": "some"}, "data.source is 'some'"),
        ({"save__keep": 0}, "save.keep is 0"),
        ({"train__steps": 0, "train__epochs": 0.0}, "a run of no steps"),
        ({"optim__learning_rate": -1.0}, "optim.learning_rate is -1.0, expected 0 or more"),
        ({"optim__ema": 2.0}, "optim.ema is 2.0, expected 0 to 1"),
        ({"data__workers": -1}, "data.workers is -1"),
        ({"model__codebook_size": 0}, "model.codebook_size is 0, expected at least 1"),
        ({"model__patch_size": 0}, "model.patch_size is 0, expected at least 1"),
        ({"model__stem": "cnn", "model__cnn_channels": 33}, "model.cnn_channels is 33"),
        ({"train__steps": -1}, "train.steps is -1, expected 0 or more"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
        ({"eval__batch": 0}, "eval.batch is 0, expected 1 or more"),
        ({"loss__discriminator": "dino", "train__global_batch": 36}, "36 images at once are not 5"),
        ({"mesh__data": 3}, "does not cover"),
        ({"loss__teacher": "some", "model__align_block": 1, "model__image_size": 128}, "'some'"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, values, message, monkeypatch):
    monkeypatch.setattr(loop, "restore", None)  # before anything is compiled
    assert message in refused(ConfigError, tmp_path, **values)


def test_a_profile_that_cannot_be_read_is_refused():
    for span in ("3", "0:2", "a:b", "2:0"):
        with pytest.raises(ConfigError, match="expected start:count"):
            loop.Profile(span, pathlib.Path())
    assert loop.Profile("", pathlib.Path()) is not None


def test_missing_weights_are_refused_or_left_out(tmp_path, monkeypatch):
    made = tiny.run_config()
    made.loss.update(teacher="dinov2-s", missing_weights="refuse")
    made.model.align_block, made.weights.folder = 1, str(tmp_path)
    made.model.image_size = 16 * made.model.patch_size
    with pytest.raises(MissingWeightsError, match="dinov2_vits14") as refused:
        networks.build(made, 1)
    assert str(tmp_path) in str(refused.value)
    told = []
    monkeypatch.setattr(networks.logging, "warning", lambda text, *a: told.append(text % a))
    made.loss.missing_weights = "skip"
    parts = networks.build(made, 1)
    assert parts.networks.teacher is None and parts.loss.teacher == "none"
    assert told == ["weights of dinov2-s are not here: loss.teacher is left out"]
    assert made.loss.teacher == "dinov2-s"  # the run's own config says what was asked for


def test_a_teacher_that_sees_another_grid_is_refused_or_left_out():
    made = tiny.run_config()
    made.loss.update(teacher="dinov2-s", missing_weights="refuse")
    made.model.update(align_block=1, image_size=8 * made.model.patch_size)
    with pytest.raises(ConfigError, match=r"sees 16x16 tokens, .* px has 8x8: set --config.loss"):
        networks.build(made, 1)
    made.loss.missing_weights = "skip"
    assert networks.build(made, 1).networks.teacher is None


# Images.


def folder_config(folder):
    made = tiny.run_config()
    made.data.update(source="folder", folder=str(folder))
    return made


def write_images(folder, count):
    folder.mkdir()
    for i, image in enumerate(tiny.images(count)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")


def test_no_images_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "no images in"), (tmp_path / "no", "not exist")):
        with pytest.raises(DataError, match=message):
            tiny.train(tmp_path / "run", folder_config(folder))


def test_no_readable_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"this is no picture")
    with pytest.raises(DataError, match=r"none of the \d images can be read, first .*\.png"):
        tiny.train(tmp_path / "run", folder_config(folder))


def test_a_corrupt_file_among_good_ones_is_named_and_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    write_images(folder, 21)
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    told = []
    monkeypatch.setattr(
        training.pipeline.logging, "warning", lambda text, *a: told.append(text % a)
    )
    tiny.train(tmp_path / "run", folder_config(folder))
    (line,) = (line for line in told if "unreadable" in line)
    assert line.startswith("unreadable image 1: 07.png")
    assert results(tmp_path / "run")["step"] == 8
    made = folder_config(folder)
    made.data.max_unreadable = 0
    with pytest.raises(DataError, match="1 unreadable images where 0 are allowed"):
        tiny.train(tmp_path / "other", made)


def test_corrupt_held_out_files_are_counted_too(tmp_path):
    write_images(tmp_path / "images", 8)
    write_images(tmp_path / "held_out", 4)
    for name in ("01.png", "02.png"):
        (tmp_path / "held_out" / name).write_bytes(b"")
    made = folder_config(tmp_path / "images")
    made.data.update(eval_folder=str(tmp_path / "held_out"), eval_images=0, max_unreadable=1)
    with pytest.raises(DataError, match="2 unreadable images where 1 are allowed"):
        tiny.train(tmp_path / "run", made)
