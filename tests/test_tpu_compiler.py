"""The TPU's own compiler takes the kernels and memory of the host, without a TPU.

Needs an environment of its own, since jax takes a libtpu that it finds for a TPU:
    pip install "jax[tpu]" -r requirements.txt -r requirements-test.txt
    JAX_PLATFORMS=cpu python -m pytest -m tpu_compiler tests/test_tpu_compiler.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigatok_jax import parallel
from gigatok_jax.ops import codebook_search_tpu, entropy_tpu
from gigatok_jax.train import optim
from gigatok_jax.train import program as program_lib

pytestmark = pytest.mark.tpu_compiler
TOPOLOGIES = ["v5e:2x4", "v5p:2x2x1"]


def compile_for(topology, function, *shapes):
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    alone = NamedSharding(Mesh(np.array(devices[:1]), ("device",)), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=alone) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize("width", [4, 8, 64])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_codebook_search_compiles(topology, width):
    compiled = compile_for(topology, codebook_search_tpu.search, (5000, width), (16384, width))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25 < 4 * 5000 * 16384


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_entropy_loss_compiles(topology, width):
    def all_passes(z, codebook):
        return entropy_tpu.backward(z, codebook, 0.01, *entropy_tpu.forward(z, codebook, 0.01))

    compiled = compile_for(topology, all_passes, (5000, width), (16384, width))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**26 < 4 * 5000 * 16384


def test_an_average_on_the_host_spares_memory_of_the_chip():
    """With a state that nearly fills it: the compiler only saves where it has to."""
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    here = NamedSharding(Mesh(np.array(devices[:1]), ("device",)), PartitionSpec())
    adam, layers, width = optax.scale_by_adam(0.9, 0.95), 36, 5120

    def create():
        params = [jnp.zeros((width, width))] * layers
        return {"params": params, "ema": params, "adam": adam.init(params)}

    def loss(params, x):
        for kernel in params:
            x += jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def step(state, x):
        grads = jax.grad(loss)(state["params"], x)
        updates, moments = adam.update(grads, state["adam"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.update_ema(state["ema"], params, 0.9)
        return {"params": params, "ema": ema, "adam": moments}

    def needed(kind):
        shapes = jax.eval_shape(create)
        places = jax.tree.map(lambda _: here, shapes)
        places["ema"] = jax.tree.map(lambda _: here.with_memory_kind(kind), shapes["ema"])
        x = jax.ShapeDtypeStruct((1024, width), jnp.float32, sharding=here)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
        return program_lib.memory_needed(
            jitted.lower(parallel.with_shardings(shapes, places), x).compile()
        )

    size = 4 * layers * width**2
    assert needed("device") - needed("pinned_host") > 0.7 * size
