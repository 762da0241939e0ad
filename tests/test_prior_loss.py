"""Held-out loss of a prior: every image once, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import model_config
from gigatok_jax.errors import DataError
from gigatok_jax.evaluation import prior_loss
from gigatok_jax.models import ar

MODEL = {"layers": 1, "heads": 2, "width": 16, "vocab": 32, "tokens": 4, "classes": 3}
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 32, (11, 4), dtype=np.int32)
LABELS = RNG.integers(0, 3, 11, dtype=np.int32)


@pytest.fixture(scope="module")
def prior():
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
