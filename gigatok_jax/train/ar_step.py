"""One update of a prior. Axes: b batch, k micro-batches, h w pixels, n codes of an image."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from gigatok_jax import losses
from gigatok_jax.models import ar
from gigatok_jax.train import optim


@flax.struct.dataclass
class PriorState:
    """All of it is saved; donated to each step."""

    step: jax.Array  # i32[], optimizer updates done
    rng: jax.Array  # key of the run; each step folds its number in
    params: Any
    ema_params: Any
    opt_state: optax.OptState


def create(prior: ar.Prior, optimizer: optax.GradientTransformation, seed: int) -> PriorState:
    """State before the first step; jit it with output shardings to create it in place.

    Args:
        prior: made without dropouts.
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
    encode: Callable,
    micro_batches: int = 1,
    sharding=None,
) -> Callable:
    """The jitted training step; it donates its state.

    Args:
        prior: made with the dropouts of training.
        optimizer, rate: of the run.
        ema: decay of the averaged parameters.
        encode: frozen parameters and uint8 images [b h w 3] to codes i32[b n].
        micro_batches: parts of the batch that go through the networks one after the other.
        sharding: of the state that comes out; None leaves it to XLA.

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
        return state, {"loss": loss, "learning_rate": now, "gradient_norm": new.grad_norm}

    return step


def gradients(state, batch, frozen, prior, encode, micro_batches=1) -> tuple[jax.Array, Any]:
    """Loss, and gradients of the parameters, averaged over the micro-batches."""
    rng = jax.random.fold_in(state.rng, state.step)

    def one(part, rng):
        codes = encode(frozen, part["image"]) if "image" in part else part["codes"]
        # The frozen tokenizer is outside of what is differentiated.
        return jax.value_and_grad(loss)(state.params, prior, part["label"], codes, rng)

    if micro_batches == 1:
        return one(batch, rng)

    # Every device keeps its share of each micro-batch: example i goes to micro-batch i % k.
    def split(x):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)  # [k b/k ...]

    inputs = jax.tree.map(split, batch), jax.random.split(rng, micro_batches)

    def add(total, part):
        return jax.tree.map(jnp.add, total, one(*part)), None

    # From zeros, not from the first micro-batch: its program is compiled once, inside the scan.
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], inputs))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, start, inputs)
    return jax.tree.map(lambda x: x / micro_batches, total)


def loss(params, prior: ar.Prior, class_ids: jax.Array, codes: jax.Array, rng: jax.Array):
    """f32[]: mean cross-entropy of all codes of a batch, nats per code.

    Args:
        params: of the prior.
        prior: the module; its dropouts draw from `rng`.
        class_ids: i32[b].
        codes: int[b n].
        rng: key.
    """
    codes = codes.astype(jnp.int32)
    logits = prior.apply({"params": params}, class_ids, codes, rngs={"dropout": rng})
    return losses.cross_entropy(logits, codes).mean()
