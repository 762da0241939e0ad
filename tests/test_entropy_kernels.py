"""The entropy loss's kernels: lowering without a device, and a mesh."""

import importlib
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import lowering
import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Runs in a process of its own: the number of devices is fixed when jax starts.
ON_EIGHT_DEVICES = """
import re
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from gigatok_jax.ops.entropy import entropy_loss

mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
z, codebook = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 16, 8), (128, 8)))
z, codebook = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, codebook))
spread = jax.device_put(z, NamedSharding(mesh, P(("data", "fsdp"))))
same = jax.device_put(codebook, NamedSharding(mesh, P()))


def graded(impl, groups):
    loss = lambda *x: entropy_loss(*x, 0.01, groups, impl=impl, interpret=impl != "xla")
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


for groups in (1, 8):  # global statistics; those of each device
    expected, (expected_dz, expected_de) = graded("xla", groups)(z, codebook)
    run = graded("pallas_gpu", groups).lower(spread, same).compile()
    value, (dz, de) = run(spread, same)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in ((dz, expected_dz), (de, expected_de)):
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
    assert dz.sharding.is_equivalent_to(spread.sharding, 3)
    program = run.as_text()
    assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program
print("same")
"""


def test_devices_sum_up_their_own_tokens():
    more = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    run = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert run.stdout.strip() == "same", run.stderr


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_lower_for_their_platform_without_it(platform):
    module = importlib.import_module(f"gigatok_jax.ops.entropy_{platform.replace('cuda', 'gpu')}")

    def all_passes(z, codebook):
        return module.backward(z, codebook, 0.01, *module.forward(z, codebook, 0.01))

    text = lowering.lowered(all_passes, platform, jnp.zeros((1000, 8)), jnp.zeros((4096, 8)))
    for name in ("entropy", "total", "token", "row"):
        assert f"entropy_{name}" in text
