"""Programs for TPUs that are not there: what they cost is kept, and has not moved.

Needs an environment with jax[tpu], see test_tpu_compiler.py. After a change that is meant:
    JAX_PLATFORMS=cpu python -m gigatok_jax.benchmarks.plan --keep tests/golden/plans.json
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import lowering
import pytest

from gigatok_jax import library, parallel
from gigatok_jax.benchmarks import plan as benchmark
from gigatok_jax.models import tokenizer
from gigatok_jax.ops import implementation
from gigatok_jax.planning import compiled, hardware, hlo, plan, shapes

pytestmark = pytest.mark.tpu_compiler
KEPT = pathlib.Path(__file__).parent / "golden" / "plans.json"


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu")


@pytest.mark.parametrize("sizes", [{}, {"data": 1, "fsdp": 4}, {"data": 2, "tensor": 2}])
@pytest.mark.parametrize("groups", [1, 4])
def test_kernels_run_on_every_chips_own_tokens(sizes, groups):
    config = benchmark.read("ss").mesh
    config.update(sizes)
    mesh = parallel.make_mesh(config, hardware.compiler(hardware.parse("v5e:2x2")))
    text = lowering.search_and_loss(mesh, (32, 64, 8), 4096, groups).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 5
    sent = hlo.collectives(text)
    assert {one.kind for one in sent} == {"all-reduce"}  # of means and of gradients of rows
    assert sum(one.bytes for one in sent) < 2 * 4096 * (8 + 2) * 4


def test_codes_and_reconstructions_need_no_mesh_in_force(monkeypatch):
    """As in an evaluation between two steps; the compiler divides the search by itself."""
    devices = hardware.compiler(hardware.parse("v5e:2x2"))
    mesh = parallel.make_mesh(benchmark.read("ss").mesh, devices)
    monkeypatch.setattr(implementation, "_default", lambda: devices[0])
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    config = benchmark.read("ss:smoke").model
    config.update(stem="patch", codebook_size=4096)
    images = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(tokenizer.make(config).init, jax.random.key(0), images)["params"]
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)
    given = parallel.with_shardings(shapes, whole), parallel.with_shardings(images, split)
    encode = jax.jit(lambda params, x: library.encode(params, x, config), out_shardings=split)
    text = encode.lower(*given).compile().as_text()
    assert not hlo.collectives(text) and "tpu_custom_call" not in text


def test_slices_send_gradients_alone_over_the_network():
    config = benchmark.read("ar:size=b,smoke")
    config.model.update(width=512, heads=8, kv_heads=8)
    config.train.update(global_batch=32, dtype="bfloat16")
    config.mesh.update(data=2, fsdp=4, dcn=2)
    topology = hardware.parse("v5e:2x2", 2)
    made = compiled.compile_for(config, topology, hardware.compiler(topology))
    assert made.how == plan.COMPILED and made.fits and made.flops > 0
    traced = shapes.trace(config, "tpu")
    far, counted = (
        sum(one.bytes for one in plans.traffic if one.far > 1)
        for plans in (made, shapes.analyse(config, traced, topology))
    )
    assert 0.8 * counted < far < 1.3 * counted


@pytest.mark.parametrize("name", benchmark.CASES)
def test_compiled_memory_flops_and_collectives_have_not_moved(name):
    kept = json.loads(KEPT.read_text())
    lines = benchmark.moved(kept["figures"][name], benchmark.measure(benchmark.CASES[name]))
    assert not lines, f"{name}, kept with {kept['versions']}: {'; '.join(lines)}"
