"""The prior's parameters go to the original's names and back: every name, shape and bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule
from rule import GOLDEN

from gigatok_jax import trees
from gigatok_jax.conversion import ar as convert
from gigatok_jax.errors import CheckpointError
from gigatok_jax.model_config import PRIORS, model_config
from gigatok_jax.models import ar
from gigatok_jax.train import ar as training
from gigatok_jax.weights import names, prior_names

OPTIONS = {
    "rope": {"rope": True},
    "use_qk_norm": {"qk_norm": True},
    "use_adaLN": {"adaln": "full"},
    "use_simple_adaLN": {"adaln": "shared"},
}
MANIFESTS = sorted(path.stem for path in (GOLDEN / "manifests").glob("GPT-*.json"))
SMALL = {"layers": 3, "heads": 2, "width": 8, "vocab": 5, "tokens": 4, "classes": 3}
VARIANTS = {
    "plain": {},
    "full": {"adaln": "full", "kv_heads": 1},
    "shared": {"adaln": "shared", "qk_norm": True, "rope": True},
}


def manifest(name: str) -> tuple[dict, dict]:
    """A file of the original's names and shapes, and our config of that model."""
    size, _, option = name.removeprefix("GPT-").partition("_")
    content = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    return content, model_config(f"prior-{size}", **OPTIONS.get(option, {}))


def shapes_of(model) -> dict:
    """Our parameters as `jax.ShapeDtypeStruct`."""
    ids, codes = jnp.zeros(1, jnp.int32), jnp.zeros((1, model.tokens), jnp.int32)
    return jax.eval_shape(ar.make(model).init, jax.random.key(0), ids, codes)["params"]


def tensor_shape(entry, shape) -> tuple[int, ...]:
    """Shape of the original's tensor from the shape of our array."""
    shape = shape if entry.layer is None else shape[1:]
    shape = shape if entry.half is None else (*shape[:-1], shape[-1] // 2)
    return names.LAYOUTS[entry.layout][1](np.broadcast_to(False, shape)).shape  # holds no memory


def tensor_shapes(model) -> dict[str, tuple[int, ...]]:
    """The original's names and shapes, in its order, as our table and our module give them."""
    params = shapes_of(model)
    return {
        entry.name: tensor_shape(entry, trees.flatten(params)[entry.path].shape)
        for entry in prior_names.entries(model)
    }


def rule_params(model) -> dict:
    """Parameters by rule, through the name table."""
    return convert.from_torch(rule.rule_state(tensor_shapes(model).items()), model)


def random_state(model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in tensor_shapes(model).items()
    }


def test_there_is_a_manifest_of_every_size_and_option():
    sizes = {f"GPT-{name.removeprefix('prior-')}" for name in PRIORS}
    assert sizes | {f"GPT-B_{option}" for option in OPTIONS} == set(MANIFESTS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_shapes_order_and_count_are_the_originals(name):
    content, model = manifest(name)
    ours, theirs = tensor_shapes(model), content["state_dict"]
    assert list(ours) == list(theirs)
    assert ours == {key: tuple(shape) for key, shape in theirs.items()}
    count = sum(x.size for x in jax.tree.leaves(shapes_of(model)))
    assert count == content["total_params"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_is_decayed_has_two_axes_in_the_original(name):
    content, model = manifest(name)
    for entry in prior_names.entries(model):
        matrix = len(content["state_dict"][entry.name]) >= 2
        assert training.is_decayed(entry.path) == matrix, entry


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_same_state_dict(variant):
    model = model_config("prior-B", **SMALL | VARIANTS[variant])
    state = random_state(model)
    params = convert.from_torch(state, model)
    assert jax.tree.map(np.shape, params) == jax.tree.map(jnp.shape, shapes_of(model))
    back = convert.to_torch(jax.tree.map(jnp.asarray, params), model)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_two_tensors_lie_side_by_side_in_one_parameter():
    model = model_config("prior-B", **SMALL)
    state = random_state(model)
    joined = convert.from_torch(state, model)["blocks"]["mlp"]["gate_up"]["kernel"]
    for i in range(3):
        pair = [state[f"layers.{i}.feed_forward.{name}.weight"].T for name in ("w1", "w3")]
        np.testing.assert_array_equal(joined[i], np.concatenate(pair, axis=1))


def test_a_parameter_may_join_two_tensors_without_a_stack():
    table = [names.Entry("both", "a", "dense", half=0), names.Entry("both", "b", "dense", half=1)]
    state = {"a": np.arange(6.0).reshape(2, 3), "b": -np.arange(6.0).reshape(2, 3)}
    params = names.from_torch(state, table)
    np.testing.assert_array_equal(params["both"], np.concatenate([state["a"].T, state["b"].T], 1))
    jax.tree.map(np.testing.assert_array_equal, names.to_torch(params, table), state)


def test_every_tensor_is_read_once():
    model = model_config("prior-B", **SMALL)
    reads = []

    class Counted(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    convert.from_torch(Counted(random_state(model)), model)
    assert reads == [entry.name for entry in prior_names.entries(model)]


def test_a_state_dict_of_another_model_is_refused():
    model = model_config("prior-B", **SMALL)
    state = random_state(model)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("layers.2.")}
    with pytest.raises(CheckpointError, match=r"7 tensors are missing, first layers\.2\.att"):
        convert.from_torch(state, model)
