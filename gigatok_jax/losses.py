"""Training losses as functions of arrays, computed in float32, without models and weights.

Axes: b batch, t tokens or positions, c features, n latent tokens, e codebook width, v codes.
"""

import jax
import jax.numpy as jnp

from gigatok_jax.errors import one_of

ADVERSARIAL = ("hinge", "vanilla", "non_saturating")


def reconstruction(images: jax.Array, reconstructed: jax.Array) -> jax.Array:
    """Computes the mean squared difference between the pixels of images and reconstructions.

    Args:
        images: float[b h w 3] in [-1, 1].
        reconstructed: float[b h w 3], not clamped.

    Returns:
        f32[], >= 0.
    """
    return jnp.mean(jnp.square(_float32(reconstructed) - _float32(images)))


def adversarial_generator(logits_fake: jax.Array, kind: str = "hinge") -> jax.Array:
    """Computes the generator's adversarial loss from the discriminator's logits on its output.

    "hinge" is -mean(logits), without bounds. "non_saturating" is mean(-log D), >= 0. "vanilla" is
    the minimax form mean(log(1 - D)), <= 0, whose gradient fades while the discriminator wins.

    Args:
        logits_fake: float of any shape; D is its sigmoid.
        kind: "hinge", "vanilla" or "non_saturating".

    Returns:
        f32[].

    Raises:
        ConfigError: `kind` is unknown.

    Source: hinge arXiv:1705.02894; the others arXiv:1406.2661, eq. 1 and the end of section 3.
    """
    one_of("kind", kind, ADVERSARIAL)
    fake = _float32(logits_fake)
    if kind == "hinge":
        return -jnp.mean(fake)
    if kind == "vanilla":
        return -jnp.mean(jax.nn.softplus(fake))
    return jnp.mean(jax.nn.softplus(-fake))


def adversarial_discriminator(
    logits_real: jax.Array, logits_fake: jax.Array, kind: str = "hinge"
) -> jax.Array:
    """Computes the discriminator's adversarial loss, the mean of the real and the fake loss.

    "vanilla" and "non_saturating" differ only in the generator's loss: for the discriminator both
    are the cross-entropy.

    Args:
        logits_real: float of any shape, on images.
        logits_fake: float of any shape, on reconstructions.
        kind: "hinge", "vanilla" or "non_saturating".

    Returns:
        f32[], >= 0.

    Raises:
        ConfigError: `kind` is unknown.

    Source: hinge arXiv:1705.02894; cross-entropy arXiv:1406.2661; factor 1/2 arXiv:2012.09841.
    """
    one_of("kind", kind, ADVERSARIAL)
    penalty = jax.nn.softplus if kind != "hinge" else lambda x: jax.nn.relu(1.0 + x)
    real, fake = _float32(logits_real), _float32(logits_fake)
    return 0.5 * (jnp.mean(penalty(-real)) + jnp.mean(penalty(fake)))


def codebook_loss(rows: jax.Array, inputs: jax.Array) -> jax.Array:
    """Computes the mean squared difference of codebook rows and latents, to train the codebook.

    The latents get no gradient.

    Args:
        rows: f32[b n e], the chosen rows with their gradient to the codebook.
        inputs: f32[b n e], the latents before quantization.

    Returns:
        f32[], >= 0.

    Source: arXiv:1711.00937, eq. 3, second term (mean over all elements).
    """
    return jnp.mean(jnp.square(_float32(rows) - jax.lax.stop_gradient(_float32(inputs))))


def commitment_loss(rows: jax.Array, inputs: jax.Array) -> jax.Array:
    """Computes the mean squared difference of codebook rows and latents, to train the encoder.

    The rows get no gradient.

    Args:
        rows: f32[b n e], the chosen rows.
        inputs: f32[b n e], the latents before quantization.

    Returns:
        f32[], >= 0.

    Source: arXiv:1711.00937, eq. 3, third term (mean over all elements, without its beta).
    """
    return jnp.mean(jnp.square(jax.lax.stop_gradient(_float32(rows)) - _float32(inputs)))


def alignment_loss(features: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes minus the mean cosine similarity of decoder features and a teacher's features.

    The teacher gets no gradient.

    Args:
        features: float[b t c], decoder features after the alignment MLP.
        teacher: float[b t c], features of the frozen teacher at the same positions.

    Returns:
        f32[] in [-1, 1]. A zero feature has cosine 0 and a finite gradient.

    Raises:
        ValueError: the shapes differ.

    Source: arXiv:2410.06940, with the cosine as its similarity.
    """
    if features.shape != teacher.shape:
        raise ValueError(f"features {features.shape} and teacher {teacher.shape} must agree")
    cosine = jnp.sum(_unit(features) * jax.lax.stop_gradient(_unit(teacher)), axis=-1)  # [b t]
    return -jnp.mean(cosine)


def feature_loss(decoded: jax.Array, encoded: jax.Array) -> jax.Array:
    """Computes the mean squared difference of decoder transformer output and CNN encoder features.

    Args:
        decoded: float[b h w c], the CNN decoder's input on the full path.
        encoded: float[b h w c], the CNN decoder's input on the shortcut path; gets no gradient.

    Returns:
        f32[], >= 0.
    """
    target = jax.lax.stop_gradient(_float32(encoded))
    return jnp.mean(jnp.square(_float32(decoded) - target))


def cross_entropy(logits: jax.Array, codes: jax.Array) -> jax.Array:
    """Computes the cross-entropy, the negative log-probability of each code, in nats.

    A comparison selects the logit of the code, not an index: the gradient is then one pass over
    the logits, without a scatter.

    Args:
        logits: float[b n v].
        codes: int[b n] in [0, v).

    Returns:
        f32[b n], >= 0.
    """
    logits = _float32(logits)
    chosen = codes[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, -1) - jnp.sum(logits, -1, where=chosen)


def _unit(x: jax.Array) -> jax.Array:
    """Divides vectors along the last axis by their norm.

    The squared norm is bounded before the root, so that zero vectors have a finite gradient.
    """
    x = _float32(x)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
