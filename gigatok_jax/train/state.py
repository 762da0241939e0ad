"""What a tokenizer run carries from step to step, and the networks that it trains."""

from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gigatok_jax.train import optim

HISTORY = 65536  # latest codes kept for the usage statistics, the original's window


@flax.struct.dataclass
class TokenizerState:
    """All of it is saved; donated to each step."""

    step: jax.Array  # i32[], optimizer updates done
    rng: jax.Array  # key of the run; each step folds its number in
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    discriminator: Any  # trainable parameters, {} without a discriminator
    discriminator_stats: Any  # batch statistics, spectral vectors
    discriminator_opt_state: optax.OptState
    codebook_used: jax.Array  # f32[HISTORY], latest codes, oldest first
    lecam: dict[str, jax.Array]  # averages of the discriminator's logits


class Networks(NamedTuple):
    """Modules of a run; None where its loss is off."""

    tokenizer: nn.Module
    discriminator: nn.Module | None = None
    lpips: nn.Module | None = None
    teacher: nn.Module | None = None


class Optimizers(NamedTuple):
    generator: optax.GradientTransformation
    discriminator: optax.GradientTransformation
    rate: optim.Schedule
    discriminator_rate: optim.Schedule


def create(
    networks: Networks, optimizers: Optimizers, image_size: int, seed: int
) -> TokenizerState:
    """State before the first step; jit it with output shardings to create it in place."""
    rng = jax.random.key(seed)
    images = jnp.zeros((1, image_size, image_size, 3))
    params = networks.tokenizer.init(jax.random.fold_in(rng, 0), images)["params"]
    judge, stats = {}, {}
    if networks.discriminator is not None:
        keys = {"params": jax.random.fold_in(rng, 1), "augment": jax.random.fold_in(rng, 2)}
        stats = networks.discriminator.init(keys, images, train=True)
        judge = stats.pop("params")
    return TokenizerState(
        step=jnp.zeros((), jnp.int32),
        rng=rng,
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # donation needs buffers of its own
        opt_state=optimizers.generator.init(params),
        discriminator=judge,
        discriminator_stats=stats,
        discriminator_opt_state=optimizers.discriminator.init(judge),
        codebook_used=jnp.zeros(HISTORY),
        lecam={"real": jnp.zeros(()), "fake": jnp.zeros(())},
    )
