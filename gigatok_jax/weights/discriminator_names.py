"""Converts the weights of discriminators between our names and PyTorch's, both ways.

Our paths begin with the collection: `params`, `batch_stats` (PatchGAN) or `spectral` (DINO heads).
"""

from collections.abc import Mapping

import numpy as np

from gigatok_jax.errors import one_of
from gigatok_jax.weights import names
from gigatok_jax.weights.names import Entry

_COUNTER = "num_batches_tracked"  # batches that a norm has seen: an integer, absent from old files


def from_torch(state: Mapping, kind: str) -> dict:
    """Converts the state dict of a PyTorch discriminator to the variables of ours, a nested dict.

    Args:
        state: arrays by name, "main.0.weight" or "heads.0.0.0.bias" and so on.
        kind: "patchgan" or "dino" (the trainable heads; the trunk is a frozen network).

    Raises:
        CheckpointError: a tensor is missing.
        ConfigError: unknown kind.
    """
    table = entries(kind)
    counters = [entry.name for entry in table if entry.name.endswith(_COUNTER)]
    # Integers of jax have 32 bits.
    counts = {name: np.asarray(state.get(name, 0), np.int32) for name in counters}
    return names.from_torch({**state, **counts}, table)


def to_torch(variables: Mapping, kind: str) -> dict[str, np.ndarray]:
    """Converts the variables of a discriminator of ours, a nested dict, to a PyTorch state dict."""
    state = names.to_torch(variables, entries(kind))
    counts = {name: np.asarray(x, np.int64) for name, x in state.items() if name.endswith(_COUNTER)}
    return state | counts


def entries(kind: str) -> list[Entry]:
    """Lists the path and the PyTorch name of each tensor of a discriminator, in PyTorch's order."""
    one_of("discriminator", kind, ("patchgan", "dino"))
    return _patchgan() if kind == "patchgan" else _dino_heads()


def _patchgan() -> list[Entry]:
    table = names.layer_pair("params/conv_0", "main.0", "conv")
    for i in range(1, 4):
        conv, norm = f"main.{3 * i - 1}", f"main.{3 * i}"
        table += names.layer_pair(f"params/conv_{i}", conv, "conv", bias=False)
        table += names.norm_pair(f"params/norm_{i}", norm)
        table += [
            Entry(f"batch_stats/norm_{i}/mean", f"{norm}.running_mean"),
            Entry(f"batch_stats/norm_{i}/var", f"{norm}.running_var"),
            Entry(f"batch_stats/norm_{i}/count", f"{norm}.{_COUNTER}"),
        ]
    return table + names.layer_pair("params/conv_4", "main.11", "conv")


def _dino_heads() -> list[Entry]:
    table = []
    for i in range(5):
        ours, theirs = f"head_{i}", f"heads.{i}"
        table += _spectral(f"{ours}/conv_0", f"{theirs}.0.0")
        table += names.norm_pair(f"params/{ours}/norm_0", f"{theirs}.0.1")
        table += _spectral(f"{ours}/conv_1", f"{theirs}.1.fn.0")
        table += names.norm_pair(f"params/{ours}/norm_1", f"{theirs}.1.fn.1")
        table += _spectral(f"{ours}/conv_2", f"{theirs}.2")
    return table


def _spectral(ours: str, theirs: str) -> list[Entry]:
    return [
        Entry(f"params/{ours}/bias", f"{theirs}.bias"),
        Entry(f"params/{ours}/kernel", f"{theirs}.weight_orig", "conv1d"),
        Entry(f"spectral/{ours}/u", f"{theirs}.weight_u"),
        Entry(f"spectral/{ours}/v", f"{theirs}.weight_v"),
    ]
