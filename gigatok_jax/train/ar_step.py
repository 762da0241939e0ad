"""One update of a prior. Axes: b batch, h w pixels, n codes of an image."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from gigatok_jax import losses
from gigatok_jax.models import ar
from gigatok_jax.train import optim, program


@flax.struct.dataclass
class PriorState:
    """Everything a prior's run carries from update to update; saved whole, donated to a step."""

    step: jax.Array  # i32[], optimizer updates done
    rng: jax.Array  # key of the run; each step folds its number in
    params: Any
    ema_params: Any
    opt_state: optax.OptState


def create(prior: ar.Prior, optimizer: optax.GradientTransformation, seed: int) -> PriorState:
    """The state before the first update; jit it with output shardings to create it in place.

    Args:
        prior: module without dropouts.
        optimizer: of the run.
        seed: of the parameters and of all dropouts.
    """
    rng = jax.random.key(seed)
    codes = jnp.zeros((1, prior.tokens), jnp.int32)
    params = prior.init(jax.random.fold_in(rng, 0), codes[:, 0], codes)["params"]
    return PriorState(
        step=jnp.zeros((), jnp.int32),
        rng=rng,
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # donation needs buffers of its own
        opt_state=optimizer.init(params),
    )


def make(
    prior: ar.Prior,
    optimizer: optax.GradientTransformation,
    rate: optim.Schedule,
    ema: float,
    encode: Callable | None,
    micro_batches: int = 1,
    sharding: Any = None,
) -> Callable:
    """The jitted training step; it donates its state.

    Args:
        prior: module with the dropouts of training.
        optimizer, rate: of the run.
        ema: decay of the averaged parameters per update.
        encode: frozen parameters and uint8 images [b h w 3] -> codes i32[b n]; None learns codes.
        micro_batches: pieces of the batch that go through the networks one after the other.
        sharding: sharding of the new state, one for all or a tree; None leaves it to XLA.

    Returns:
        `step(state, batch, frozen)` to the next state and {name: f32[]}. The batch has "label"
        i32[b], and "codes" int[b n] or "image" uint8[b h w 3].
    """
    out = {} if sharding is None else {"out_shardings": (sharding, None)}

    @functools.partial(jax.jit, donate_argnums=0, **out)
    def step(state: PriorState, batch: dict[str, jax.Array], frozen):
        loss, grads = gradients(state, batch, frozen, prior, encode, micro_batches)
        now = rate(state.step)
        new = optim.apply(optimizer, grads, state.opt_state, state.params, now)
        state = state.replace(
            step=state.step + 1,
            params=new.params,
            ema_params=optim.update_ema(state.ema_params, new.params, ema),
            opt_state=new.state,
        )
        return state, {"loss": loss, "learning_rate": now, **new.norms}

    return step


def gradients(
    state: PriorState,
    batch: dict[str, jax.Array],
    frozen: Any,
    prior: ar.Prior,
    encode: Callable | None,
    micro_batches: int = 1,
) -> tuple[jax.Array, Any]:
    """Loss f32[], and gradients of the parameters, averaged over the micro-batches.

    Args:
        state: before the update.
        batch, frozen: as the step takes them, see `make`.
        prior, encode, micro_batches: as for `make`.
    """

    def of_micro_batch(batch, rng):
        # The frozen tokenizer is outside of what is differentiated.
        codes = encode(frozen, batch["image"]) if "image" in batch else batch["codes"]
        return jax.value_and_grad(loss)(state.params, prior, batch["label"], codes, rng), ()

    rng = jax.random.fold_in(state.rng, state.step)
    averaged, _ = program.accumulate(of_micro_batch, batch, rng, micro_batches)
    return averaged


def loss(
    params: Any, prior: ar.Prior, class_ids: jax.Array, codes: jax.Array, rng: jax.Array
) -> jax.Array:
    """Mean cross-entropy f32[] of all codes of a batch, in nats per code.

    Args:
        params: parameters of the prior.
        prior: the module; its dropouts draw from `rng`.
        class_ids: i32[b] in [0, classes].
        codes: int[b n] in [0, vocab).
        rng: key of the dropouts.
    """
    codes = codes.astype(jnp.int32)
    logits = prior.apply({"params": params}, class_ids, codes, rngs={"dropout": rng})
    return losses.cross_entropy(logits, codes).mean()
