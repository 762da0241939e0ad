"""Trees as dicts by path: "encoder/blocks/attention/query/kernel" names one array of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax


def path(keys: Sequence[Any]) -> str:
    """Returns the path of a leaf, such as "a/b/0", from the keys that `jax.tree_util` yields."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any tree by path, in the tree's order.

    None and empty containers yield no leaf.
    """
    return {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Makes nested dicts of leaves by path such as "a/b/0"; positions in a sequence become keys."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")
