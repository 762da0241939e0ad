"""Facts about the PatchGAN and the DINO discriminator."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rule import block_images, golden_path, load, pixels, rule_state, shared_path

from gigatok_jax import errors
from gigatok_jax.models import dino, discriminator
from gigatok_jax.models.discriminator import BatchNorm, DinoDiscriminator, LocalNorm, PatchGAN
from gigatok_jax.weights import discriminator_names as convert
from gigatok_jax.weights import frozen_names

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


def published_shapes():
    x = jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(lambda: PatchGAN().init(jax.random.key(0), x, train=False))


def drawn(model, size=32, **flags):
    """Random variables of a module; drawn in numpy, as compiling the initialisers is slow."""
    rng, x = np.random.default_rng(0), jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **flags))

    def draw(path, leaf):
        if path[-1].key in ("var", "count"):
            return np.ones(leaf.shape, leaf.dtype)
        deviation = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.normal(0, deviation, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def small_variables():
    return drawn(small(), train=False)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, x):
    return model.apply(variables, x, train=True, mutable=["batch_stats"])


def test_parameter_count_is_the_published_one():
    shapes = published_shapes()
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 2_765_633


def test_one_example_is_enough_to_initialise_groups():
    x, model = jnp.zeros((1, 32, 32, 3)), small(groups=4)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(np.shape, small_variables())


def test_weights_go_both_ways_bit_for_bit():
    state = rule_state(STATE.items(), "discriminator.")
    variables = convert.from_torch(state, "patchgan")
    shapes = published_shapes()
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
    x, variables = images(4), small_variables()

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, groups):
        def loss(params):
            logits, changed = train(small(groups=groups), variables | {"params": params}, x)
            return jnp.mean(logits**2), (logits, changed)

        return jax.grad(loss, has_aux=True)(params)

    def close(a, b, rtol):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)

    grad, (logits, changed) = run(variables["params"], x, 2)
    halves = [run(variables["params"], half, 1) for half in np.split(x, 2)]
    close(logits, np.concatenate([half[1][0] for half in halves]), 1e-4)
    jax.tree.map(functools.partial(close, rtol=1e-4), changed, halves[0][1][1])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][0], halves[1][0])
    jax.tree.map(functools.partial(close, rtol=1e-3), grad, mean)


def test_normalised_channels_have_mean_bias_and_spread_scale():
    x = np.random.default_rng(1).normal(3.0, 5.0, (4, 6, 6, 3)).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(1), x, train=False)
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), variables["params"]["bias"], atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), variables["params"]["scale"], rtol=1e-4)


def test_one_logit_sees_seventy_pixels():
    x = images(1, 96)
    variables = small_variables()
    grad = jax.jit(jax.grad(lambda x: small().apply(variables, x, train=False)[0, 5, 5, 0]))(x)
    seen = np.argwhere(np.abs(np.asarray(grad)).sum((0, 3)) > 0)
    np.testing.assert_array_equal(seen.max(0) - seen.min(0) + 1, [70, 70])


def test_batch_that_groups_do_not_divide_is_refused():
    with pytest.raises(errors.ConfigError, match="3 examples for 2 groups"):
        discriminator.grouped_norm(images(3), groups=2, eps=1e-5)


def test_bfloat16_keeps_statistics_and_logits_in_float32():
    x, variables = images(2), small_variables()
    logits, changed = train(small(dtype=jnp.bfloat16), variables, x)
    floats = [v for v in jax.tree.leaves(changed) if v.ndim]
    assert {v.dtype for v in floats} | {logits.dtype} == {jnp.dtype("float32")}
    exact, _ = train(small(), variables, x)
    np.testing.assert_allclose(logits, exact, atol=0.05)


# DINO discriminator

SMALL = DinoDiscriminator(width=16, heads=2, depth=2, taps=(0, 1), size=32, kernel=3)


@functools.cache
def small_dino():
    """Variables of `SMALL` with a random trunk."""
    trunk = dino.DINO(width=16, heads=2, depth=2, taps=(0, 1))
    return drawn(SMALL, train=True) | {"trunk": drawn(trunk)["params"]}


@functools.partial(jax.jit, static_argnames="train")
def judge(variables, x, key=None, *, train=True):
    rngs = {} if key is None else {"augment": key}
    return SMALL.apply(variables, x, train=train, rngs=rngs, mutable=["spectral"])


def test_dino_heads_have_the_published_parameters_and_names():
    shapes = jax.eval_shape(
        lambda: DinoDiscriminator().init(jax.random.key(0), jnp.zeros((1, 256, 256, 3)), train=True)
    )
    assert set(shapes) == {"params", "spectral"}  # the frozen trunk is not among them
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 7_386_245
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    named = convert.to_torch(zeros, "dino")
    state = rule_state([(name, x.shape) for name, x in named.items()], "dino_disc.")
    assert len(state) == 80 and state["heads.4.1.fn.0.weight_orig"].shape == (384, 384, 9)
    variables = convert.from_torch(state, "dino")
    assert jax.tree.map(np.shape, variables) == jax.tree.map(jnp.shape, shapes)
    for name, value in convert.to_torch(variables, "dino").items():
        np.testing.assert_array_equal(value, state[name])


def test_power_iteration_finds_the_largest_singular_value():
    variables = small_dino()
    kernel = variables["params"]["head_0"]["conv_1"]["kernel"]  # [3 16 16]
    matrix = np.asarray(kernel).transpose(2, 1, 0).reshape(16, -1)
    conv = discriminator.SpectralConv(16, 3)
    x, own = images(2)[:, :4, :16].mean(-1), {}
    own["params"] = variables["params"]["head_0"]["conv_1"] | {"bias": jnp.zeros(16)}
    own["spectral"] = variables["spectral"]["head_0"]["conv_1"]
    step = jax.jit(lambda v: conv.apply(v, x, train=True, mutable=["spectral"]))
    for _ in range(200):
        y, changed = step(own)
        own |= changed
    u, v = own["spectral"]["u"], own["spectral"]["v"]
    largest = np.linalg.svd(matrix, compute_uv=False)[0]
    np.testing.assert_allclose(u @ matrix @ v, largest, rtol=1e-4)
    # The convolution wraps: a rolled sequence gives a rolled answer.
    run = jax.jit(lambda x: conv.apply(own, x, train=False))
    rolled, y = run(jnp.roll(x, 1, axis=1)), run(x)
    np.testing.assert_allclose(rolled, jnp.roll(y, 1, axis=1), atol=1e-5)
    # Its scale is that of the matrix over its largest singular value.
    tokens = np.stack([np.roll(x, shift, axis=1) for shift in (1, 0, -1)])  # [3 b n c]
    expected = np.einsum("kbnc,kcd->bnd", tokens, np.asarray(kernel) / largest)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_only_training_moves_the_power_iteration():
    variables, x = small_dino(), images(2)
    _, changed = judge(variables, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, changed["spectral"], variables["spectral"])
    _, changed = judge(variables, x)
    for old, new in zip(
        *map(jax.tree.leaves, (variables["spectral"], changed["spectral"])), strict=True
    ):
        assert old.size == 1 or np.abs(old - new).max() > 1e-3
        np.testing.assert_allclose(np.linalg.norm(new), 1, rtol=1e-5)


def test_the_stretch_of_a_kernel_does_not_change_the_logits():
    variables, x = small_dino(), images(2)
    tripled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf if path[-1].key == "kernel" else leaf, variables["params"]
    )
    logits = judge(variables, x)[0]
    np.testing.assert_allclose(judge(variables | {"params": tripled}, x)[0], logits, atol=1e-4)


@pytest.mark.parametrize("batch", [3, 8, 16, 18])
def test_local_norm_has_groups_of_at_most_eight(batch):
    x = np.random.default_rng(0).normal(2.0, 3.0, (batch, 5, 4)).astype(np.float32)
    ones = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    y = np.asarray(LocalNorm().apply(ones, x))
    groups = int(np.ceil(batch / 8))
    for part in np.split(y, groups):
        np.testing.assert_allclose(part.mean((0, 1)), 0, atol=1e-5)
        np.testing.assert_allclose(part.std((0, 1)), 1, rtol=1e-4)


def test_local_norm_refuses_a_batch_that_does_not_split():
    with pytest.raises(errors.ConfigError, match="9 examples for 2 groups"):
        LocalNorm().init(jax.random.key(0), jnp.zeros((9, 5, 4)))


def test_views_are_crops_at_even_odds():
    x = images(2, 40)
    normed = discriminator.image.normalise(x, *discriminator.image.IMAGENET)
    view = jax.jit(functools.partial(discriminator.random_view, size=32))
    crop = view(x, np.float32([0.4, 3.5 / 9, 0.999]))
    np.testing.assert_allclose(crop, normed[:, 3:35, 8:40], atol=1e-6)
    whole = view(x, np.float32([0.6, 0.5, 0.5]))
    np.testing.assert_allclose(whole, discriminator.whole_view(x, 32), atol=1e-6)
    small = images(2, 20)
    small_view = view(small, np.float32([0.4, 0.5, 0.5]))
    np.testing.assert_allclose(small_view, discriminator.whole_view(small, 32), atol=1e-6)


def test_augmentation_draws_depend_on_the_key_alone():
    variables, x = small_dino(), images(2, 40)
    first, again, other = (judge(variables, x, jax.random.key(i))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert first.shape == (2, 3 * 4)


def test_gradient_reaches_images_and_heads():
    variables, x = small_dino(), images(2, 40)

    @jax.jit
    def grad(params, x):
        def mean(params, x):
            return judge(variables | {"params": params}, x, jax.random.key(0))[0].mean()

        return jax.grad(mean, (0, 1))(params, x)

    heads, pixels = grad(variables["params"], x)
    assert np.isfinite(pixels).all() and np.abs(pixels).max() > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(heads):
        # A bias in front of a norm moves nothing: no gradient, as for the original.
        silent = path[-1].key == "bias" and path[-2].key in ("conv_0", "conv_1")
        assert np.isfinite(leaf).all() and (silent or np.abs(leaf).max() > 0), path


@functools.cache
def published_dino():
    """Full size by rule, and the two photographs."""
    shapes = json.loads(shared_path("manifests/disc_dino_heads.json").read_text())
    variables = convert.from_torch(rule_state(shapes["state_dict"].items(), "dino_disc."), "dino")
    shapes = json.loads(shared_path("manifests/disc_dino_backbone_vits16.json").read_text())
    named = [(k, v) for k, v in shapes["state_dict"].items() if not k.startswith("x_")]
    variables["trunk"] = frozen_names.dino_params(rule_state(named, "dino_backbone."))
    paths = [shared_path(f"images/00000{i}_gt.png") for i in (1, 2)]
    x = pixels(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))
    return variables, x, load(shared_path("dino_disc.npz"))


@functools.partial(jax.jit, static_argnums=2)
def published_logits(variables, view, train):
    model = DinoDiscriminator()
    return model.apply(variables, view, train, method="logits", mutable=["spectral"])


@pytest.mark.goldens
@pytest.mark.parametrize("name", ["resize", "crop", "x224"])
def test_dino_logits_match_the_original(name):
    variables, x, (golden, meta) = published_dino()
    top, left = meta["crop_top_left"]
    draws = np.float32([0.0 if name == "crop" else 0.9, (top + 0.5) / 33, (left + 0.5) / 33])
    view = discriminator.random_view(x, draws, 224)
    if name == "x224":
        x = discriminator.image.resize(x, 224, discriminator.image.area)
        view = discriminator.whole_view(x, 224)
    logits, changed = published_logits(variables, view, True)
    np.testing.assert_allclose(logits, golden[f"{name}_train"], atol=1e-3)
    logits, _ = published_logits(variables, view, False)
    np.testing.assert_allclose(logits, golden[f"{name}_eval"], rtol=1e-3, atol=1e-3)
    if name == "resize":
        after = convert.to_torch(variables | changed, "dino")
        for key in (key for key in golden if key.startswith("after_")):
            np.testing.assert_allclose(after[key[6:]], golden[key], atol=1e-5)


@pytest.mark.goldens
def test_dino_maps_and_gradient_match_the_original():
    variables, x, (golden, meta) = published_dino()
    view = discriminator.whole_view(x, 224)
    maps = jax.jit(dino.DINO().apply)({"params": variables["trunk"]}, view)
    for i, found in enumerate(maps):
        found = np.asarray(found).transpose(0, 2, 1)[:, ::8, ::4]
        np.testing.assert_allclose(found, golden[f"act{i}_c8t4"], atol=1e-3)

    def mean(x):
        logits, _ = published_logits(variables, discriminator.whole_view(x, 224), True)
        return logits.mean()

    grad = np.asarray(jax.jit(jax.grad(mean))(x))
    np.testing.assert_allclose(np.linalg.norm(grad), meta["grad_in_norm"], rtol=1e-3)
    expected = golden["grad_in_s4"]
    found = grad.transpose(0, 3, 1, 2)[..., ::4, ::4]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
