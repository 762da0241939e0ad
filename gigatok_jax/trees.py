"""Paths of trees: "encoder/blocks/attention/query/kernel" names one array of nested parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax


def path(keys: Sequence[Any]) -> str:
    """Name of a leaf, "a/b/0", from the keys that `jax.tree_util` gives with it."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by path, in the tree's order; None and empty containers have no leaves."""
    return {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of the leaves that `flatten` names; positions in a sequence become keys."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")
