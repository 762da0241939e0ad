"""Activations whose derivatives are written out, against automatic ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.ops import activation


def plain_gate(both):
    first, second = jnp.split(both, 2, axis=-1)
    return nn.silu(first) * second


PAIRS = {
    "gelu": (activation.gelu, lambda x: nn.gelu(x, approximate=False)),
    "gate": (activation.gate, plain_gate),
}


def drawn(shape, deviation, dtype):
    rng = np.random.default_rng(len(shape) + shape[-1])
    return jnp.asarray(rng.normal(0, deviation, shape), dtype)


def value_and_gradient(function, x):
    out, pull = jax.vjp(function, x)
    (gradient,) = pull(drawn(out.shape, 1, out.dtype))
    return out, gradient


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("deviation", [0.1, 1, 30])
def test_values_and_gradients(name, deviation):
    ours, plain = PAIRS[name]
    x = drawn((3, 17, 64), deviation, jnp.float32)
    for made, expected in zip(
        value_and_gradient(ours, x), value_and_gradient(plain, x), strict=True
    ):
        np.testing.assert_allclose(made, expected, rtol=2e-6, atol=1e-6 * deviation)


@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_is_float32_rounded_once(name):
    ours, plain = PAIRS[name]
    x = drawn((3, 17, 64), 2, jnp.bfloat16)
    out, pull = jax.vjp(ours, x)
    given = drawn(out.shape, 1, jnp.bfloat16)
    exact, exact_pull = jax.vjp(plain, x.astype(jnp.float32))
    pairs = (out, exact), (pull(given)[0], exact_pull(given.astype(jnp.float32))[0])
    for made, expected in pairs:
        assert made.dtype == jnp.bfloat16
        # Half a unit in the last of eight bits, and float32's own difference.
        np.testing.assert_allclose(np.float32(made), expected, rtol=2**-8 * 1.001, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_the_backward_pass_keeps_what_was_given_and_nothing_else(name):
    x = drawn((2, 8, 64), 1, jnp.bfloat16)
    _, pull = jax.vjp(PAIRS[name][0], x)
    kept = jax.tree.leaves(pull)
    assert [(one.shape, one.dtype) for one in kept] == [(x.shape, x.dtype)]


def test_far_out_values_stay_finite():
    x = jnp.array([[[-1e30, -100, -0.0, 0, 100, 1e30]]], jnp.float32)
    out, gradient = value_and_gradient(activation.gelu, x)
    np.testing.assert_array_equal(out, jnp.maximum(x, 0))
    given = drawn(x.shape, 1, jnp.float32)
    np.testing.assert_array_equal(gradient, given * jnp.array([0, 0, 0.5, 0.5, 1, 1]))
