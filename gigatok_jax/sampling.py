"""Sampling of codes from a prior: guidance weights, filters of codes, the loop over positions.

Axes: b batch, n codes of an image, v vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.errors import ConfigError, one_of
from gigatok_jax.models import ar, ar_decoding

# Positions that read the same length of the cache: fewer of them read less and compile longer.
SEGMENT = 64
NEARLY_ONE = 1.0001  # weight without guidance in a schedule with a window, as in the original
PEAK = 0.5  # position of the triangular schedule's peak

SCHEDULES = {  # share of (scale - 1), by the share `x` of the positions and whether in the window
    "constant": lambda x, inside: np.ones_like(x),
    "linear": lambda x, inside: x,
    "linear_re": lambda x, inside: 1 - x,
    "triangular": lambda x, inside: np.where(x < PEAK, x / PEAK, (1 - x) / (1 - PEAK)),
    "cosine": lambda x, inside: 0.5 * (1 + np.cos(np.pi * x)),
    "step": lambda x, inside: inside.astype(x.dtype),
    "rectangular": lambda x, inside: inside.astype(x.dtype),
}
RAISED = ("linear", "linear_re", "triangular")  # the original adds 1e-4 to these everywhere


class Draw(NamedTuple):
    """Record of the settings for drawing a code from logits.

    Its values are arrays, so that other values compile no new program.
    """

    temperature: jax.Array  # f32[]; 0 takes the most likely code
    top_k: jax.Array  # i32[]; 0 keeps all
    top_p: jax.Array  # f32[]; 1 keeps all


def weights(
    tokens: int,
    scale: float,
    schedule: str = "constant",
    start: float = 0.0,
    end: float = 1.0,
    interval: int = -1,
) -> np.ndarray:
    """Computes the weight of classifier-free guidance at each position of an image's codes.

    The first code always has the whole scale; the schedule runs over the other codes, and ends at
    the last code. "step" and "rectangular" are the same: the scale inside the window, 1.0001
    outside. "cosine" falls from the scale to 1, which the original intends but cannot run.

    Args:
        tokens: number of codes of an image.
        scale: guidance scale, >= 1; 1 is no guidance.
        schedule: a key of `SCHEDULES`.
        start, end: window of "step" and "rectangular", shares of the positions in [0, 1]; the
            other schedules ignore it.
        interval: number of decoded codes after which guidance ends; -1 is never.

    Returns:
        f32[tokens]; where a weight is exactly 1, the logits with the class count alone.

    Raises:
        ConfigError: the schedule is unknown, the scale is below 1, or the window is not in [0, 1].

    Source: guided = uncond + (cond - uncond) * weight (arXiv:2207.12598); the original's schedules.
    """
    check_guidance(scale, schedule, start, end)
    if scale == 1:
        return np.ones(tokens, np.float32)
    i = np.arange(tokens - 1)
    x = (i + 1) / max(tokens - 1, 1)
    share = SCHEDULES[schedule](x, (start <= x) & (x <= end))
    later = 1 + (scale - 1) * share + (1e-4 if schedule in RAISED else 0.0)
    if schedule in ("step", "rectangular"):
        later = np.where(share > 0, scale, NEARLY_ONE)
    if interval >= 0:
        later = np.where(i > interval, 1.0, later)
    return np.concatenate([[scale], later])[:tokens].astype(np.float32)


def check_guidance(scale: float, schedule: str, start: float, end: float) -> None:
    """Raises ConfigError unless schedule, scale and window of guidance are in their ranges."""
    one_of("guidance schedule", schedule, SCHEDULES)
    if not 1 <= scale < float("inf"):
        raise ConfigError(f"guidance scale is {scale}, expected 1 (no guidance) or more")
    if not 0 <= start <= end <= 1:
        raise ConfigError(
            f"guidance window is {start} to {end}, expected 0 <= start <= end <= 1, shares of the"
            " sequence"
        )


def make_draw(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Draw:
    """Makes the settings for drawing a code from logits, after a check of their ranges.

    Args:
        temperature: divisor of the logits, >= 0; 0 takes the most likely code.
        top_k: number of codes that are kept, >= 0; 0 keeps all.
        top_p: probability of the codes that are kept, in (0, 1]; 1 keeps all.

    Raises:
        ConfigError: a value is outside its range.
    """
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}, expected 0 (most likely code) or more")
    if top_k < 0:
        raise ConfigError(f"top_k is {top_k}, expected 0 (all codes) or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}, expected more than 0 and at most 1 (all codes)")
    return Draw(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def filtered(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets to -inf the logits f32[b v] of codes that top-k, and then top-p of the rest, drop.

    Codes as likely as the last kept code stay. Top-p keeps the code that crosses the threshold.

    Args:
        logits: f32[b v], after the temperature.
        top_k: i32[]; 0 keeps all.
        top_p: f32[] in (0, 1]; 1 keeps all.

    Source: arXiv:1904.09751, section 3.1.
    """
    falling = -jnp.sort(-logits, axis=-1)
    size = logits.shape[-1]
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    falling = jnp.where(jnp.arange(size) < kept, falling, -jnp.inf)
    # The sum before each code: the code that crosses the threshold is kept, the first code always.
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    inside = (before <= top_p) | (top_p >= 1)
    lowest = jnp.min(jnp.where(inside & (falling > -jnp.inf), falling, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def draw(
    logits: jax.Array, keys: jax.Array, position: jax.Array, settings: Draw, filters: bool
) -> jax.Array:
    """Draws one code i32[b] for each image, from logits f32[b v] and random keys[b].

    The draw of an image depends on its key and position alone, not on other images of the batch.
    """
    cold = settings.temperature == 0
    logits = logits / jnp.where(cold, 1.0, settings.temperature)
    if filters:
        logits = filtered(logits, settings.top_k, settings.top_p)

    def noise(key):
        return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:])

    # The largest of logits plus Gumbel noise is a draw from their softmax.
    return jnp.argmax(logits + jnp.where(cold, 0.0, jax.vmap(noise)(keys)), -1).astype(jnp.int32)


def guide(logits: jax.Array, weight: jax.Array) -> jax.Array:
    """Applies classifier-free guidance to logits f32[2b v] and returns logits f32[b v].

    Each image has two consecutive rows of input, one with its class and then one without.
    """
    with_class, without = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
    guided = without + (with_class - without) * weight
    return jnp.where(weight == 1, with_class, guided)


@functools.partial(jax.jit, static_argnames=("prior", "guided", "filters"))
def generate(
    prior: ar.Prior,
    params: Mapping[str, Any],
    class_ids: jax.Array,
    image_ids: jax.Array,
    rng: jax.Array,
    weight: jax.Array,
    settings: Draw,
    *,
    guided: bool,
    filters: bool,
) -> jax.Array:
    """Samples the codes of a batch of images from a prior; all positions are one program.

    Args:
        prior: module without dropouts.
        params: parameters of the prior.
        class_ids: i32[b] in [0, classes].
        image_ids: i32[b]; the same key, image id and class give the same image in any batch.
        rng: key of the seed.
        weight: f32[n], guidance weights from `weights`.
        settings: temperature, top-k and top-p, from `make_draw`.
        guided: False leaves out the pass without the class; every weight then counts as 1.
        filters: whether top-k or top-p can drop any code.

    Returns:
        i32[b n] in [0, vocab).
    """
    # Each step reads all parameters: apart by block, and matrices in the compute type already.
    params = params | {"blocks": ar_decoding.unstack(params["blocks"])}
    params = jax.tree.map(lambda x: x.astype(prior.dtype) if x.ndim > 1 else x, params)
    keys = jax.vmap(lambda image: jax.random.fold_in(rng, image))(image_ids)
    rows = class_ids
    if guided:  # both rows of an image are neighbours, so that splitting keeps them together
        rows = jnp.stack([class_ids, jnp.full_like(class_ids, prior.classes)], 1).reshape(-1)

    def choose(logits, position):
        logits = guide(logits, weight[position]) if guided else logits
        return draw(logits, keys, position, settings, filters)

    def step(carry, position, *, read):
        codes, cache = carry
        inputs = jnp.repeat(codes, 2) if guided else codes
        place = ar.Place(position, read)
        logits, cache = ar_decoding.decode_step(prior, params, inputs, cache, place)
        codes = choose(logits, position)
        return (codes, cache), codes

    logits, cache = ar_decoding.prefill(
        prior, params, rows, ar_decoding.empty_cache(prior, len(rows))
    )
    first = choose(logits, jnp.int32(0))
    segments, carry = [first[None]], (first, cache)
    for start in range(0, prior.tokens, SEGMENT):
        end = min(start + SEGMENT, prior.tokens)
        positions = jnp.arange(max(start, 1), end)
        carry, codes = jax.lax.scan(functools.partial(step, read=end), carry, positions)
        segments.append(codes)
    return jnp.concatenate(segments).T  # [b n]
