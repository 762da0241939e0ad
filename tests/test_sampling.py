"""Guidance, filters, draws, and whole generations beside the original's."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule import golden_path, load, rule_state

from gigatok_jax import Prior, model_config, sampling
from gigatok_jax.conversion import ar as convert
from gigatok_jax.errors import ConfigError, DataError
from gigatok_jax.models import ar, ar_decoding

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {"layers": 3, "heads": 4, "width": 256, "vocab": 512, "tokens": 64, "classes": 10}
OPTIONS = {
    "default": {},
    "adaLN": {"adaln": "full"},
    "simple_adaLN": {"adaln": "shared"},
    "qknorm": {"qk_norm": True},
}


@functools.cache
def rule_prior(**fields):
    """A prior with weights by rule."""
    model = model_config("prior-B", **fields)
    module = ar.make(model)
    ids, codes = jnp.zeros(1, jnp.int32), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, codes)["params"])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    state = rule_state((name, x.shape) for name, x in convert.to_torch(zeros, model).items())
    return Prior(convert.from_torch(state, model), model)


@functools.cache
def random_prior(**fields):
    """A small prior with large random weights: its codes depend on everything."""
    small = {"layers": 2, "heads": 2, "width": 32, "vocab": 50, "tokens": 8, "classes": 4}
    model = model_config("prior-B", **small | fields)
    module = ar.make(model)
    ids, codes = jnp.zeros(1, jnp.int32), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, codes)["params"])
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3  # noqa: E731
    return Prior(jax.tree.map(draw, shapes), model)


def guidance(run):
    """Settings of `generate` for a run as a golden's meta describes it."""
    window = run.get("cfg_schedule_kwargs", {})
    return {
        "cfg_scale": run["cfg_scale"],
        "cfg_schedule": run.get("cfg_schedule", "constant"),
        "cfg_start": window.get("window_start", 0.0),
        "cfg_end": window.get("window_end", 1.0),
        "cfg_interval": run.get("cfg_interval", -1),
    }


def check_tokens(codes, tokens, gap):
    """Equal up to the first step whose two best logits nearly tie."""
    for ours, theirs, gaps in zip(np.asarray(codes), tokens, gap, strict=True):
        ties = np.flatnonzero(gaps < 1e-3)
        end = ties[0] if ties.size else len(theirs)
        assert end > 0
        np.testing.assert_array_equal(ours[:end], theirs[:end])


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_generation_is_the_originals(option):
    arrays, meta = load(golden_path(f"gpt_gen_small_{option}.npz"))
    prior = rule_prior(**SMALL, **OPTIONS[option])
    for name, run in meta["runs"].items():
        codes = prior.generate(arrays["cond"], temperature=0, **guidance(run))
        check_tokens(codes, arrays[f"{name}_tokens"], arrays[f"{name}_gap"])


@pytest.mark.parametrize("option", OPTIONS)
def test_guided_logits_are_the_originals(option):
    """The first four steps under guidance, fed with the original's codes."""
    arrays, meta = load(golden_path(f"gpt_gen_small_{option}.npz"))
    prior = rule_prior(**SMALL, **OPTIONS[option])
    run = guidance(meta["runs"]["const"])
    weight = sampling.weights(64, run["cfg_scale"])
    rows = np.stack([arrays["cond"], np.full(2, 10)], 1).reshape(-1)
    module = ar.make(prior.config)
    cache = ar_decoding.empty_cache(module, 4)
    logits, cache = ar_decoding.prefill(module, prior.params, rows, cache)
    for t in range(4):
        if t:
            codes = np.repeat(arrays["const_tokens"][:, t - 1], 2)
            place = ar.Place(jnp.int32(t), 8)
            logits, cache = ar_decoding.decode_step(module, prior.params, codes, cache, place)
        guided = sampling.guide(logits, weight[t])
        np.testing.assert_allclose(guided, arrays["const_logits4"][:, t], atol=1e-3)


@pytest.mark.goldens
@pytest.mark.parametrize("tokens", [64, 256])
def test_full_size_generation_is_the_originals(tokens):
    arrays, meta = load(golden_path(f"gpt_gen_B_{tokens}.npz"))
    whole = rule_prior()
    # A table cut after `tokens` positions is the original asked for fewer new tokens.
    cut = dict(whole.params, positions=whole.params["positions"][: tokens + 1])
    prior = Prior(cut, model_config("prior-B", tokens=tokens))
    for name, run in meta["runs"].items():
        codes = prior.generate(arrays["cond"], temperature=0, **guidance(run))
        check_tokens(codes, arrays[f"{name}_tokens"], arrays[f"{name}_gap"])


def test_filters_keep_what_the_original_keeps():
    arrays, _ = load(golden_path("gpt_topk_topp.npz"))
    logits = jnp.asarray(arrays["logits"])
    names = [name for name in arrays if name.startswith("keep_")]
    assert len(names) == 8
    for name in names:
        k, p = name.removeprefix("keep_k").split("_p")
        kept = np.isfinite(sampling.filtered(logits, jnp.int32(int(k)), jnp.float32(float(p))))
        np.testing.assert_array_equal(kept, arrays[name], err_msg=name)
    left = sampling.filtered(logits / 0.7, jnp.int32(50), jnp.float32(0.8))
    probabilities = jax.nn.softmax(left)
    np.testing.assert_allclose(probabilities, arrays["probs_t0.7_k50_p0.8"], atol=1e-6)


def test_top_k_keeps_ties_and_top_p_the_code_that_crosses():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.15, 0.05]]))

    def kept(k, p):
        return np.isfinite(sampling.filtered(logits, jnp.int32(k), jnp.float32(p)))[0].tolist()

    assert kept(2, 1.0) == [True, True, True, False, False]
    assert kept(0, 0.5) == [True, True, True, False, False]
    assert kept(0, 0.85) == [True, True, True, True, False]
    assert kept(0, 1e-9) == [True, False, False, False, False]
    assert kept(9, 1.0) == [True] * 5


def test_weights_over_positions():
    assert sampling.weights(5, 1.0, "step").tolist() == [1] * 5
    # The first code has the whole scale; the others are at 1/4, 2/4, 3/4 and 1.
    expected = {
        "constant": [3, 3, 3, 3, 3],
        "linear": [3, 1.5001, 2.0001, 2.5001, 3.0001],
        "linear_re": [3, 2.5001, 2.0001, 1.5001, 1.0001],
        "triangular": [3, 2.0001, 3.0001, 2.0001, 1.0001],
        "cosine": [3, 2 + 0.5**0.5, 2, 2 - 0.5**0.5, 1],
        "step": [3, 1.0001, 3, 3, 1.0001],
        "rectangular": [3, 1.0001, 3, 3, 1.0001],
    }
    assert set(expected) == set(sampling.SCHEDULES)
    for name, values in expected.items():
        found = sampling.weights(5, 3.0, name, start=0.3, end=0.8)
        np.testing.assert_allclose(found, values, rtol=1e-6, err_msg=name)
    assert sampling.weights(5, 3.0, interval=1).tolist() == [3, 3, 3, 1, 1]


def test_scale_one_is_no_guidance():
    """The doubled batch at weight 1 gives what the undoubled one gives."""
    prior = random_prior()
    ids = np.arange(4, dtype=np.int32)
    settings, weight = sampling.make_draw(), np.ones(8, np.float32)
    run = functools.partial(
        sampling.generate,
        ar.make(prior.config), prior.params, ids, ids, jax.random.key(0), weight, settings,
        filters=False,
    )  # fmt: skip
    np.testing.assert_array_equal(run(guided=True), run(guided=False))


def test_guidance_moves_away_from_the_null_class():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    given, null = logits[0::2], logits[1::2]
    np.testing.assert_allclose(sampling.guide(logits, jnp.float32(0)), null, rtol=1e-6)
    np.testing.assert_array_equal(sampling.guide(logits, jnp.float32(1)), given)
    doubled = sampling.guide(logits, jnp.float32(2))
    np.testing.assert_allclose(doubled, 2 * given - null, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 3)])
def test_draws_follow_the_softmax(temperature, top_k):
    count, logits = 20_000, np.random.default_rng(1).normal(size=6) * 1.5
    keys = jax.random.split(jax.random.key(0), count)
    settings = sampling.make_draw(temperature, top_k)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    codes = sampling.draw(rows, keys, jnp.int32(3), settings, filters=top_k > 0)
    expected = np.exp(logits / temperature)
    expected *= logits >= np.sort(logits)[-top_k] if top_k else 1.0
    expected /= expected.sum()
    found = np.bincount(codes, minlength=6) / count
    # Five deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_a_draw_depends_on_seed_image_and_position_alone():
    prior = random_prior()
    ids = np.array([7, 3, 11])
    codes = np.asarray(prior.generate([1, 2, 3], image_ids=ids, seed=5))
    alone = np.asarray(prior.generate([2], image_ids=[3], seed=5))
    np.testing.assert_array_equal(codes[1:2], alone)
    assert (np.asarray(prior.generate([2], image_ids=[3], seed=6)) != alone).any()
    assert (np.asarray(prior.generate([2], image_ids=[4], seed=5)) != alone).any()


def test_every_code_is_what_the_whole_sequence_gives():
    """Across segments of the cache: each greedy code is the argmax of a full pass."""
    prior = random_prior(tokens=sampling.SEGMENT + 6)
    ids = np.array([0, 3])
    codes = prior.generate(ids, cfg_scale=1, temperature=0)
    logits = ar.make(prior.config).apply({"params": prior.params}, ids, codes)
    np.testing.assert_array_equal(codes, logits.argmax(-1))


MESHES = """
import sys
sys.path[:0] = ["tests", "."]
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import ml_collections
from test_sampling import random_prior
from gigatok_jax import Prior, parallel

def spread(mesh, x):
    axes = [None] * x.ndim
    if x.ndim > 1 and x.shape[-1] % mesh.shape["tensor"] == 0:
        axes[-1] = "tensor"
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

made = random_prior()
ids = np.arange(64)
run = lambda prior, ids: np.asarray(prior.generate(ids % 4, image_ids=ids, seed=3, top_k=20))
whole = run(made, ids)
for batch in (8, 16):
    parts = [run(made, ids[i : i + batch]) for i in range(0, 64, batch)]
    assert (np.concatenate(parts) == whole).all(), batch
for data, tensor in ((1, 1), (8, 1), (4, 2), (2, 4)):
    config = ml_collections.ConfigDict({"data": data, "fsdp": 1, "tensor": tensor})
    mesh = parallel.make_mesh(config, jax.devices()[: data * tensor])
    prior = Prior(jax.tree.map(lambda x: spread(mesh, x), made.params), made.config)
    codes = prior.generate(ids % 4, image_ids=ids, seed=3, top_k=20)
    assert (np.asarray(codes) == whole).all(), (data, tensor)
print("same")
"""


def test_codes_are_the_same_for_any_batch_and_mesh():
    """64 images: batches 8, 16, 64; eight devices as 1x1, 8x1, 4x2 and 2x4 of data and tensor."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MESHES]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"cfg_scale": 0.5}, "guidance scale is 0.5, expected 1"),
        ({"cfg_schedule": "sigmoid"}, "guidance schedule is 'sigmoid', expected one of"),
        ({"cfg_start": -0.1}, "guidance window is -0.1 to 1.0"),
        ({"cfg_start": 0.8, "cfg_end": 0.2}, "guidance window is 0.8 to 0.2"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        random_prior().generate([0], **settings)


@pytest.mark.parametrize(
    ("class_ids", "image_ids", "words"),
    [
        ([5], None, "class id 5 is outside 0 to 4"),
        ([0.5], None, "expected a list of integers"),
        ([0, 1], [3], "1 image ids for 2 class ids"),
        ([0], [-1], "image id -1 is outside"),
    ],
)
def test_ids_that_cannot_be_are_refused(class_ids, image_ids, words):
    with pytest.raises(DataError, match=words):
        random_prior().generate(class_ids, image_ids=image_ids)
