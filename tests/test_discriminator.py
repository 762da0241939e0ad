"""Facts about the PatchGAN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule import block_images, golden_path, load, pixels, rule_state

from gigatok_jax import errors
from gigatok_jax.conversion import discriminator as convert
from gigatok_jax.models.discriminator import BatchNorm, PatchGAN

STATE = {
    "main.0.weight": (64, 3, 4, 4),
    "main.0.bias": (64,),
    "main.11.weight": (1, 512, 4, 4),
    "main.11.bias": (1,),
}
for i, (before, after) in enumerate([(64, 128), (128, 256), (256, 512)], start=1):
    STATE[f"main.{3 * i - 1}.weight"] = (after, before, 4, 4)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        STATE[f"main.{3 * i}.{leaf}"] = (after,)
    STATE[f"main.{3 * i}.num_batches_tracked"] = ()


def small(**fields):
    return PatchGAN(num_filters=4, **fields)


def images(batch, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(model, x):
    return model.init(jax.random.key(0), x, train=False)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, x):
    return model.apply(variables, x, train=True, mutable=["batch_stats"])


def test_parameter_count_is_the_published_one():
    shapes = jax.eval_shape(lambda: init(PatchGAN(), jnp.zeros((1, 64, 64, 3))))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 2_765_633


def test_weights_go_both_ways_bit_for_bit():
    state = rule_state(STATE.items(), "discriminator.")
    variables = convert.from_torch(state, "patchgan")
    shapes = jax.eval_shape(lambda: init(PatchGAN(), jnp.zeros((1, 64, 64, 3))))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    back = convert.to_torch(variables, "patchgan")
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


def test_missing_tensor_is_named():
    with pytest.raises(errors.CheckpointError, match=r"main\.0\.weight"):
        convert.from_torch({}, "patchgan")


def test_matches_the_original():
    golden, _ = load(golden_path("portable/lpips_patchgan_fwd.npz"))
    state = rule_state(STATE.items(), "discriminator.")
    variables = convert.from_torch(state, "patchgan")
    x = pixels(block_images()[:2])
    logits = PatchGAN().apply(variables, x, train=False)
    expected = golden["logits_eval"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    logits, changed = train(PatchGAN(), variables, x)
    expected = golden["logits_train"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    after = convert.to_torch(variables | changed, "patchgan")
    for name in (n for n in golden if n.startswith("bn_after_")):
        np.testing.assert_allclose(after[name.removeprefix("bn_after_")], golden[name], rtol=1e-4)
    assert after["main.3.num_batches_tracked"] == 1


def test_running_statistics_follow_group_zero():
    x = np.random.default_rng(0).normal(1.0, 2.0, (4, 3, 5, 2)).astype(np.float32)
    norm = BatchNorm(groups=2)
    variables = norm.init(jax.random.key(0), x, train=False)
    _, changed = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    first = x[:2].reshape(-1, 2).astype(np.float64)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * first.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * first.var(0, ddof=1), rtol=1e-5)


def test_groups_equal_separate_batches():
    x = images(4)
    variables = init(small(), x)
    together = train(small(groups=2), variables, x)
    apart = [train(small(), variables, half) for half in np.split(x, 2)]
    np.testing.assert_allclose(together[0], np.concatenate([a[0] for a in apart]), atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        together[1],
        apart[0][1],
    )


def test_groups_equal_separate_batches_in_gradient():
    x = images(4)
    variables = init(small(), x)

    def mean_logit(params, x, groups):
        stats = {"params": params, "batch_stats": variables["batch_stats"]}
        model = small(groups=groups)
        return jnp.mean(model.apply(stats, x, train=True, mutable=["batch_stats"])[0] ** 2)

    grad = jax.jit(jax.grad(mean_logit), static_argnums=2)
    together = grad(variables["params"], x, 2)
    apart = [grad(variables["params"], half, 1) for half in np.split(x, 2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *apart)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), together, mean
    )


def test_normalised_channels_have_mean_bias_and_spread_scale():
    x = np.random.default_rng(1).normal(3.0, 5.0, (4, 6, 6, 3)).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(1), x, train=False)
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), variables["params"]["bias"], atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), variables["params"]["scale"], rtol=1e-4)


def test_one_logit_sees_seventy_pixels():
    x = images(1, 96)
    variables = init(small(), x)
    grad = jax.jit(jax.grad(lambda x: small().apply(variables, x, train=False)[0, 5, 5, 0]))(x)
    seen = np.argwhere(np.abs(np.asarray(grad)).sum((0, 3)) > 0)
    np.testing.assert_array_equal(seen.max(0) - seen.min(0) + 1, [70, 70])


def test_batch_that_groups_do_not_divide_is_refused():
    x = images(3)
    variables = init(small(), x)
    with pytest.raises(errors.ConfigError, match="3 examples for 2 groups"):
        small(groups=2).apply(variables, x, train=True, mutable=["batch_stats"])


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    x = images(2)
    model = small(dtype=jnp.bfloat16)
    variables = init(model, x)
    logits, changed = train(model, variables, x)
    floats = [v for v in jax.tree.leaves((variables, changed)) if v.ndim]
    assert {v.dtype for v in floats} | {logits.dtype} == {jnp.dtype("float32")}
    exact, _ = train(small(), variables, x)
    np.testing.assert_allclose(logits, exact, atol=0.05)
