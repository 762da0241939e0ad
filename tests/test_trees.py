"""Paths of nested parameters and of optimizer states."""

import jax.numpy as jnp
import numpy as np
import optax

from gigatok_jax import trees


def test_unflatten_undoes_flatten():
    tree = {"a": {"b": np.arange(3), "c": {"d": np.float32(2)}}, "e": np.zeros((2, 2))}
    flat = trees.flatten(tree)
    assert list(flat) == ["a/b", "a/c/d", "e"]
    rebuilt = trees.unflatten(flat)
    assert list(rebuilt) == ["a", "e"] and list(rebuilt["a"]) == ["b", "c"]
    assert rebuilt["a"]["b"] is tree["a"]["b"]


def test_positions_and_fields_of_an_optimizer_state_are_part_of_the_path():
    chain = optax.chain(optax.clip(1.0), optax.scale_by_adam())
    paths = set(trees.flatten(chain.init({"w": jnp.zeros(2)})))
    assert paths == {"1/count", "1/mu/w", "1/nu/w"}


def test_none_and_empty_containers_have_no_leaves():
    assert trees.flatten({"a": None, "b": {}, "c": 1}) == {"c": 1}
