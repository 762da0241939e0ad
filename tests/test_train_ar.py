"""Runs of a prior: the step as published, exact resuming, cool-downs, what is refused."""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
import tiny
import tiny_pair
from PIL import Image

from configs import common
from configs import extract_codes as extract_config
from gigatok_jax import library
from gigatok_jax.data import codes, sources
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.models import ar
from gigatok_jax.run import checkpoint
from gigatok_jax.train import ar as training
from gigatok_jax.train import ar_step, extract_codes, optim, program
from gigatok_jax.train import cooldown as branching

STEPS = 8


@pytest.fixture(autouse=True, scope="module")
def programs():
    with tiny.small_programs(tiny.session() / "cache"):
        yield


@functools.cache
def tokenizer() -> pathlib.Path:
    tiny_pair.save(tiny.session() / "tokenizer", *tiny_pair.tokenizer())
    return tiny.session() / "tokenizer"


@functools.cache
def extracted(split: str, crops: str) -> pathlib.Path:
    """Codes of the digits."""
    made, folder = extract_config.get_config(), tiny.session() / f"codes_{split}_{crops}"
    made.update(checkpoint=str(tokenizer()), split=split, crops=crops, batch=512)
    made.data.source = "digits"
    extract_codes.extract(made, folder)
    return folder


def model_fields() -> dict:
    small = {"layers": 2, "heads": 2, "kv_heads": 2, "width": 16, "classes": 10}
    return small | {"vocab": tiny.ROWS, "tokens": tiny_pair.TOKENS}


def config(**changes):
    """Eight steps on 129 images; 50 are held out, which batches of 48 do not divide."""
    made = common.prior("tiny_prior", "prior-B")
    made.model.update(model_fields())
    made.codes, made.tokenizer = str(extracted("held_out", "flip")), str(tokenizer())
    made.data.update(eval_images=50, source="digits", workers=0)
    made.train.update(steps=STEPS, global_batch=8, dtype="float32")
    made.optim.update(learning_rate=1e-2, warmup_epochs=0.0, ema=0.9)
    made.sample.update(classes=3, images=2)
    made.save.update(every=2, keep=9, milestone_every=0)
    made.eval.update(every=4, batch=48)
    made.log.update(every=1, pictures_every=4)
    return changed(made, **changes)


def changed(made, **changes):
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            made[part][key] = value
        else:
            made[part] = value
    return made


@functools.cache
def finished_run() -> pathlib.Path:
    training.train(config(), tiny.session() / "prior")
    return tiny.session() / "prior"


@pytest.fixture
def whole():
    return finished_run()


arrays, metrics, cut = test_train.arrays, test_train.metrics, test_train.cut
assert_same_run = test_train.assert_same_run


# A run.


def test_a_run_leaves_everything_behind(whole):
    for name in ("config.json", "environment.json", "results.json", "index.html"):
        assert (whole / name).stat().st_size > 0, name
    assert {int(folder.name) for folder in (whole / "checkpoints").iterdir()} == {2, 4, 6, 8}
    found = {path.name for path in (whole / "pictures").glob("*.png")}
    assert found == {"samples_00000004.png", "samples_00000008.png"}
    read = json.loads((whole / "results.json").read_text())
    assert (read["step"], read["images"]) == (STEPS, 50)
    assert {"loss", "loss_ema", "seconds", "useful_share"} <= set(read)
    loaded = library.load_prior(whole)
    assert (loaded.step, loaded.trained_on) == (
        STEPS,
        library.load_tokenizer(tokenizer()).fingerprint,
    )
    _, extras = checkpoint.load_params(whole, ())
    assert extras["class_names"] == list("0123456789")


def test_a_sample_picture_has_a_row_for_each_class(whole):
    tile, gap = 96, 8  # of `pictures`
    with Image.open(whole / "pictures/samples_00000008.png") as picture:
        assert picture.size == (2 * (tile + gap) + gap, 3 * (tile + gap) + gap)


def test_all_codes_are_equally_likely_at_first(whole):
    first = next(row for row in metrics(whole) if "train/loss" in row)
    assert first["step"] == 1
    assert first["train/loss"] == pytest.approx(np.log(tiny.ROWS), rel=1e-5)


def test_it_learns(whole):
    losses = [row["train/loss"] for row in metrics(whole) if "train/loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1


def test_held_out_loss_counts_every_image_once(whole):
    trees, _ = checkpoint.load_params(whole, ("params", "ema_params"))
    _, held_out = codes.open_codes(extracted("held_out", "flip"), "", 50)
    made = held_out.codes(np.arange(50), 0).astype(np.int32)
    module, read = ar.make(config().model), json.loads((whole / "results.json").read_text())
    for name, key in (("params", "loss"), ("ema_params", "loss_ema")):
        logits = module.apply({"params": trees[name]}, held_out.labels, made)
        logits = np.asarray(logits, np.float64)
        chosen = np.take_along_axis(logits, made[..., None], -1)[..., 0]
        nats = np.log(np.exp(logits).sum(-1)) - chosen
        assert read[key] == pytest.approx(nats.mean(), rel=1e-5)


def test_images_and_their_codes_give_the_same_losses(tmp_path):
    images = {"codes": "", "data__crop": "center", "data__flip": False, "data__eval_images": 0}
    training.train(config(**images), tmp_path / "images")
    both = {"codes": str(extracted("train", "center"))}
    both |= {"eval_codes": str(extracted("held_out", "center"))}
    training.train(config(**both), tmp_path / "codes")
    for ours, theirs in zip(*(metrics(tmp_path / n) for n in ("images", "codes")), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=2e-5), name
    assert ours["eval/images"] == len(sources.DigitsSource("held_out", tiny.SIZE))


def test_without_a_tokenizer_there_are_no_pictures(tmp_path, capsys):
    training.train(config(tokenizer=""), tmp_path)
    assert "no pictures of samples" in capsys.readouterr().out
    assert not list(tmp_path.glob("pictures/*"))


def test_an_untrained_tokenizer_says_so(capsys):
    made = training.load_tokenizer(config(codes="", tokenizer="untrained"), mesh())
    assert "untrained, its codes mean nothing" in capsys.readouterr().out
    assert (made.num_tokens, made.config.codebook_size) == (tiny_pair.TOKENS, tiny.ROWS)


def mesh():
    return training.parallel.make_mesh(config().mesh)


# The step.


def state_and_batch(made, seed=0):
    """A state of random parameters, and a batch."""
    rng = np.random.default_rng(seed)
    optimizer = optim.make_optimizer(made.optim, training.is_decayed)
    plain = ar.make(made.model)
    shapes = jax.eval_shape(lambda: ar_step.create(plain, optimizer, 0))

    def fill(tree):
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)

    params = fill(shapes.params)
    state = ar_step.PriorState(
        jnp.int32(0), jax.random.key(0), params, fill(shapes.params), optimizer.init(params)
    )
    labels = rng.integers(0, 10, 8).astype(np.int32)
    drawn = rng.integers(0, tiny.ROWS, (8, tiny_pair.TOKENS)).astype(np.int16)
    return state, {"label": labels, "codes": drawn}, optimizer


def nats(params, module, batch):
    """Mean cross-entropy, by hand."""
    codes = batch["codes"].astype(np.int32)
    logits = module.apply({"params": params}, batch["label"], codes)
    chosen = (jax.nn.log_softmax(logits) * jax.nn.one_hot(codes, tiny.ROWS)).sum(-1)
    return -chosen.mean()


def test_an_update_is_the_published_one():
    made = config()
    state, batch, optimizer = state_and_batch(made)
    module, rate = ar.make(made.model), 0.01
    before = jax.device_get(state)  # the step takes its buffers
    expected, grads = jax.jit(jax.value_and_grad(lambda p: nats(p, module, batch)))(before.params)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(grads)))
    assert norm > 1.5  # so that the clip at 1 is seen
    step = ar_step.make(module, optimizer, lambda _: jnp.float32(rate), 0.9, None)
    after, scalars = step(state, batch, {})
    assert scalars["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert scalars["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert int(after.step) == 1
    leaves = jax.tree_util.tree_flatten_with_path(before.params)[0]
    for (keys, old), grad, new, ema, average in zip(
        leaves,
        *(jax.tree.leaves(t) for t in (grads, after.params, before.ema_params, after.ema_params)),
        strict=True,
    ):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        grad = np.asarray(grad, np.float64) / norm
        # The first step of Adam is the sign of the gradient, up to epsilon.
        update = grad / (np.abs(grad) + 1e-8) + 0.05 * old * ("norm" not in path)
        sure = np.abs(grad) > 1e-5
        np.testing.assert_allclose(
            np.asarray(new)[sure], (old - rate * update)[sure], rtol=0, atol=1e-5, err_msg=path
        )
        np.testing.assert_allclose(average, 0.9 * ema + 0.1 * np.asarray(new), atol=1e-6)
    assert {path for path in (jax.tree_util.keystr(k) for k, _ in leaves) if "norm" in path}


def test_micro_batches_add_up():
    made = config()
    state, batch, _ = state_and_batch(made, seed=1)
    module = ar.make(made.model)
    gradients = jax.jit(ar_step.gradients, static_argnums=(3, 4, 5))
    loss, grads = gradients(state, batch, {}, module, None, 1)
    parts_loss, parts = gradients(state, batch, {}, module, None, 4)
    assert parts_loss == pytest.approx(float(loss), rel=1e-5)
    for ours, whole in zip(jax.tree.leaves(parts), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(ours - whole) < 1e-3 * np.linalg.norm(whole)


def test_dropouts_are_those_of_the_config(tmp_path, monkeypatch):
    seen = []

    def make(model, dtype, **options):
        seen.append(options.get("dropouts"))
        raise KeyboardInterrupt

    monkeypatch.setattr(training.ar, "make", make)
    values = {"dropout": 0.2, "token_dropout": 0.3, "class_dropout": 0.4, "drop_path": 0.5}
    with pytest.raises(KeyboardInterrupt):
        made = config(**{f"train__{name}": value for name, value in values.items()})
        training.train(made, tmp_path)
    assert seen == [ar.Dropouts(token=0.3, residual=0.2, condition=0.4, path=0.5)]


# Resumed.


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, step):
    workdir = cut(whole, tmp_path / "run", step)
    training.train(config(), workdir)
    assert_same_run(workdir, whole)


def test_a_finished_run_has_nothing_to_do(whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    training.train(config(), workdir)
    assert "step 8 of 8" in capsys.readouterr().out
    assert_same_run(workdir, whole)


def test_a_signal_saves_and_the_run_resumes(whole, tmp_path, monkeypatch, capsys):
    workdir, call = cut(whole, tmp_path / "run", 4), program.Program.__call__

    def interrupted(self, state, batch):
        if int(state.step) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, state, batch)

    monkeypatch.setattr(program.Program, "__call__", interrupted)
    with pytest.raises(SystemExit) as ended:
        training.train(config(), workdir)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped at step 5 of 8" in capsys.readouterr().out
    monkeypatch.undo()
    training.train(config(), workdir)
    assert_same_run(workdir, whole)


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import test_train_ar as t, tiny

cache, codes, tokenizer, workdir = sys.argv[1:]
t.extracted, t.tokenizer = lambda *_: codes, lambda: tokenizer
with tiny.small_programs(cache):
    t.training.train(t.config(), workdir)
"""


def killed(workdir, moments, rng):
    paths = (tiny.session() / "cache", extracted("held_out", "flip"), tokenizer(), workdir)
    command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    test_train.killed_run(command, test_train.environment(), workdir, moments, rng)


def test_a_run_killed_at_random_moments_ends_the_same(whole, tmp_path):
    killed(tmp_path / "run", [3, 6], random.Random(0))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_two_devices_train_alike(whole, tmp_path):
    paths = (tiny.session() / "cache", extracted("held_out", "flip"), tokenizer(), tmp_path)
    two = test_train.environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    subprocess.run(command, cwd=test_train.ROOT, env=two, check=True)
    assert "2" in str(json.loads((tmp_path / "environment.json").read_text())["devices"])
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_the_same(whole, tmp_path):
    rng = random.Random(1)
    killed(tmp_path / "run", sorted(rng.randint(1, STEPS - 1) for _ in range(10)), rng)
    assert_same_run(tmp_path / "run", whole)


def test_codes_of_another_tokenizer_do_not_resume_a_run(whole, tmp_path):
    workdir = cut(whole, tmp_path / "run", 4)
    for path in workdir.glob("checkpoints/*/extras.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "0" * 16}))
        sums = path.parent / "CHECKSUMS.json"
        sums.write_text(json.dumps(checkpoint.checksums(path.parent)))
    message = refused(CheckpointError, workdir)
    assert "learned codes of tokenizer 0000000000000000" in message


# Cool-down.


def tree(folder) -> dict[str, tuple]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


@functools.cache
def constant_run() -> pathlib.Path:
    """Constant up to step 4; its folder goes on to 6."""
    made = config(optim__schedule="constant", train__steps=6, log__pictures_every=0)
    training.train(made, tiny.session() / "constant")
    return tiny.session() / "constant"


def cooldown(source="checkpoints/4", **changes):
    changes = {"cooldown_from": str(constant_run() / source), "log__pictures_every": 0} | changes
    return config(**changes)


@functools.cache
def cooled_run() -> pathlib.Path:
    training.train(cooldown(), tiny.session() / "cooled")
    return tiny.session() / "cooled"


@functools.cache
def planned_run() -> pathlib.Path:
    made = config(optim__wsd_decay_fraction=0.5, log__pictures_every=0)
    training.train(made, tiny.session() / "planned")
    return tiny.session() / "planned"


def test_a_cool_down_is_the_end_of_a_run_that_was_planned_so():
    before = tree(constant_run())
    cooled = cooled_run()
    assert tree(constant_run()) == before
    ours, expected = arrays(cooled), arrays(planned_run())
    assert [p for p in expected if not np.array_equal(ours[p], expected[p])] == []
    later = [row for row in metrics(planned_run()) if row["step"] > 4]
    assert metrics(cooled) == later
    rates = [row["train/learning_rate"] for row in later if "train/loss" in row]
    # Updates 5 to 8 follow 4 to 7; each runs at the rate that was set after the one before it.
    share = np.maximum(np.arange(4) - 1, 0) / 4
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.sqrt(share)), rtol=1e-6)


@pytest.mark.parametrize("left", [4, None])  # checkpoints of the cool-down; 4 is its first state
def test_a_cool_down_resumes(tmp_path, left):
    made, workdir = cooldown(), cut(cooled_run(), tmp_path / "run", left or 0)
    home = constant_run()
    if left:  # the run that it branched off from may go
        home = home.rename(tmp_path / "away")
    try:
        training.train(made, workdir)
    finally:
        home.rename(constant_run())
    ours, expected = arrays(workdir), arrays(cooled_run())
    assert [p for p in expected if not np.array_equal(ours[p], expected[p])] == []
    assert metrics(workdir) == metrics(cooled_run())


def test_the_newest_checkpoint_is_meant_when_none_is_named(tmp_path):
    found = branching.find_branch(cooldown(source=""), tmp_path, fingerprint())
    assert found == {"checkpoint": str(constant_run() / "checkpoints/6"), "step": 6}


def test_cool_downs_that_cannot_be_are_refused(tmp_path):
    def message(error, **changes):
        return refused(error, tmp_path / "run", made=cooldown(**changes))

    assert "train.steps is 4, checkpoint " in message(ConfigError, train__steps=4)
    assert "of another model: width 16 not 32" in message(CheckpointError, model__width=32)
    assert "does not exist" in message(CheckpointError, source="nothing")
    decayed = "is not in a constant phase: its learning rate is"
    for path in (cooled_run(), planned_run()):
        assert decayed in message(CheckpointError, cooldown_from=str(path), train__steps=20)
    assert not (tmp_path / "run").exists()  # so that the values can be put right
    # The planned run before its decay is as good as a constant one.
    before = cooldown(cooldown_from=str(planned_run() / "checkpoints/4"))
    assert branching.find_branch(before, tmp_path, fingerprint())["step"] == 4


def fingerprint() -> str:
    return library.load_tokenizer(tokenizer()).fingerprint


# Refused.


def refused(error, workdir, made=None, **changes) -> str:
    """The one line that a run is refused with."""
    with pytest.raises(error) as stopped:
        training.train(made or config(**changes), workdir)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": "", "tokenizer": ""}, "nothing to learn from"),
        ({"train__dtype": "float16"}, "train.dtype is 'float16'"),
        ({"train__remat": "some"}, "train.remat is 'some'"),
        ({"train__unroll": "gpu,xpu"}, "train.unroll is 'gpu,xpu', expected some of"),
        ({"train__dropout": 1.0}, "train.dropout is 1.0"),
        ({"train__class_dropout": -0.1}, "train.class_dropout is -0.1"),
        ({"train__global_batch": 6, "train__micro_batches": 4}, "train.global_batch is 6"),
        ({"eval__batch": 0}, "eval.batch is 0"),
        ({"model__width": 15}, "model.width is 15"),
        ({"model__vocab": 64}, f"model.vocab is 64, the codes have {tiny.ROWS}: set"),
        ({"model__tokens": 4}, "model.tokens is 4, the codes have 16: set --config.model.tokens"),
        ({"model__classes": 9}, "labels up to 9: set --config.model.classes=10"),
        ({"optim__schedule": "some"}, "optim.schedule is 'some'"),
        ({"seed": -1}, "seed is -1"),
        ({"mesh__data": 3}, "does not cover"),
        ({"cfg__scale": 0.5}, "guidance scale is 0.5"),
        ({"sample__top_p": 2.0}, "top_p is 2.0"),
        ({"sample__images": 0}, "sample.images is 0"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(training, "loop", None)  # before anything is trained
    assert message in refused(ConfigError, tmp_path, **changes)


def test_vocabularies_are_compared_for_images_too(tmp_path):
    message = refused(ConfigError, tmp_path, codes="", model__vocab=64)
    assert f"model.vocab is 64, the codes have {tiny.ROWS}" in message


def test_codes_of_another_tokenizer_are_refused(tmp_path):
    tiny_pair.save(tmp_path / "other", *tiny_pair.tokenizer(seed=1))
    message = refused(DataError, tmp_path / "run", tokenizer=str(tmp_path / "other"))
    other = library.load_tokenizer(tmp_path / "other").fingerprint
    assert f"holds codes of tokenizer {fingerprint()}" in message and f"is {other}" in message


def folder_of(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(path / name)
    return str(path)


def test_images_without_a_class_are_refused(tmp_path):
    folder = folder_of(tmp_path / "images", ["a.png", "b.png", "c/d.png"])
    changes = {"data__folder": folder, "data__eval_folder": folder}
    message = refused(DataError, tmp_path / "run", codes="", **changes)
    assert message.startswith("2 of 3 images have no class")


def test_held_out_images_of_other_classes_are_refused(tmp_path):
    changes = {
        "data__folder": folder_of(tmp_path / "images", ["a/1.png", "b/1.png"]),
        "data__eval_folder": folder_of(tmp_path / "held_out", ["b/2.png"]),
    }
    message = refused(DataError, tmp_path / "run", codes="", **changes)
    assert "the 1 classes of the held-out images are not the 2 that are trained on" in message


def test_fewer_classes_than_the_models_are_refused(tmp_path):
    names = ["a/1.png", "b/1.png", "a/2.png", "b/2.png"]
    folders = [folder_of(tmp_path / name, names) for name in ("images", "held_out")]
    changes = dict(zip(("data__folder", "data__eval_folder"), folders, strict=True))
    message = refused(ConfigError, tmp_path / "run", codes="", **changes)
    assert "the images have 2 classes: set --config.model.classes=2" in message
