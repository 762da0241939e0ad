"""State and training step of a tokenizer and its discriminator. Axes: b batch, k codebook rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax

from gigatok_jax.ops.image import to_pixels
from gigatok_jax.train import objective, optim, program
from gigatok_jax.train.networks import Networks
from gigatok_jax.train.objective import Phase

HISTORY = 65536  # latest codes kept for the usage statistics, the original's window


@flax.struct.dataclass
class TokenizerState:
    """Record of all that a tokenizer run carries between updates; checkpoints hold all fields."""

    step: jax.Array  # i32[], optimizer updates done
    rng: jax.Array  # key of the run; each step folds its number in
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    discriminator: Any  # trainable parameters, {} without a discriminator
    discriminator_stats: Any  # batch statistics, spectral vectors
    discriminator_opt_state: optax.OptState
    codebook_used: jax.Array  # f32[HISTORY], latest codes, oldest first


class Optimizers(NamedTuple):
    """Record of the optimizers and learning-rate schedules of tokenizer and discriminator."""

    generator: optax.GradientTransformation
    discriminator: optax.GradientTransformation
    rate: optim.Schedule
    discriminator_rate: optim.Schedule


def create(
    networks: Networks, optimizers: Optimizers, image_size: int, seed: int
) -> TokenizerState:
    """Creates the state of a tokenizer run before its first update; jit it to create it in place.

    Args:
        networks, optimizers: of the run.
        image_size: side of the images in pixels.
        seed: seed of the parameters and of every random draw of the run.
    """
    rng = jax.random.key(seed)
    images = jnp.zeros((1, image_size, image_size, 3))
    params = networks.tokenizer.init(jax.random.fold_in(rng, 0), images)["params"]
    discriminator, stats = {}, {}
    if networks.discriminator is not None:
        keys = {"params": jax.random.fold_in(rng, 1), "augment": jax.random.fold_in(rng, 2)}
        stats = networks.discriminator.init(keys, images, train=True)
        discriminator = stats.pop("params")
    return TokenizerState(
        step=jnp.zeros((), jnp.int32),
        rng=rng,
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # donation needs buffers of its own
        opt_state=optimizers.generator.init(params),
        discriminator=discriminator,
        discriminator_stats=stats,
        discriminator_opt_state=optimizers.discriminator.init(discriminator),
        codebook_used=jnp.zeros(HISTORY),
    )


class Gradients(NamedTuple):
    """Record of gradients of tokenizer and discriminator on a batch, and of byproducts."""

    generator: Any
    discriminator: Any  # {} while the discriminator is off
    scalars: dict[str, jax.Array]  # f32[] each, losses and logits
    stats: Any  # of the discriminator after its forward passes
    codes: jax.Array  # i32[b n]
    latents: jax.Array  # f32[b n e], before quantization


def make(
    networks: Networks,
    optimizers: Optimizers,
    config: ml_collections.ConfigDict,
    groups: int,
    micro_batches: int = 1,
    sharding: Any = None,
) -> Callable:
    """Makes the jitted training step of a tokenizer, which donates its state.

    Args:
        networks, optimizers: of the run.
        config: of the run; the sections loss and codebook and `optim.ema` are read.
        groups: number of groups of a micro-batch with batch statistics of their own; 1 is global.
        micro_batches: pieces of the batch that go through the networks one after the other.
        sharding: sharding of all arrays of the new state, or tree of shardings; None: XLA decides.

    Returns:
        `step(state, images, frozen, phase)`, which takes images uint8[b h w 3] and returns the next
        state and {name: f32[]}; `phase` is static.
    """
    out = {} if sharding is None else {"out_shardings": (sharding, None)}

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="phase", **out)
    def step(state: TokenizerState, images: jax.Array, frozen, phase: Phase):
        grads = gradients(state, images, frozen, phase, networks, config, groups, micro_batches)
        return _update(state, grads, optimizers, config, phase)

    return step


def gradients(
    state: TokenizerState,
    images: jax.Array,
    frozen: dict[str, Any],
    phase: Phase,
    networks: Networks,
    config: ml_collections.ConfigDict,
    groups: int,
    micro_batches: int = 1,
) -> Gradients:
    """Computes gradients of tokenizer and discriminator, averaged over a batch's micro-batches.

    Statistics of the discriminator follow the first micro-batch, as the original keeps the
    statistics of its first device.

    Args:
        state: before the update.
        images: uint8[b h w 3].
        frozen: parameters of the frozen networks by name.
        phase: losses that are on.
        networks, config, groups, micro_batches: as for `make`.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    of_micro_batch = functools.partial(
        _micro_batch, state, frozen, phase=phase, networks=networks, config=config, groups=groups
    )
    averaged, seen = program.accumulate(of_micro_batch, images, rng, micro_batches, _join)
    return Gradients(*averaged, *seen)


def _join(seen: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
    """Joins byproducts of micro-batches: statistics of the first, codes and latents of all."""
    stats, codes, latents = seen
    codes, latents = (x.reshape(-1, *x.shape[2:]) for x in (codes, latents))
    return jax.tree.map(lambda x: x[0], stats), codes, latents


def _micro_batch(
    state, frozen, images, rng, *, phase, networks, config, groups
) -> tuple[tuple, tuple]:  # fmt: skip
    """Computes the fields of `Gradients`: three to average over micro-batches, then the others."""
    images = to_pixels(images)
    generator_key, discriminator_key = jax.random.split(rng)
    loss = functools.partial(
        objective.generator, networks=networks, loss=config.loss, phase=phase, groups=groups
    )
    (total, generated), grads = jax.value_and_grad(loss, has_aux=True)(
        state.params, state.discriminator, state.discriminator_stats, frozen, images, generator_key
    )
    scalars, stats = {"loss": total, **generated.terms}, generated.stats
    discriminator_grads = {}
    if phase.adversarial:
        loss = functools.partial(objective.discriminator, networks=networks, loss=config.loss)
        (total, judged), discriminator_grads = jax.value_and_grad(loss, has_aux=True)(
            state.discriminator, stats, frozen, images, generated.fakes, discriminator_key,
        )  # fmt: skip
        stats = judged.stats
        scalars |= {"discriminator_loss": total, **judged.terms}
        scalars |= {"logits_real": judged.logits_real, "logits_fake": judged.logits_fake}
    return (grads, discriminator_grads, scalars), (stats, generated.codes, generated.latents)


def _update(state, grads, optimizers: Optimizers, config, phase):
    rate = optimizers.rate(state.step)
    new = optim.apply(optimizers.generator, grads.generator, state.opt_state, state.params, rate)
    scalars = grads.scalars | {"learning_rate": rate, **new.norms}
    state = state.replace(
        params=new.params,
        opt_state=new.state,
        ema_params=optim.update_ema(state.ema_params, new.params, config.optim.ema),
        codebook_used=_remember(state.codebook_used, grads.codes, phase),
    )
    if phase.adversarial:
        state, more = _update_discriminator(state, grads, optimizers)
        scalars |= more
    state = _revive_codebook(state, grads.latents, config.codebook)
    size = state.params["quantizer"]["codebook"].shape[0]
    scalars |= codebook_scalars(state.codebook_used, size)
    return state.replace(step=state.step + 1), scalars


def _update_discriminator(state, grads, optimizers: Optimizers):
    rate = optimizers.discriminator_rate(state.step)
    new = optim.apply(
        optimizers.discriminator, grads.discriminator, state.discriminator_opt_state,
        state.discriminator, rate,
    )  # fmt: skip
    state = state.replace(
        discriminator=new.params, discriminator_stats=grads.stats, discriminator_opt_state=new.state
    )
    return state, {
        "discriminator_learning_rate": rate,
        **{f"discriminator_{name}": norm for name, norm in new.norms.items()},
    }


def _remember(history: jax.Array, codes: jax.Array, phase: Phase) -> jax.Array:
    """Appends a batch's codes to the window of latest codes f32[HISTORY], and drops the oldest."""
    if not phase.quantize:
        return history
    return jnp.concatenate([history, codes.reshape(-1).astype(history.dtype)])[-HISTORY:]


def _row_counts(history: jax.Array, size: int) -> jax.Array:
    """Counts how often each codebook row occurs in the window of latest codes; returns f32[k]."""
    return jnp.zeros(size).at[history.astype(jnp.int32)].add(1.0)


def codebook_scalars(history: jax.Array, size: int) -> dict[str, jax.Array]:
    """Computes codebook usage (a share), perplexity and dead rows in the window of codes."""
    counts = _row_counts(history, size)
    share = counts / counts.sum()
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)))
    dead = jnp.sum(counts == 0)
    return {
        "codebook_usage": 1 - dead / size,
        "codebook_perplexity": jnp.exp(entropy),
        "codebook_dead": dead.astype(jnp.float32),
    }


def _revive_codebook(
    state: TokenizerState, latents: jax.Array, cure: ml_collections.ConfigDict
) -> TokenizerState:
    """Replaces codebook rows by random latents of this batch: a cure for small data.

    `cure.data_init` replaces all rows when quantization begins; every `cure.reset_every` updates
    the rows that no code of the window chose are replaced. Both are off in published recipes.
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
