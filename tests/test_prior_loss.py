"""Held-out loss of a prior: every image once, against plain numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_pair

from configs import evaluate as evaluate_config
from gigatok_jax import library, model_config
from gigatok_jax.data import codes, codes_file, sources
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.evaluation import prior_loss
from gigatok_jax.models import ar

MODEL = {"layers": 1, "heads": 2, "width": 16, "vocab": 32, "tokens": 4, "classes": 3}
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 32, (11, 4), dtype=np.int32)
LABELS = RNG.integers(0, 3, 11, dtype=np.int32)


@pytest.fixture(autouse=True, scope="module")
def programs():
    with tiny.small_programs(tiny.session() / "cache"):
        yield


@pytest.fixture(scope="module")
def prior(programs):
    """A prior with random parameters, also in the head that starts at zero."""
    module = ar.make(model_config("prior-B", **MODEL))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1, int), CODES[:1])
    draw = lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32)  # noqa: E731
    return module, jax.tree.map(draw, shapes["params"])


def batches(size):
    """The images in batches of one shape; the padding has codes and labels that cannot be."""
    for start in range(0, len(CODES), size):
        codes, labels = CODES[start : start + size], LABELS[start : start + size]
        room = size - len(codes)
        yield {
            "codes": np.pad(codes, ((0, room), (0, 0))),
            "label": np.pad(labels, (0, room), constant_values=-1),
            "mask": np.arange(size) < len(codes),
        }


@pytest.mark.parametrize("size", [1, 4, 11])
def test_every_image_counts_once_whatever_the_batch(prior, size):
    module, params = prior
    figures = prior_loss.mean_loss(prior_loss.make_losses(module), params, batches(size))
    logits = np.asarray(module.apply({"params": params}, LABELS, CODES), np.float64)
    chosen = np.take_along_axis(logits, CODES[..., None], -1)[..., 0]
    expected = (np.log(np.exp(logits).sum(-1)) - chosen).mean()
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert figures["images"] == 11


def test_an_untrained_head_is_as_good_as_guessing(prior):
    module, params = prior
    params = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    figures = prior_loss.mean_loss(prior_loss.make_losses(module), params, batches(11))
    assert figures["perplexity"] == pytest.approx(32, rel=1e-5)


def test_no_image_is_refused(prior):
    with pytest.raises(DataError, match="no image"):
        prior_loss.mean_loss(prior_loss.make_losses(prior[0]), prior[1], [])


@pytest.mark.parametrize("label", [-1, 3])
def test_an_image_without_a_class_is_of_the_null_class(prior, label):
    module, params = prior
    figure = prior_loss.make_losses(module)(params, np.full(2, label), CODES[:2].astype(np.int16))
    logits = module.apply({"params": params}, np.full(2, 3), CODES[:2])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), CODES[:2, :, None], -1)
    np.testing.assert_allclose(figure, -chosen.mean((1, 2)), rtol=1e-5)


# The task.


@pytest.fixture(scope="module")
def models(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    model, params = tiny_pair.tokenizer()
    tiny_pair.save(folder / "tokenizer", model, params)
    fingerprint = library.load_tokenizer(folder / "tokenizer").fingerprint
    model, params = tiny_pair.prior(classes=10)
    tiny_pair.save(folder / "prior", model, params, step=5, tokenizer=fingerprint)
    write_codes(folder / "codes", folder / "tokenizer")
    return folder


def write_codes(folder, checkpoint, **fields):
    """Codes of the held-out digits, the first row of each record; mirrored ones in the second."""
    tokenizer = library.load_tokenizer(checkpoint)
    source = sources.DigitsSource("held_out", tiny.SIZE)
    images = np.stack([record["image"] for record in source])
    made = np.stack([tokenizer.encode(x) for x in (images, images[:, :, ::-1])], 1)
    fields = {"tokenizer": tokenizer.fingerprint, "tokens": tokenizer.num_tokens} | fields
    header = codes_file.Header(
        model={}, vocab=tiny.ROWS, crops="flip", data="digits", records=len(source),
        class_names=list(source.class_names), **fields,
    )  # fmt: skip
    with codes_file.CodesWriter(folder, header, source.labels) as writer:
        writer.write(made)
        writer.finish()


def evaluate(models, workdir, **values):
    config = evaluate_config.get_config()
    config.update({"checkpoint": f"{models}/prior", "eval": {"batch": 50}} | values)
    prior_loss.evaluate(config, workdir)
    return json.loads((workdir / "results.json").read_text())


def digits(models):
    return {"tokenizer": f"{models}/tokenizer", "data": {"source": "digits"}}


def test_images_and_their_codes_have_the_same_loss(models, tmp_path):
    images = evaluate(models, tmp_path / "images", **digits(models))
    same = evaluate(models, tmp_path / "codes", eval_codes=f"{models}/codes", eval={"batch": 64})
    assert images["images"] == same["images"] == len(sources.DigitsSource("held_out", tiny.SIZE))
    assert images["loss"] == pytest.approx(same["loss"], rel=1e-6)
    assert images["perplexity"] == pytest.approx(np.exp(images["loss"]))
    assert images["step"] == 5


def test_averaged_weights_are_others(models, tmp_path):
    chosen = {"eval_codes": f"{models}/codes"}
    trained = evaluate(models, tmp_path / "raw", weights_kind="raw", **chosen)
    auto = evaluate(models, tmp_path / "auto", **chosen)
    averaged = evaluate(models, tmp_path / "ema", weights_kind="ema", **chosen)
    assert trained["loss"] == auto["loss"] != averaged["loss"]


def test_the_held_out_share_of_a_runs_codes(models, tmp_path):
    results = evaluate(models, tmp_path, codes=f"{models}/codes", data={"eval_images": 30})
    _, source = codes.open_codes(models / "codes", "", 30)
    prior = library.load_prior(models / "prior")
    losses = prior_loss.make_losses(ar.make(prior.config))
    middle = source.codes(np.arange(30), source.middle)
    assert results["loss"] == pytest.approx(losses(prior.params, source.labels, middle).mean())
    assert results["images"] == 30


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"checkpoint": ""}, ConfigError, "checkpoint is empty: name a prior's run"),
        ({}, ConfigError, "tokenizer is empty: name it with"),
        ({"checkpoint": "{}/tokenizer"}, CheckpointError, "holds a tokenizer, expected a prior"),
        ({"eval": {"batch": 0}}, ConfigError, "eval.batch is 0"),
        ({"weights_kind": "best"}, ConfigError, "weights is 'best'"),
        ({"tokenizer": "{}/tokenizer"}, ConfigError, "data.folder is empty"),
        ({"codes": "{}/prior"}, DataError, "holds no codes"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, values, error, message):
    values = {k: v.format(models) if isinstance(v, str) else v for k, v in values.items()}
    with pytest.raises(error, match=message) as refused:
        evaluate(models, tmp_path / "run", **values)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_codes_of_another_tokenizer_are_refused(models, tmp_path):
    write_codes(tmp_path / "codes", models / "tokenizer", tokenizer="0123456789abcdef")
    with pytest.raises(ConfigError, match="this one is 0123456789abcdef"):
        evaluate(models, tmp_path / "run", eval_codes=str(tmp_path / "codes"))


def test_classes_of_other_names_are_refused(models, tmp_path):
    """A folder without one of the classes numbers those behind it anew."""
    trained_on = library.load_prior(models / "prior").trained_on
    names = [*map(str, range(9)), "ten"]
    made = {"tokenizer": trained_on, "class_names": names}
    tiny_pair.save(tmp_path / "prior", *tiny_pair.prior(classes=10), **made)
    with pytest.raises(DataError, match="the 10 classes of the held-out images are not the 10"):
        evaluate(tmp_path, tmp_path / "run", eval_codes=f"{models}/codes")


def test_classes_that_the_prior_does_not_have_are_refused(models, tmp_path):
    trained_on = library.load_prior(models / "prior").trained_on
    tiny_pair.save(tmp_path / "prior", *tiny_pair.prior(classes=5), tokenizer=trained_on)
    with pytest.raises(DataError, match="images of class 9 for a prior of 5 classes"):
        evaluate(tmp_path, tmp_path / "run", eval_codes=f"{models}/codes")
