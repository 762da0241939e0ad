"""Activations with derivatives of their own, which read and write less memory than XLA's.

An activation stands between the two largest matrix products of a block. Its backward pass keeps
the input alone; inside, values are float32 or wider.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.ops.constrain import BATCH, SPLIT, constrain


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU, x Phi(x) with the normal distribution's Phi (arXiv:1606.08415).

    The result has the dtype of x. Left to XLA, both the forward and the backward pass also write
    Phi to memory: the size of x is moved 14 times, not 6.
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
    """Computes a gated activation, silu of the first half of features times the second half.

    Takes f[b n 2h] and returns f[b n h]. Left to XLA, the backward pass writes the gradients of
    both halves and copies the two together.
    """
    first, second = _halves(both)
    return (nn.silu(first) * second).astype(both.dtype)


def _gate_forward(both):
    return gate(both), both


def _gate_backward(both, gradient):
    first, second = _halves(both)
    gradient, sigmoid = _wide(gradient), nn.sigmoid(first)
    of_first = gradient * second * sigmoid * (1 + first * (1 - sigmoid))
    of_second = gradient * first * sigmoid
    width = of_first.shape[-1]
    return (_between(0, of_first, width, both.dtype) + _between(width, of_second, 0, both.dtype),)


gate.defvjp(_gate_forward, _gate_backward)


def _between(before: int, x: jax.Array, after: int, dtype) -> jax.Array:
    """Pads the last axis of x with zeros; adding two padded arrays joins them without a copy."""
    sides = [(0, 0, 0)] * (x.ndim - 1) + [(before, after, 0)]
    return jax.lax.pad(x.astype(dtype), jnp.zeros((), dtype), sides)


def _halves(both: jax.Array) -> list[jax.Array]:
    halves = jnp.split(both, 2, axis=-1)
    return [_wide(constrain(half, BATCH, None, SPLIT)) for half in halves]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x / 2**0.5))
