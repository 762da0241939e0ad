"""How well a prior predicts codes: its mean loss over a held-out set.

Axes: b batch, n codes of an image.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gigatok_jax.errors import DataError
from gigatok_jax.models import ar


def make_losses(prior: ar.Prior) -> Callable[..., jax.Array]:
    """Jitted `losses(params, class_ids, codes)`: i32[b], i32[b n] -> f32[b], nats per code."""

    @jax.jit
    def losses(params, class_ids, codes):
        logits = prior.apply({"params": params}, class_ids, codes)  # [b n v]
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean(-1)

    return losses


def mean_loss(losses: Callable, params: Any, batches: Iterable[dict]) -> dict[str, float]:
    """Mean cross-entropy over all images, each counted once whatever the batches.

    Args:
        losses: from `make_losses`.
        params: of the prior.
        batches: "codes" i32[b n], "label" i32[b] and "mask" bool[b], False for padding.

    Returns:
        loss (nats per code), perplexity (its exponential) and images (how many).

    Raises:
        DataError: no image at all.
    """
    total, count = 0.0, 0
    for batch in batches:
        keep = np.asarray(batch["mask"])
        class_ids = jnp.where(keep, batch["label"], 0)
        values = np.asarray(losses(params, class_ids, batch["codes"]), np.float64)
        total, count = total + values[keep].sum(), count + int(keep.sum())
    if not count:
        raise DataError("there is no image to take the loss of")
    return {"loss": total / count, "perplexity": math.exp(total / count), "images": count}
