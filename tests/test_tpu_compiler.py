"""The TPU's own compiler takes the kernels, without a TPU.

Needs an environment of its own, since jax takes a libtpu that it finds for a TPU:
    pip install "jax[tpu]" -r requirements.txt -r requirements-test.txt
    JAX_PLATFORMS=cpu python -m pytest -m tpu_compiler tests/test_tpu_compiler.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigatok_jax.ops import codebook_search_tpu, entropy_tpu

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
