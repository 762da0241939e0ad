"""XLA's compiler for NVIDIA GPUs takes kernels and steps, without a GPU.

Needs its plugin, of the version of jax, in an environment of its own:
    pip install jax-cuda13-plugin==VERSION -r requirements.txt -r requirements-test.txt
    JAX_PLATFORMS=cpu python -m pytest -m gpu_compiler tests/test_gpu_compiler.py
"""

import re

import jax
import jax.numpy as jnp
import lowering
import pytest

from gigatok_jax import parallel
from gigatok_jax.benchmarks import plan as benchmark
from gigatok_jax.ops import attention, constrain
from gigatok_jax.planning import compiled, hardware, hlo, plan, shapes

pytestmark = pytest.mark.gpu_compiler


@pytest.fixture(autouse=True)
def compiler():
    if hardware.compiler(hardware.parse("h200x1")) is None:
        pytest.skip("no jax-cuda13-plugin")


def mesh_of(name):
    return parallel.make_mesh(benchmark.read("ss").mesh, hardware.compiler(hardware.parse(name)))


@pytest.mark.parametrize("name", ["h100x1", "h200x4", "b200x2"])
def test_kernels_run_on_every_gpus_own_tokens(name):
    made = lowering.search_and_loss(mesh_of(name), (64, 256, 8), 16384)
    text = made.as_text()
    assert text.count("xla.gpu.triton") == 5
    assert {one.kind for one in hlo.collectives(text)} <= {"all-reduce"}
    assert made.memory_analysis().temp_size_in_bytes < 20 * 2**20  # tokens x codes would be 1 GiB


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_costs_of_a_gpus_program(dtype):
    """A matrix product, convolutions and attention, with their gradients: FLOPs by hand."""
    mesh = mesh_of("h200x1")
    b, side, c, heads = 4, 32, 128, 2
    n = side * side

    def loss(weights, kernel, x):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        q = jnp.tanh(x.reshape(b, n, c) @ weights).reshape(b, n, heads, -1)
        return jnp.square(attention.attend(q, q, q).astype(jnp.float32)).sum()

    shapes = ((c, c), (3, 3, c, c), (b, side, side, c))
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.replicated(mesh)) for shape in shapes
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given).compile().as_text()
    product, convolution, scores = 2 * b * n * c * c, 2 * 9 * b * n * c * c, 2 * b * n * n * c
    # Half precision makes the scores again in the backward pass, as cuDNN's kernel does.
    attended = (2 + 4 + (dtype == jnp.bfloat16)) * scores
    expected = 3 * (product + convolution) + attended
    assert hlo.walk(text).flops == pytest.approx(expected, rel=0.05)


def test_the_stream_of_a_step_keeps_the_features_of_a_token_together(monkeypatch):
    batch, width = 48, 192  # sizes that nothing else has

    def apart():
        config = benchmark.read("ar:size=b,smoke")
        config.model.update(width=width, heads=3, kv_heads=3)
        config.train.update(global_batch=batch, dtype="bfloat16", unroll="gpu")
        topology, texts = hardware.parse("h200x1"), []
        with monkeypatch.context() as patch:
            patch.setattr(hlo, "walk", lambda text: texts.append(text) or walk(text))
            compiled.compile_for(config, topology, hardware.compiler(topology))
        return re.findall(rf"(?:bf16|f32)\[\d+,{width},{batch}\]", texts[0])

    walk = hlo.walk
    assert not apart()
    monkeypatch.setattr(constrain, "with_layout_constraint", lambda x, layout: x)
    assert apart()  # examples last, as looking up the rows of the codes begins the stream


def test_kernels_are_in_the_step_of_a_plan(monkeypatch):
    config = benchmark.read("bl:smoke")
    config.model.update(stem="patch")
    config.loss.update(discriminator="none", entropy=0.005)
    topology, texts = hardware.parse("h200x2"), []
    walk = hlo.walk
    monkeypatch.setattr(hlo, "walk", lambda text: texts.append(text) or walk(text))
    made = compiled.compile_for(config, topology, hardware.compiler(topology))
    assert made.fits and texts[0].count("xla.gpu.triton") == 5


def test_a_step_for_gpus_costs_what_its_shapes_say():
    config = benchmark.read("ar:size=b,smoke")
    config.model.update(width=512, heads=8, kv_heads=8)
    config.train.update(global_batch=32, dtype="bfloat16")
    config.mesh.update(data=2, fsdp=8)
    topology = hardware.parse("h200x16")
    made = compiled.compile_for(config, topology, hardware.compiler(topology))
    counted = shapes.analyse(config, shapes.trace(config, "gpu"), topology)
    assert made.how == plan.COMPILED and made.fits
    assert made.flops == pytest.approx(counted.flops, rel=0.1)
    far, expected = (
        sum(one.bytes for one in plans.traffic if one.far > 1) for plans in (made, counted)
    )
    assert 0.7 * expected < far < 1.5 * expected
