"""One update of the tokenizer and of its discriminator. Axes: b batch, k micro-batches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax import losses
from gigatok_jax.ops.image import to_pixels
from gigatok_jax.train import objective, optim
from gigatok_jax.train.objective import Phase
from gigatok_jax.train.state import HISTORY, Networks, Optimizers, TokenizerState

LECAM_DELAY = 1000  # updates of the discriminator before its logits are averaged


class Gradients(NamedTuple):
    """Of one micro-batch; the two networks never see each other's."""

    generator: Any
    discriminator: Any
    stats: Any
    scalars: dict[str, jax.Array]
    codes: jax.Array  # i32[b n]
    latents: jax.Array  # f32[b n e]


def make(
    networks: Networks,
    optimizers: Optimizers,
    config,
    groups: int,
    micro_batches: int = 1,
    sharding=None,
) -> Callable:
    """The jitted training step; it donates its state.

    Args:
        networks, optimizers: of the run.
        config: of the run: loss, codebook, optim.ema.
        groups: parts of a micro-batch with batch statistics of their own; 1 is global.
        micro_batches: parts of the batch that go through the networks one after the other.
        sharding: of the state that comes out, one or a tree of them; None leaves it to XLA.

    Returns:
        `step(state, images, frozen, phase)` with uint8 images [b h w 3] to the next state and
        {name: f32[]}; `phase` is static.
    """

    out = {} if sharding is None else {"out_shardings": (sharding, None)}

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="phase", **out)
    def step(state: TokenizerState, images: jax.Array, frozen, phase: Phase):
        grads = gradients(state, images, frozen, phase, networks, config, groups, micro_batches)
        state, scalars = _update(state, grads, optimizers, config, phase)
        return state, scalars

    return step


def gradients(state, images, frozen, phase, networks, config, groups, micro_batches=1) -> Gradients:
    """Gradients of both networks, averaged over the micro-batches.

    Statistics of the discriminator follow the first micro-batch, as the original keeps those of
    its first device.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    one = functools.partial(
        _micro_batch, state, frozen, phase=phase, networks=networks, config=config, groups=groups
    )
    if micro_batches == 1:
        return one(images, rng)
    # Every device keeps its share of each micro-batch: example i goes to micro-batch i % k.
    split = images.reshape(-1, micro_batches, *images.shape[1:]).swapaxes(0, 1)  # [k b/k h w 3]
    return _accumulate(one, split, jax.random.split(rng, micro_batches))


def _accumulate(one: Callable, split: jax.Array, keys: jax.Array) -> Gradients:
    """Mean of the micro-batches, one at a time."""

    def averaged(grads):
        return grads.generator, grads.discriminator, grads.scalars

    def add(total, inputs):
        grads = one(*inputs)
        rest = grads.stats, grads.codes, grads.latents
        return jax.tree.map(jnp.add, total, averaged(grads)), rest

    # From zeros, not from the first micro-batch: its program is compiled once, inside the scan.
    shapes = averaged(jax.eval_shape(one, split[0], keys[0]))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, (stats, *parts) = jax.lax.scan(add, start, (split, keys))
    total = jax.tree.map(lambda x: x / len(split), total)
    codes, latents = (x.reshape(-1, *x.shape[2:]) for x in parts)
    first = jax.tree.map(lambda x: x[0], stats)
    return Gradients(total[0], total[1], first, total[2], codes, latents)


def _micro_batch(
    state, frozen, images, rng, *, phase, networks, config, groups
) -> Gradients:  # fmt: skip
    images = to_pixels(images)
    make_key, judge_key = jax.random.split(rng)
    loss = functools.partial(
        objective.generator, networks=networks, loss=config.loss, phase=phase, groups=groups
    )
    (total, made), grads = jax.value_and_grad(loss, has_aux=True)(
        state.params, state.discriminator, state.discriminator_stats, frozen, images, make_key
    )
    scalars = {"loss": total, **made.terms}
    judge_grads, stats = {}, made.stats
    if phase.adversarial:
        loss = functools.partial(objective.discriminator, networks=networks, loss=config.loss)
        (total, judged), judge_grads = jax.value_and_grad(loss, has_aux=True)(
            state.discriminator, stats, frozen, images, made.fakes, state.lecam, judge_key
        )
        stats = judged.stats
        scalars |= {"discriminator_loss": total, **judged.terms}
        scalars |= {"logits_real": judged.logits_real, "logits_fake": judged.logits_fake}
    return Gradients(grads, judge_grads, stats, scalars, made.codes, made.latents)


def _update(state, grads, optimizers: Optimizers, config, phase):
    rate = optimizers.rate(state.step)
    new = optim.apply(optimizers.generator, grads.generator, state.opt_state, state.params, rate)
    scalars = grads.scalars | {"learning_rate": rate, "gradient_norm": new.grad_norm}
    state = state.replace(
        params=new.params,
        opt_state=new.state,
        ema_params=optim.update_ema(state.ema_params, new.params, config.optim.ema),
        codebook_used=_remember(state.codebook_used, grads.codes, phase),
    )
    if phase.adversarial:
        state, more = _update_discriminator(state, grads, optimizers, config)
        scalars |= more
    state = _revive_codebook(state, grads.latents, config.codebook)
    size = state.params["quantizer"]["codebook"].shape[0]
    scalars |= codebook_scalars(state.codebook_used, size)
    return state.replace(step=state.step + 1), scalars


def _update_discriminator(state, grads, optimizers: Optimizers, config):
    rate = optimizers.discriminator_rate(state.step)
    new = optim.apply(
        optimizers.discriminator, grads.discriminator, state.discriminator_opt_state,
        state.discriminator, rate,
    )  # fmt: skip
    averaged = state.step >= config.loss.discriminator_start + LECAM_DELAY
    decay = jnp.where(averaged, 0.99, 0.0)
    lecam = {
        name: losses.lecam_average(state.lecam[name], grads.scalars[f"logits_{name}"], decay)
        for name in ("real", "fake")
    }
    state = state.replace(
        discriminator=new.params,
        discriminator_stats=grads.stats,
        discriminator_opt_state=new.state,
        lecam=lecam,
    )
    return state, {
        "discriminator_learning_rate": rate,
        "discriminator_gradient_norm": new.grad_norm,
    }


def _remember(history: jax.Array, codes: jax.Array, phase: Phase) -> jax.Array:
    """The window of latest codes moved on by one batch: f32[HISTORY]."""
    if not phase.quantize:
        return history
    return jnp.concatenate([history, codes.reshape(-1).astype(history.dtype)])[-HISTORY:]


def _row_counts(history: jax.Array, size: int) -> jax.Array:
    """How often each row stands in the window: f32[k]."""
    return jnp.zeros(size).at[history.astype(jnp.int32)].add(1.0)


def codebook_scalars(history: jax.Array, size: int) -> dict[str, jax.Array]:
    """Usage (a share of all rows), perplexity and dead rows over the window of latest codes."""
    counts = _row_counts(history, size)
    share = counts / counts.sum()
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)))
    dead = jnp.sum(counts == 0)
    return {
        "codebook_usage": 1 - dead / size,
        "codebook_perplexity": jnp.exp(entropy),
        "codebook_dead": dead.astype(jnp.float32),
    }


def _revive_codebook(state: TokenizerState, latents: jax.Array, cure) -> TokenizerState:
    """Rows that start, or start again, as latents of this batch (small data; off when published).

    With `data_init` all rows do when quantization begins; with `reset_every` the rows that nobody
    chose within the window do every so many steps.
    """
    if not cure.data_init and not cure.reset_every:
        return state
    size = state.params["quantizer"]["codebook"].shape[0]
    done = state.step + 1
    counts = _row_counts(state.codebook_used, size)
    due = jnp.zeros(size, bool)
    if cure.reset_every:
        due = (counts == 0) & (done > cure.warmup_steps) & (done % cure.reset_every == 0)
    if cure.data_init:
        due |= done == max(cure.warmup_steps, 1)
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 1)
    pool = latents.reshape(-1, latents.shape[-1])
    fresh = pool[jax.random.randint(key, (size,), 0, len(pool))]

    def replace(params):
        rows = jnp.where(due[:, None], fresh, optim.to_device(params["quantizer"]["codebook"]))
        return {**params, "quantizer": {**params["quantizer"], "codebook": rows}}

    return state.replace(params=replace(state.params), ema_params=replace(state.ema_params))
