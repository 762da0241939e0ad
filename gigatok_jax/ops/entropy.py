"""Entropy loss of the codebook, without a tokens x rows matrix in memory.

Axes: b batch, g groups of the batch, n latent tokens, t tokens of a block, e codebook width,
k codebook rows.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK_ELEMENTS = 2**22  # probabilities held at once, over all devices: 16 MiB
EPSILON = 1e-5  # inside the logarithm of the mean distribution


def entropy_loss(
    z: jax.Array,
    codebook: jax.Array,
    temperature: float,
    groups: int = 1,
    *,
    block_elements: int = BLOCK_ELEMENTS,
) -> jax.Array:
    """Mean entropy of the tokens' soft assignments minus the entropy of their mean, in nats.

    A token's assignment is the softmax over rows of -|z - e|^2 / temperature. Low where every
    token is sure of its row and all rows are used alike. Probabilities are made for a block of
    token positions at a time, again in the backward pass.

    Args:
        z: float[b n e], latents before quantization; computed in float32.
        codebook: float[k e], on the same scale as `z`.
        temperature: > 0.
        groups: consecutive parts of the batch that each have a mean distribution of their own,
            averaged afterwards; the number of devices gives the original's statistics.
        block_elements: bound on the probabilities held at once; one position of every image is
            the smallest block.

    Returns:
        f32[], in [-log k, log k], with gradients to both `z` and `codebook`.

    Raises:
        ValueError: the widths differ, or the groups do not divide the batch.

    Source: arXiv:2310.05737, with the mean's entropy -sum p log(p + 1e-5) as in the
        original.
    """
    b, _, e = z.shape
    if codebook.shape[-1] != e:
        raise ValueError(f"latents are {e} wide and codebook rows {codebook.shape[-1]}")
    if b % groups:
        raise ValueError(f"{groups} groups do not divide a batch of {b}")
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    # Distances do not change when both move; around the mean row, those of a collapsed codebook
    # keep their digits.
    centre = jax.lax.stop_gradient(codebook.mean(axis=0))
    z, codebook = z - centre, codebook - centre
    return _entropy_loss(z, codebook, temperature, groups, block_elements)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _entropy_loss(z, codebook, temperature, groups, block_elements):
    return _forward(z, codebook, temperature, groups, block_elements)[0]


def _forward(z, codebook, temperature, groups, block_elements):
    blocks = _blocks(z, codebook.shape[0], groups, block_elements)  # [blocks g b/g t e]

    def step(carry, block):
        entropy, mean = carry
        p, _, h = _assign(block, codebook, temperature)
        return (entropy + h.sum(), mean + p.sum(axis=(1, 2))), None

    start = jnp.zeros(()), jnp.zeros((groups, codebook.shape[0]))
    (entropy, mean), _ = jax.lax.scan(step, start, blocks)
    tokens = z.shape[0] * z.shape[1]
    mean = mean * (groups / tokens)  # [g k]
    negative_entropy_of_mean = jnp.sum(mean * jnp.log(mean + EPSILON)) / groups
    return entropy / tokens + negative_entropy_of_mean, (z, codebook, mean)


def _backward(temperature, groups, block_elements, residuals, cotangent):
    """With s the logits and m the mean distribution, the gradient of the loss to s is
    q / tokens, q = p (f - log p - h - sum_k p f), where f = log(m + eps) + m / (m + eps) is the
    derivative of m log(m + eps). Rows of q sum to zero, so |z|^2 has no part in it."""
    z, codebook, mean = residuals
    slope = jnp.log(mean + EPSILON) + mean / (mean + EPSILON)
    slope = slope[:, None, None, :]  # [g 1 1 k]

    def step(carry, block):
        from_z, mass = carry
        p, log_p, h = _assign(block, codebook, temperature)
        mean_slope = jnp.sum(p * slope, axis=-1, keepdims=True)
        q = p * (slope - log_p - h - mean_slope)  # [g b/g t k]
        from_z += _einsum("gbtk,gbte->ke", q, block)
        return (from_z, mass + q.sum(axis=(0, 1, 2))), _einsum("gbtk,ke->gbte", q, codebook)

    blocks = _blocks(z, codebook.shape[0], groups, block_elements)
    start = jnp.zeros_like(codebook), jnp.zeros(codebook.shape[0])
    (from_z, mass), dz = jax.lax.scan(step, start, blocks)
    scale = cotangent * 2.0 / (temperature * z.shape[0] * z.shape[1])
    dz = jnp.moveaxis(dz, 0, 2).reshape(z.shape)
    return scale * dz, scale * (from_z - mass[:, None] * codebook)


_entropy_loss.defvjp(_forward, _backward)


def _assign(block, codebook, temperature):
    """Probabilities and their logarithms [g b/g t k], entropies [g b/g t 1]."""
    half_square = 0.5 * jnp.sum(jnp.square(codebook), axis=-1)
    logits = _einsum("gbte,ke->gbtk", block, codebook) - half_square
    log_p = jax.nn.log_softmax(logits * (2.0 / temperature), axis=-1)
    p = jnp.exp(log_p)
    return p, log_p, -jnp.sum(p * log_p, axis=-1, keepdims=True)


def _blocks(z, rows, groups, block_elements):
    """[b n e] to [blocks g b/g t e]. Cut along the positions, because the batch is spread over
    devices; t is the largest divisor of n within the bound."""
    b, n, e = z.shape
    most = max(1, block_elements // (b * rows))
    t = max(t for t in range(1, n + 1) if n % t == 0 and t <= most)
    return jnp.moveaxis(z.reshape(groups, b // groups, n // t, t, e), 2, 0)


def _einsum(spec, *operands):
    # HIGHEST: the default for float32 is TF32 on GPU and bfloat16 on TPU.
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)
