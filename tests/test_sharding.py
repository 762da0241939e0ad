"""Rules that divide a state over a mesh, and that dividing changes nothing but where things lie."""

import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny

from gigatok_jax import model_config, parallel
from gigatok_jax.errors import ConfigError
from gigatok_jax.models import parameters
from gigatok_jax.ops.constrain import BATCH, constrain
from gigatok_jax.run import checkpoint
from gigatok_jax.train import ar_step
from gigatok_jax.trees import flatten

ROOT = pathlib.Path(__file__).parents[1]
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
MODELS = {
    "S-S": {},
    "S-S-2D": {},
    "XL-XXL": {},
    "prior-XXL": {},
    "prior-B": {"adaln": "full"},
}


def abstract_mesh(**sizes):
    """A mesh of devices that are not there."""
    shape = tuple(sizes.get(axis, 1) for axis in parallel.AXES)
    return jax.sharding.AbstractMesh(shape, parallel.AXES)


def config_of(model, rules=""):
    return ml_collections.ConfigDict({"model": model, "mesh": {"rules": rules}})


def placed(params, mesh, rules):
    return parallel.with_shardings(params, parallel.shardings(params, mesh, rules))


def table_rows(lines):
    """Rows of a printed table, without its header and frame."""
    return [line for line in lines if line.startswith("| ")][1:]


@pytest.mark.parametrize("kind", parallel.RULES)
def test_every_rule_names_something(kind):
    paths = []
    for name, fields in MODELS.items():
        if name.startswith("prior") == (kind == "prior"):
            params = parameters.abstract_params(model_config(name, **fields))
            paths += list(flatten(params))
    for rule in parallel.RULES[kind]:
        assert any(re.search(rf"(^|/){rule.pattern}$", path) for path in paths), rule


@pytest.mark.parametrize("name", ["XL-XXL", "prior-XXL"])
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_large_models_are_divided(name, axis):
    """Eight parts: what is left whole is a small share (tensor leaves the convolutions whole)."""
    model = model_config(name)
    params = parameters.abstract_params(model)
    rules = parallel.rules_of(config_of(model))
    total = parallel.bytes_per_device(placed(params, abstract_mesh(), rules))
    divided = placed(params, abstract_mesh(**{axis: 8}), rules)
    assert total == 4 * parameters.count(params)
    assert parallel.bytes_per_device(divided) < total * (0.13 if axis == "fsdp" else 0.17)
    rows = table_rows(parallel.placement(divided))
    assert len(rows) > 4 and any(axis in row for row in rows)


def test_moments_and_averages_lie_as_their_parameter():
    params = {"blocks": {"mlp": {"gate_up": {"kernel": jnp.zeros((2, 8, 16))}}}}
    state = {"params": params, "ema_params": params, "opt_state": [{"mu": params, "count": 0}]}
    state = jax.eval_shape(lambda: state)
    places = parallel.shardings(state, abstract_mesh(fsdp=2, tensor=2), parallel.RULES["prior"])
    specs = {tuple(place.spec) for place in jax.tree.leaves(places)}
    assert specs == {(None, "fsdp", "tensor"), ()}


def test_a_rule_of_the_config_comes_first():
    model = model_config("prior-B", layers=2)
    rules = parallel.rules_of(config_of(model, "attention/qkv/kernel=-,fsdp; head/kernel=-,-"))
    places = parallel.shardings(parameters.abstract_params(model), abstract_mesh(fsdp=4), rules)
    spec = places["blocks"]["attention"]["qkv"]["kernel"].spec
    assert tuple(spec) == (None, None, "fsdp")
    assert not any(places["head"]["kernel"].spec)


@pytest.mark.parametrize(
    ("rules", "sizes", "words"),
    [
        ("", {"tensor": 7}, "has a dimension of .* which mesh.tensor=7 does not divide"),
        ("nothing/here=fsdp", {}, "mesh.rules: 'nothing/here' names no array of this model"),
        ("mlp/up/kernel=-,fsdp", {}, "'mlp/up/kernel' names no array"),  # of the tokenizer's table
        ("head/kernel=rows", {}, "expected pattern=axis,axis with axes of data, fsdp, tensor or -"),
        ("(=fsdp", {}, "is no regular expression"),
        ("norm/scale=fsdp,tensor", {}, "has 2 axes, norm/scale is"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, sizes, words):
    model = model_config("prior-B", layers=2)
    params = parameters.abstract_params(model)
    with pytest.raises(ConfigError, match=words):
        parallel.shardings(
            params, abstract_mesh(**sizes), parallel.rules_of(config_of(model, rules))
        )


def prior_state():
    rng = np.random.default_rng(0)
    params = {"head": {"kernel": jnp.asarray(rng.normal(size=(2048, 1024)), jnp.float32)}}
    average = jax.tree.map(lambda x: x + 1, params)
    return ar_step.PriorState(jnp.zeros((), int), jax.random.key(0), params, average, ())


def on_host(state, mesh, kind="pinned_host"):
    config = ml_collections.ConfigDict({"train": {"ema_memory": kind}})
    places = parallel.shardings(state, mesh, parallel.RULES["prior"])
    return parallel.place_average(places, mesh, config)


def test_the_average_may_lie_in_the_hosts_memory(tmp_path):
    state, mesh = prior_state(), parallel.make_mesh(ONE, jax.devices()[:1])
    abstract = parallel.with_shardings(state, on_host(state, mesh))
    assert parallel.bytes_per_device(abstract) == 2048 * 1024 * 4 + 4
    rows = table_rows(parallel.placement(abstract))
    assert ["MiB (host)" in row for row in rows] == [False, True]
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(1, jax.device_put(state, on_host(state, mesh)), {})
    saver.wait()
    restored, _ = saver.restore(abstract, 1)
    saver.close()
    (average,) = jax.tree.leaves(restored.ema_params)
    (fetched,) = jax.tree.leaves(parallel.to_device(restored.ema_params))
    assert average.sharding.memory_kind == "pinned_host" and fetched.is_fully_addressable
    assert fetched.sharding.memory_kind == "device"
    np.testing.assert_array_equal(fetched, state.ema_params["head"]["kernel"])


def test_memory_that_is_not_there_is_refused():
    class Device:
        id, process_index, platform, device_kind = 0, 0, "toy", "toy"

        def addressable_memories(self):
            return [types.SimpleNamespace(kind="device")]

    state, mesh = prior_state(), abstract_mesh()
    with pytest.raises(ConfigError, match="'disk', expected one of device, pinned_host"):
        on_host(state, mesh, "disk")
    mesh = jax.sharding.Mesh(np.array([[[Device()]]]), parallel.AXES)
    with pytest.raises(ConfigError, match="ema_memory is 'pinned_host', toy has device: leave"):
        on_host(state, mesh)


def test_without_a_mesh_nothing_is_asked():
    x = jnp.ones((3, 5))
    assert constrain(x, BATCH) is x


UPDATE = """
import sys
import jax, ml_collections, numpy as np
import tiny
from configs import common
from gigatok_jax import parallel
from gigatok_jax.models import ar, discriminator, tokenizer
from gigatok_jax.train import ar as training
from gigatok_jax.train import ar_step, networks, objective, optim
from gigatok_jax.train import tokenizer_step as step

STEM, MESHES = sys.argv[1], [tuple(map(int, text.split("x"))) for text in sys.argv[2:]]
RATE = 1e-3
config = tiny.config()
config.model.update(stem=STEM, patch_size=8 if STEM == "patch" else 4, cnn_channels=32)
config.model.update(latent_tokens=16, codebook_size=64, query_init="mean")
parts = networks.Networks(tokenizer.make(config.model), discriminator.PatchGAN(8))
first = tiny.first_state(parts, config)
wide = lambda x: x * 5 * np.prod(x.shape[x.ndim == 3 : -1]) ** -0.5 if x.ndim > 1 else x
first = first.replace(
    params=jax.tree.map(wide, first.params), discriminator=jax.tree.map(wide, first.discriminator)
)
phase = objective.Phase(shortcut=True, adversarial=True, entropy=True)
optimizers = tiny.optimizers(config)

prior_config = common.prior("tiny", "prior-B")
small = {"layers": 2, "heads": 4, "kv_heads": 4, "width": 64, "vocab": 64, "tokens": 16}
prior_config.model.update(small, classes=10)
prior = ar.make(prior_config.model, dropouts=ar.Dropouts())
optimizer = optim.make_optimizer(prior_config.optim, training.is_decayed)
learned = ar_step.create(ar.make(prior_config.model), optimizer, 0)
noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape)
learned = learned.replace(params=jax.tree.map(noise, learned.params))
rng = np.random.default_rng(0)
batch = {"label": np.arange(8, dtype=np.int32), "codes": rng.integers(0, 64, (8, 16))}
first, learned = jax.device_get((first.replace(rng=None), learned.replace(rng=None)))


def run(sizes):
    axes = ml_collections.ConfigDict(dict(zip(parallel.AXES, sizes)))
    mesh = parallel.make_mesh(axes, jax.devices()[: int(np.prod(sizes))])

    def place(tree, config):
        tree = tree.replace(rng=jax.random.key(0))
        places = parallel.shardings(tree, mesh, parallel.rules_of(config))
        return jax.device_put(tree, places), places

    share = lambda x: parallel.global_array(x, parallel.split_batch(mesh))
    with jax.set_mesh(mesh):
        before, places = place(first, config)
        update = step.make(parts, optimizers, config, 1, 1, places)
        made, scalars = update(before, share(tiny.images(8)), {}, phase)
        before, places = place(learned, prior_config)
        update = ar_step.make(prior, optimizer, lambda step: RATE, 0.9, None, 1, places)
        prior_made, more = update(before, {name: share(x) for name, x in batch.items()}, {})
    scalars |= {f"prior_{name}": value for name, value in more.items()}
    made, prior_made = made.replace(rng=None), prior_made.replace(rng=None)
    return jax.device_get((made, prior_made, scalars))


def networks(made, prior_made):
    yield made.params, made.opt_state[1].mu, first.params
    yield made.discriminator, made.discriminator_opt_state[1].mu, first.discriminator
    yield prior_made.params, prior_made.opt_state[1].mu, learned.params


def check_near(ours, expected, floor):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y) + floor


def check_network(ours, expected):
    # After the first update the first moment is a tenth of the clipped gradient.
    (params, grads, before), (whole_params, whole_grads, _) = ours, expected
    # Zero in exact arithmetic (key biases, biases before a norm), a gradient is rounding.
    rounding = 1e-6 * max(np.linalg.norm(g) for g in jax.tree.leaves(whole_grads))
    check_near(grads, whole_grads, rounding)
    clear = jax.tree.map(
        lambda g: abs(g) > 2e-2 * np.linalg.norm(g) / g.size**0.5 + rounding, whole_grads
    )
    for x, y, start, plain in zip(*map(jax.tree.leaves, (params, whole_params, before, clear))):
        assert np.all(abs(x - y)[plain] <= 2e-2 * RATE)
        assert np.all(abs(x - start) <= 1.1 * RATE)
    assert np.mean(np.concatenate([x.reshape(-1) for x in jax.tree.leaves(clear)])) > 0.5


whole = run((1, 1, 1))
for sizes in MESHES:
    made = run(sizes)
    assert (made[0].codebook_used == whole[0].codebook_used).all(), sizes
    check_near(made[2], whole[2], 1e-7)
    check_near(made[0].discriminator_stats, whole[0].discriminator_stats, 1e-7)
    for ours, expected in zip(networks(*made[:2]), networks(*whole[:2])):
        check_network(ours, expected)
print("same")
"""


def run_updates(*arguments, **more):
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": tiny.PYTHONPATH,
        **more,
    }
    command = [sys.executable, "-c", UPDATE, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_a_divided_state_is_updated_as_a_whole_one():
    """Tokenizer with its discriminator and entropy loss, and prior: all three axes at once."""
    run_updates("patch", "2x2x2", JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@pytest.mark.slow
def test_every_mesh_has_the_same_update():
    run_updates("cnn", "8x1x1", "1x8x1", "2x4x1", "2x2x2", "1x2x4")
