"""Activations whose derivative is written out, so that it moves no more memory than it has to.

A matrix product's input is as large as its output, and these come between two of the largest. Their
backward passes keep what they were given and nothing else; values are in float32 or wider inside.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.ops.constrain import BATCH, SPLIT, constrain


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the normal distribution's (arXiv:1606.08415); shape and dtype of x.

    XLA alone writes Phi to memory as well, in both passes: 14 times x is read or written, not 6.
    """
    return (_wide(x) * _normal_cdf(_wide(x))).astype(x.dtype)


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    value = _wide(x)
    density = jnp.exp(-0.5 * value**2) / (2 * jnp.pi) ** 0.5
    slope = _normal_cdf(value) + value * density
    return ((_wide(gradient) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gate(both: jax.Array) -> jax.Array:
    """silu of the first half of the features of f[b n 2h], times the second half: f[b n h].

    XLA alone writes the gradients of the halves, and copies them into one array.
    """
    first, second = _halves(both)
    return (nn.silu(first) * second).astype(both.dtype)


def _gate_forward(both):
    return gate(both), both


def _gate_backward(both, gradient):
    first, second = _halves(both)
    gradient, share = _wide(gradient), nn.sigmoid(first)
    of_first = gradient * second * share * (1 + first * (1 - share))
    of_second = gradient * first * share
    width = of_first.shape[-1]
    return (_between(0, of_first, width, both.dtype) + _between(width, of_second, 0, both.dtype),)


gate.defvjp(_gate_forward, _gate_backward)


def _between(before: int, x: jax.Array, after: int, dtype) -> jax.Array:
    """x with so many zero features on its sides: a sum of such is one pass, joining a copy."""
    sides = [(0, 0, 0)] * (x.ndim - 1) + [(before, after, 0)]
    return jax.lax.pad(x.astype(dtype), jnp.zeros((), dtype), sides)


def _halves(both: jax.Array) -> list[jax.Array]:
    halves = jnp.split(both, 2, axis=-1)
    return [_wide(constrain(half, BATCH, None, SPLIT)) for half in halves]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x / 2**0.5))
