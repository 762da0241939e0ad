"""Names of the discriminators, ours and PyTorch's.

A table row is (our path, their name, transform). A path begins with its collection. A name with
"{}" stands for one tensor per block; ours holds them stacked along a leading axis.
"""

from collections.abc import Mapping

import numpy as np

from gigatok_jax.errors import CheckpointError

# Layout of theirs -> ours as an axis order; ours -> theirs is its inverse.
_AXES = {"plain": None, "dense": (1, 0), "conv": (2, 3, 1, 0), "conv1d": (2, 1, 0)}


def patchgan_rules(num_layers: int = 3) -> list[tuple[str, str, str]]:
    """Name table of the PatchGAN: modules of the original are numbered in one sequence."""
    last = 3 * num_layers + 2
    rules = [
        ("params/conv_0/kernel", "main.0.weight", "conv"),
        ("params/conv_0/bias", "main.0.bias", "plain"),
        (f"params/conv_{num_layers + 1}/kernel", f"main.{last}.weight", "conv"),
        (f"params/conv_{num_layers + 1}/bias", f"main.{last}.bias", "plain"),
    ]
    for i in range(1, num_layers + 1):
        norm = f"main.{3 * i}"
        rules += [
            (f"params/conv_{i}/kernel", f"main.{3 * i - 1}.weight", "conv"),
            (f"params/norm_{i}/scale", f"{norm}.weight", "plain"),
            (f"params/norm_{i}/bias", f"{norm}.bias", "plain"),
            (f"batch_stats/norm_{i}/mean", f"{norm}.running_mean", "plain"),
            (f"batch_stats/norm_{i}/var", f"{norm}.running_var", "plain"),
            (f"batch_stats/norm_{i}/count", f"{norm}.num_batches_tracked", "counter"),
        ]
    return rules


def from_torch(state: Mapping[str, np.ndarray], rules) -> dict:
    """Variables of a linen module from a state dict, by a name table.

    Args:
        state: arrays by PyTorch name; names outside the table are ignored.
        rules: rows of (our path, their name, transform).

    Raises:
        CheckpointError: a name of the table is not in `state`.
    """
    variables = {}
    for path, name, transform in rules:
        *parents, leaf = path.split("/")
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _gather(state, name, transform)
    return variables


def to_torch(variables: Mapping, rules) -> dict[str, np.ndarray]:
    """State dict of PyTorch names from linen variables; the inverse of `from_torch`."""
    state = {}
    for path, name, transform in rules:
        leaf = variables
        for part in path.split("/"):
            leaf = leaf[part]
        slices = enumerate(leaf) if "{}" in name else [(None, leaf)]
        for i, value in slices:
            key = name if i is None else name.format(i)
            state[key] = _to_theirs(np.asarray(value), transform)
    return state


def _gather(state: Mapping, name: str, transform: str) -> np.ndarray:
    if "{}" not in name:
        return _to_ours(_named(state, name), transform)
    depth = 0
    while name.format(depth) in state:
        depth += 1
    names = [name.format(i) for i in range(max(depth, 1))]
    return np.stack([_to_ours(_named(state, each), transform) for each in names])


def _named(state: Mapping, name: str) -> np.ndarray:
    if name not in state:
        raise CheckpointError(f"weights have no tensor {name!r}; this file is of another network")
    return np.asarray(state[name])


def _to_ours(x: np.ndarray, transform: str) -> np.ndarray:
    if transform == "counter":
        return x.astype(np.int32)
    if transform == "head":  # a 1 x 1 convolution to one channel, here a vector
        return x.astype(np.float32).reshape(-1)
    axes = _AXES[transform]
    return x.astype(np.float32) if axes is None else x.astype(np.float32).transpose(axes)


def _to_theirs(x: np.ndarray, transform: str) -> np.ndarray:
    if transform == "counter":
        return x.astype(np.int64)
    if transform == "head":
        return x.reshape(1, -1, 1, 1)
    axes = _AXES[transform]
    return x if axes is None else x.transpose(np.argsort(axes))
