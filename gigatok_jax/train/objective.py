"""Losses of the tokenizer and of its discriminator, as named weighted terms.

Axes: b batch, h w pixels, n latent tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from gigatok_jax import losses
from gigatok_jax.ops import entropy, image, quantize
from gigatok_jax.train.networks import Networks


class Phase(NamedTuple):
    """Record of which losses and paths an update uses; each combination is compiled on its own."""

    shortcut: bool  # decode the CNN features past both transformers as well
    adversarial: bool
    entropy: bool
    quantize: bool = True  # off while a demo's encoder warms up


class Fakes(NamedTuple):
    """Record of generated images that the discriminator is trained on."""

    images: jax.Array  # f32[b h w 3]
    shortcut: jax.Array | None  # f32[b h w 3]


class Generated(NamedTuple):
    """Record of what the tokenizer's loss computes on one batch, besides the loss itself."""

    terms: dict[str, jax.Array]  # weighted; their sum is the loss
    fakes: Fakes
    stats: Any  # of the discriminator, after it judged the fakes
    codes: jax.Array  # i32[b n]
    latents: jax.Array  # f32[b n e], before quantization


class Judged(NamedTuple):
    """Record of what the discriminator's loss computes on one batch, besides the loss itself."""

    terms: dict[str, jax.Array]  # weighted; their sum is the loss
    stats: Any  # after all forward passes
    logits_real: jax.Array  # f32[], mean
    logits_fake: jax.Array  # f32[], mean


def phase_at(
    step: int, loss: ml_collections.ConfigDict, codebook: ml_collections.ConfigDict
) -> Phase:
    """Returns the phase of the update that follows `step` updates: the losses that are on.

    Args:
        step: number of updates done; `discriminator_start` and `shortcut_end` count from 1, as in
            the original.
        loss, codebook: these sections of the config.
    """
    update = step + 1
    return Phase(
        shortcut=update < loss.shortcut_end,
        adversarial=loss.discriminator != "none" and update >= loss.discriminator_start,
        entropy=loss.entropy > 0,
        quantize=step >= codebook.warmup_steps,
    )


def judge(
    networks: Networks, params: Any, stats: Any, frozen: dict[str, Any], images: jax.Array,
    rng: jax.Array,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Applies the discriminator to images in training mode; returns logits and new statistics.

    Args:
        networks: of the run.
        params, stats: parameters and statistics of the discriminator.
        frozen: parameters of the frozen networks by name.
        images: f32[b h w 3] in [-1, 1].
        rng: key of the discriminator's augmentation.
    """
    variables = {"params": params, **stats}
    if "dino" in frozen:
        variables["trunk"] = frozen["dino"]
    logits, stats = networks.discriminator.apply(
        variables, images, train=True, rngs={"augment": rng}, mutable=list(stats)
    )
    return logits, stats


def generator(
    params: Any, discriminator: Any, stats: Any, frozen: dict[str, Any], images: jax.Array,
    rng: jax.Array, *, networks: Networks, loss: ml_collections.ConfigDict, phase: Phase,
    groups: int,
) -> tuple[jax.Array, Generated]:  # fmt: skip
    """Computes the loss of the tokenizer on one batch.

    Args:
        params: parameters of the tokenizer, the only argument that gets a gradient.
        discriminator, stats: parameters and statistics of the discriminator.
        frozen: parameters of the frozen networks by name.
        images: f32[b h w 3] in [-1, 1].
        rng: key for the discriminator's augmentation.
        networks: of the run.
        loss: this section of the config.
        phase: losses and paths of this update.
        groups: number of equal groups of the batch; the entropy loss takes the mean code
            distribution over each.

    Returns:
        The sum of the weighted terms, and `Generated`.
    """
    apply = networks.tokenizer.apply
    encoding = apply({"params": params}, images, method="encode")
    quantized = encoding.quantized
    latents = quantized.latents if phase.quantize else quantized.inputs
    decoding = apply({"params": params}, latents, method="decode")
    shortcut = None
    if phase.shortcut:
        method = "decode_features"
        shortcut = apply({"params": params}, encoding.features, method=method)
    fakes = Fakes(decoding.images, shortcut)
    terms = _image_terms(networks, frozen, images, fakes, loss)
    if phase.quantize:
        terms |= _codebook_terms(params, networks, quantized, loss, phase, groups)
    if phase.shortcut:
        terms["feature"] = loss.feature * losses.feature_loss(decoding.features, encoding.features)
    if networks.teacher is not None:
        terms["alignment"] = loss.alignment * losses.alignment_loss(
            decoding.aligned, teacher_features(networks, frozen, images)
        )
    if phase.adversarial:
        more, stats = _adversarial_terms(networks, discriminator, stats, frozen, fakes, rng, loss)
        terms |= more
    out = Generated(terms, fakes, stats, quantized.codes, quantized.inputs)
    return sum(terms.values()), jax.lax.stop_gradient(out)


def teacher_features(networks: Networks, frozen, images: jax.Array) -> jax.Array:
    """Computes the frozen teacher's patch tokens f[b t c] of images f32[b h w 3] in [-1, 1]."""
    # One teacher patch of 14 pixels per token of the grid: 256 pixels become 224.
    pixels = image.teacher_input(images, size=14 * networks.tokenizer.decoder.grid)
    return jax.lax.stop_gradient(networks.teacher.apply({"params": frozen["teacher"]}, pixels))


def _image_terms(networks, frozen, images, fakes, loss) -> dict[str, jax.Array]:
    terms = {}
    for prefix, fake in (("", fakes.images), ("shortcut_", fakes.shortcut)):
        if fake is None:
            continue
        value = losses.reconstruction(images, fake)
        terms[f"{prefix}reconstruction"] = loss.reconstruction * value
        if networks.lpips is not None:
            distance = networks.lpips.apply({"params": frozen["lpips"]}, images, fake)
            terms[f"{prefix}perceptual"] = loss.perceptual * distance.mean()
    return terms


def _codebook_terms(params, networks, quantized, loss, phase, groups) -> dict[str, jax.Array]:
    terms = {
        "codebook": loss.codebook * losses.codebook_loss(quantized.rows, quantized.inputs),
        "commitment": loss.commitment * losses.commitment_loss(quantized.rows, quantized.inputs),
    }
    if phase.entropy:
        table = params["quantizer"]["codebook"]
        table = quantize.unit(table) if networks.tokenizer.quantizer.l2_norm else table
        terms["entropy"] = loss.entropy * entropy.entropy_loss(
            quantized.inputs, table, loss.entropy_temperature, groups
        )
    return terms


def _second_fake(fakes: Fakes, loss) -> jax.Array | None:
    """Selects the images for the shortcut's adversarial terms; None outside the shortcut phase.

    With the DINO discriminator the original judges the ordinary reconstruction a second time,
    under new augmentations, in place of the shortcut's image.
    """
    if fakes.shortcut is None:
        return None
    return fakes.images if loss.discriminator == "dino" else fakes.shortcut


def _adversarial_terms(networks, params, stats, frozen, fakes, rng, loss):
    terms = {}
    pairs = (("adversarial", fakes.images), ("shortcut_adversarial", _second_fake(fakes, loss)))
    for i, (name, fake) in enumerate(pairs):
        if fake is None:
            continue
        key = jax.random.fold_in(rng, i)
        logits, stats = judge(networks, params, stats, frozen, fake, key)
        value = losses.adversarial_generator(logits, loss.adversarial_type)
        terms[name] = loss.adversarial * value
    return terms, stats


def discriminator(
    params: Any, stats: Any, frozen: dict[str, Any], images: jax.Array, fakes: Fakes,
    rng: jax.Array, *, networks: Networks, loss: ml_collections.ConfigDict,
) -> tuple[jax.Array, Judged]:  # fmt: skip
    """Computes the loss of the discriminator on real and generated images.

    In the shortcut phase the real term counts twice, once beside each kind of fake, as in the
    original.

    Args:
        params: parameters of the discriminator, the only argument that gets a gradient.
        stats, frozen, images, rng, networks, loss: as for `generator`.
        fakes: images that the generator made before its update.

    Returns:
        The sum of the weighted terms, and `Judged`.
    """
    keys = jax.random.split(rng, 3)
    real, stats = judge(networks, params, stats, frozen, images, keys[0])
    fake, stats = judge(networks, params, stats, frozen, fakes.images, keys[1])
    adversarial = losses.adversarial_discriminator
    terms = {"discriminator": loss.adversarial * adversarial(real, fake, loss.adversarial_type)}
    second = _second_fake(fakes, loss)
    if second is not None:
        again, stats = judge(networks, params, stats, frozen, second, keys[2])
        value = adversarial(real, again, loss.adversarial_type)
        terms["shortcut_discriminator"] = loss.adversarial * value
    out = Judged(terms, stats, jnp.mean(real), jnp.mean(fake))
    return sum(terms.values()), jax.lax.stop_gradient(out)
