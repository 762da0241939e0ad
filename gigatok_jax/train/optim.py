"""Learning-rate schedules, AdamW with clipping, and the average of parameters (EMA).

The schedules take a traced step (float32 arithmetic) or numbers and numpy arrays (float64).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from gigatok_jax import errors, trees
from gigatok_jax.errors import ConfigError

SCHEDULES = ("cosine", "constant", "wsd")
DECAY_MASKS = ("all", "no_norm", "matrices")
MOMENT_TYPES = ("float32", "bfloat16")
WARMUP_START = 0.01  # share of the base rate at step 0 of a warm-up

Schedule = Callable[[Any], Any]  # step or steps -> learning rate, same shape


class Updated(NamedTuple):
    """Record of one update of a network: new parameters, optimizer state, and norms."""

    params: Any
    state: optax.OptState
    norms: dict[str, jax.Array]  # f32[] over all parameters; the gradient's before clipping


def learning_rate(
    optim: ml_collections.ConfigDict,
    total_steps: int,
    steps_per_epoch: float,
    *,
    base: float | None = None,
    first_step: int = 0,
    decay_from: int | None = None,
) -> Schedule:
    """Makes a schedule: the learning rate of each update, counted from 0, as in the original.

    The original sets the rate after each update, from the number of updates before it. So the
    first update of a network runs at the full base rate even under warm-up, and update k > 0 at
    schedule(k - 1). The discriminator's schedule counts from the start of the run too:
    `first_step` is its first update, and the updates after it follow the global step.

    Args:
        optim: `config.optim`. "cosine" ends at `end_learning_rate`; "wsd" decays to 0 as
            1 - sqrt(progress) over the last int(`wsd_decay_fraction` * total) steps.
        total_steps: updates in the whole run.
        steps_per_epoch: turns `warmup_epochs` into steps.
        base: rate before decay; None takes `optim.learning_rate`.
        first_step: global step of the network's first update.
        decay_from: number of updates after which the rate falls to 0 at `total_steps`, as 1 -
            sqrt(progress), whatever the schedule: the cool-down of a constant phase.

    Returns:
        A function of the global step (integers, numpy or traced) that gives the rate.

    Raises:
        ConfigError: the schedule is unknown, or a warm-up is set both in steps and in epochs.
    """
    errors.one_of("optim.schedule", optim.schedule, SCHEDULES)
    if optim.warmup_steps and optim.warmup_epochs:
        raise ConfigError("optim.warmup_steps and optim.warmup_epochs are both set, set one to 0")
    warmup = optim.warmup_steps or round(optim.warmup_epochs * steps_per_epoch)
    base = optim.learning_rate if base is None else base

    def scheduled(step):
        if decay_from is not None:
            return wsd(step, base, warmup, total_steps, total_steps - decay_from)
        if optim.schedule == "constant":
            return constant(step, base, warmup)
        if optim.schedule == "cosine":
            return cosine(step, base, warmup, total_steps, optim.end_learning_rate)
        decay_steps = int(optim.wsd_decay_fraction * total_steps)
        return wsd(step, base, warmup, total_steps, decay_steps)

    def rate(step):
        xp, step = _float(step)
        return xp.where(step <= first_step, base, scheduled(xp.clip(step - 1, 0, total_steps)))

    return rate


def constant(step, base: float, warmup: int):
    """Returns a rate at `step`: `base` after a linear rise from `base` / 100 in `warmup` steps."""
    xp, step = _float(step)
    return _after_warmup(xp, step, base, warmup, base)


def cosine(step, base: float, warmup: int, total: int, end: float = 0.0):
    """Returns the rate at `step`: a warm-up, half a cosine from `base` to `end`, then `end`."""
    xp, step = _float(step)
    progress = xp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
    rate = end + 0.5 * (base - end) * (1 + xp.cos(np.pi * progress))
    return _after_warmup(xp, step, base, warmup, xp.where(step >= total, end, rate))


def wsd(step, base: float, warmup: int, total: int, decay_steps: int, decay="sqrt", final=0.0):
    """Returns the rate at `step`: a warm-up, `base`, then a decay to `final * base`.

    The rate is meant for steps up to `total`; past it "linear" and "cosine" go on as the original's
    do. "exp" starts from `base`; in the original it starts from 1 (no recipe uses it).

    Args:
        step: integer(s), the schedule's own counter.
        base: learning rate between warm-up and decay.
        warmup: number of steps of the warm-up.
        total: number of steps of the whole schedule.
        decay_steps: number of steps of the decay, which ends at step `total`.
        decay: "sqrt" (1 - sqrt(progress)), "linear", "cosine", "square" or "exp".
        final: share of `base` at the end.

    Returns:
        Learning rate(s), float64 for numpy steps and float32 for jax steps.

    Source: arXiv:2405.18392.
    """
    xp, step = _float(step)
    start = total - decay_steps
    progress = xp.maximum(step - start, 0) / max(decay_steps, 1)
    factor = xp.where(step < start, 1.0, _decay_factor(xp, progress, decay, final))
    return _after_warmup(xp, step, base, warmup, base * factor)


def make_optimizer(
    optim: ml_collections.ConfigDict, decays: Callable[[str], bool] | None = None
) -> optax.GradientTransformation:
    """Makes the optimizer of clipping, Adam and weight decay; `apply` scales its step direction.

    Args:
        optim: `config.optim`: clip (global norm), beta1, beta2, first_moment, weight_decay,
            decay_mask. The first moment is kept in that type; an update computes it in float32
            and rounds it last.
        decays: function that says whether the parameter at a path, such as
            "quantizer/codebook", is decayed; needed for every `decay_mask` but "all".

    Returns:
        A transformation whose output, times minus the learning rate, is the update.

    Raises:
        ConfigError: the mask or type is unknown, a mask lacks `decays`, or clip is not positive.

    Source: AdamW arXiv:1711.05101 as PyTorch scales it: the decay is learning rate * weight
        decay, epsilon 1e-8 is added outside the root, clipping divides by (norm + 1e-6).
    """
    errors.one_of("optim.decay_mask", optim.decay_mask, DECAY_MASKS)
    if optim.clip <= 0:
        raise ConfigError(f"optim.clip is {optim.clip}, expected a positive norm")
    errors.one_of("optim.first_moment", optim.first_moment, MOMENT_TYPES)
    beta1 = np.float64(optim.beta1)  # times a bfloat16 moment it is float32, Python's is bfloat16
    return optax.chain(
        optax.stateless(lambda grads, params: _clipped(grads, optim.clip)),
        optax.scale_by_adam(beta1, optim.beta2, eps=1e-8, mu_dtype=optim.first_moment),
        optax.add_decayed_weights(optim.weight_decay, _decay_mask(optim.decay_mask, decays)),
    )


def apply(
    optimizer: optax.GradientTransformation,
    grads: Any,
    state: optax.OptState,
    params: Any,
    learning_rate: jax.Array | float,
) -> Updated:
    """Updates `params` by one optimizer step at a given learning rate.

    The rate is an argument, not a counter of the optimizer, because the discriminator's schedule
    follows the global step.
    """
    direction, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)
    norms = {
        "gradient_norm": optax.tree.norm(grads),
        "update_norm": learning_rate * optax.tree.norm(direction),
        "parameter_norm": optax.tree.norm(params),
    }
    return Updated(params, state, norms)


def update_ema(ema_params: Any, params: Any, decay: float) -> Any:
    """Updates an average of parameters: decay * ema + (1 - decay) * params for each array.

    An average in the memory of the host passes through the device array by array, and the new
    average is in the memory of the host again.
    """
    average = lambda e, p: decay * e + (1.0 - decay) * p  # noqa: E731
    if not any(map(_on_host, jax.tree.leaves(ema_params))):
        return jax.tree.map(average, ema_params, params)
    parts, tree = jax.tree.flatten(ema_params)
    # In turn, after the gradients are gone: the compiler would fetch all parts before it begins.
    params = jax.lax.optimization_barrier(tuple(jax.tree.leaves(params)))
    done = []
    for part, new in zip(parts, params, strict=True):
        before = done[-2] if len(done) > 1 else params[0]
        part, _ = jax.lax.optimization_barrier((part, before))
        done.append(jax.device_put(average(to_device(part), new), jax.memory.Space.Host))
    return jax.tree.unflatten(tree, done)


def to_device(x: jax.Array) -> jax.Array:
    """Returns an array in device memory, inside jit: copies an array that is in host memory."""
    return jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x


def _on_host(x) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _float(step):
    """Returns the array library of a step, and the step as float32 (jax) or float64 (numpy)."""
    if isinstance(step, jax.Array):
        return jnp, step.astype(jnp.float32)
    return np, np.asarray(step, np.float64)


def _after_warmup(xp, step, base, warmup, rate):
    done = step / max(warmup, 1)
    return xp.where(step < warmup, base * (done + (1 - done) * WARMUP_START), rate)


def _decay_factor(xp, progress, decay, final):
    if decay == "exp":
        return final**progress
    remaining = {
        "sqrt": lambda: xp.maximum(1 - xp.sqrt(progress), 0),
        "linear": lambda: 1 - progress,
        "cosine": lambda: 0.5 * (1 + xp.cos(np.pi * progress)),
        "square": lambda: xp.maximum(1 - progress**2, 0),
    }[decay]()
    return final + (1 - final) * remaining


def _clipped(grads, max_norm):
    scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads)


def _decay_mask(name, decays):
    """Makes the weight-decay mask of optax: None (all decay), or a function of the parameters."""
    if name == "all":
        return None
    if decays is None:
        raise ConfigError(f"optim.decay_mask {name!r} needs a rule that says which paths decay")

    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda keys, _: decays(trees.path(keys)), params)

    return mask
