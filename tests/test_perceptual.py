"""Facts about LPIPS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule import block_images, golden_path, load, lpips_state, pixels

from gigatok_jax.models.perceptual import LPIPS, unit_channels
from gigatok_jax.weights import frozen_names, names


def rule_variables():
    """LPIPS by rule with the public heads, here and under the original's names."""
    state = lpips_state()
    return {"params": names.from_torch(state, frozen_names.lpips_entries())}, state


SMALL = LPIPS(widths=(8, 8, 8, 8, 8))
distance = jax.jit(SMALL.apply)


@functools.cache
def small_variables():
    """Random variables of `SMALL`; drawn in numpy, as compiling the initialisers is slow."""
    rng, x = np.random.default_rng(1), jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), x, x)

    def draw(path, leaf):
        if path[-1].key.startswith("head"):
            return rng.random(leaf.shape, np.float32)  # distances are not negative
        deviation = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.normal(0, deviation, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def image_pair():
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32)


@jax.jit
def slope(variables, a, b):
    return jax.grad(lambda x: SMALL.apply(variables, x, b).sum())(a)


def test_matches_the_original():
    golden, _ = load(golden_path("portable/lpips_patchgan_fwd.npz"))
    variables, _ = rule_variables()
    images = pixels(block_images())
    model = LPIPS()
    features = jax.jit(lambda x: model.apply(variables, x, method="features"))
    stages = features(images)
    for i, stage in enumerate(stages):
        expected = golden[f"vgg_feat{i}_c16s16"]
        stride = stage.shape[1] // expected.shape[-1]
        ours = np.asarray(stage)[:2, ::stride, ::stride, ::16].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    distance = jax.jit(model.apply)(variables, images[:2], images[2:])
    np.testing.assert_allclose(distance, golden["lpips"], rtol=1e-4)


def test_weights_go_both_ways_bit_for_bit():
    variables, state = rule_variables()
    back = names.to_torch(variables["params"], frozen_names.lpips_entries())
    assert back.keys() == state.keys()
    assert sum(x.size for x in back.values()) == 14_716_160
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


def test_distance_is_zero_to_itself_and_symmetric():
    variables, (a, b) = small_variables(), image_pair()
    np.testing.assert_allclose(distance(variables, a, a), np.zeros(3), atol=1e-12)
    forth, back = distance(variables, a, b), distance(variables, b, a)
    np.testing.assert_allclose(forth, back, rtol=1e-4)
    assert np.all(np.asarray(forth) > 0)


def test_each_image_has_its_own_distance():
    variables, (a, b) = small_variables(), image_pair()
    both = distance(variables, a, b)
    np.testing.assert_allclose(distance(variables, a[::-1], b[::-1]), both[::-1], rtol=1e-4)
    mixed = distance(variables, a, np.stack([b[0], a[1], b[2]]))
    np.testing.assert_allclose(mixed, both * np.array([1, 0, 1]), rtol=1e-4, atol=1e-12)


def test_gradient_is_finite_where_all_features_are_zero():
    a, b = image_pair()
    dead = jax.tree.map(jnp.zeros_like, small_variables())  # all features of all stages vanish
    np.testing.assert_array_equal(slope(dead, a, b), np.zeros_like(a))


def torch_distance(torch, variables, a, b):
    """The published definition on torch tensors [b 3 h w], from the same weights."""
    state = names.to_torch(variables["params"], frozen_names.lpips_entries())
    state = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, total = (torch.cat([a, b]) - shift) / scale, 0
    for i in range(1, 6):
        x = torch.nn.functional.max_pool2d(x, 2) if i > 1 else x
        for name in (n for n in state if n.startswith(f"net.slice{i}.") and "weight" in n):
            bias = state[name.replace("weight", "bias")]
            x = torch.relu(torch.nn.functional.conv2d(x, state[name], bias, padding=1))
        unit = x / ((x.square().sum(1, keepdim=True) + 1e-30).sqrt() + 1e-10)
        first, second = unit.chunk(2)
        head = state[f"lin{i - 1}.model.1.weight"]
        total = total + ((first - second).square() * head[0]).mean((2, 3)).sum(1)
    return total


def test_value_and_gradient_agree_with_torch():
    torch = pytest.importorskip("torch")
    variables, (a, b) = small_variables(), image_pair()
    x, y = (torch.from_numpy(image.transpose(0, 3, 1, 2).copy()) for image in (a, b))
    x.requires_grad_()
    expected = torch_distance(torch, variables, x, y)
    expected.sum().backward()
    np.testing.assert_allclose(distance(variables, a, b), expected.detach(), rtol=1e-4)
    grad = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(slope(variables, a, b), grad, atol=1e-3 * np.abs(grad).max())


def test_channels_have_unit_length_and_gradient_along_the_sphere():
    x = np.random.default_rng(2).normal(size=(2, 3, 3, 5)).astype(np.float32)
    x[0, 0, 0] = 0
    length = np.linalg.norm(unit_channels(x), axis=-1)
    np.testing.assert_allclose(length.ravel(), [0] + [1] * 17, atol=1e-6)
    cotangent = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    grad = jax.vjp(unit_channels, x)[1](cotangent)[0]
    np.testing.assert_allclose((grad * x).sum(-1), 0, atol=1e-5)  # none along the radius
    np.testing.assert_array_equal(grad[0, 0, 0], np.zeros(5))


def test_bfloat16_stays_close():
    variables, (a, b) = small_variables(), image_pair()
    low = jax.jit(LPIPS(widths=SMALL.widths, dtype=jnp.bfloat16).apply)(variables, a, b)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, distance(variables, a, b), rtol=0.05)
