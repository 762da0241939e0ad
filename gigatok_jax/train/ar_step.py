"""State and training step of a prior. Axes: b batch, h w pixels, n codes of an image."""

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
    """Record of all that a prior run carries between updates; checkpoints hold all fields."""

    step: jax.Array  # i32[], optimizer updates done
    rng: jax.Array  # key of the run; each step folds its number in
    params: Any
    ema_params: Any
    opt_state: optax.OptState


def create(prior: ar.Prior, optimizer: optax.GradientTransformation, seed: int) -> PriorState:
    """Creates the state of a prior before its first update; jit it to create arrays in place.

    Args:
        prior: module without dropouts.
        optimizer: of the run.
        seed: seed of the parameters and of all dropouts.
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
    """Makes the jitted training step of a prior, which donates its state.

    Args:
        prior: module with the dropouts of training.
        optimizer, rate: of the run.
        ema: decay of the averaged parameters per update.
        encode: function from frozen parameters and images uint8[b h w 3] to codes i32[b n]; None
            takes codes from the batch.
        micro_batches: pieces of the batch that go through the networks one after the other.
        sharding: sharding of all arrays of the new state, or tree of shardings; None: XLA decides.

    Returns:
        `step(state, batch, frozen)`, which returns the next state and {name: f32[]}. The batch has
        "label" i32[b], and "codes" int[b n] or "image" uint8[b h w 3].
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
    """Computes loss f32[] and gradients of a prior on a batch, averaged over its micro-batches.

    Args:
        state: before the update.
        batch: "label" i32[b], and "codes" int[b n] or "image" uint8[b h w 3].
        frozen: parameters that `encode` takes.
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
    """Computes a prior's mean cross-entropy f32[] over all codes of a batch, in nats per code.

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
