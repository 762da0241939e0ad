"""Meshes over devices, and that sharing a batch among 8 of them changes nothing but the speed."""

import os
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from gigatok_jax import parallel
from gigatok_jax.errors import ConfigError
from gigatok_jax.run import metric_writer

ROOT = pathlib.Path(__file__).parents[1]

# Runs in a process of its own: the number of devices is fixed when jax starts.
ON_EIGHT_DEVICES = """
import jax
import ml_collections
import numpy as np

import tiny
from gigatok_jax import parallel
from gigatok_jax.train import objective
from gigatok_jax.train import tokenizer_step as step

PHASE = objective.Phase(shortcut=False, adversarial=True, entropy=True)
gradients = jax.jit(step.gradients, static_argnums=(3, 4, 5, 6))
config = tiny.config()
frozen_config = ml_collections.FrozenConfigDict(config)
mesh = parallel.make_mesh(ml_collections.ConfigDict({"data": -1, "fsdp": 2, "tensor": 1}))
assert mesh.shape["data"] == 4


def run(groups, place_state, place_images):
    parts = tiny.networks(groups)
    state = place_state(tiny.first_state(parts, config))
    images = place_images(tiny.images())
    return gradients(state, images, {}, PHASE, parts, frozen_config, groups)


def spread(images):
    array = parallel.global_array(images, parallel.split_batch(mesh))
    assert all(shard.data.shape[0] == 1 for shard in array.addressable_shards)
    return array


for groups in (1, 8):  # global statistics; those of each device
    ours = run(groups, lambda x: jax.device_put(x, parallel.replicated(mesh)), spread)
    expected = run(groups, jax.device_put, jax.device_put)
    np.testing.assert_array_equal(ours.codes, expected.codes)
    for part in ("generator", "discriminator", "stats", "scalars", "latents"):
        ours_part, expected_part = getattr(ours, part), getattr(expected, part)
        # Where addends cancel, the rounding is theirs: hence a share of the largest of all.
        largest = max(np.abs(y).max() for y in jax.tree.leaves(expected_part))
        for x, y in zip(jax.tree.leaves(ours_part), jax.tree.leaves(expected_part), strict=True):
            bound = 2e-5 * np.abs(y).max() + 1e-6 * largest
            np.testing.assert_allclose(x, y, rtol=0, atol=bound)
print("same")
"""


def mesh_config(**sizes):
    return ml_collections.ConfigDict({"data": 1, "fsdp": 1, "tensor": 1} | sizes)


def fake_mesh(**sizes):
    """A mesh for shapes alone."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_one_size_may_be_left_to_the_devices():
    mesh = parallel.make_mesh(mesh_config(data=-1))
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {}]
)
def test_sizes_that_do_not_cover_the_devices_are_refused(sizes):
    devices = [object()] * 8  # refused before anything asks what they are
    with pytest.raises(ConfigError, match="multiply to 8") as refused:
        parallel.make_mesh(mesh_config(**sizes), devices)
    assert f"data={mesh_config(**sizes).data}" in str(refused.value)


@pytest.mark.parametrize("sizes, shards", [({"data": 4, "tensor": 2}, 4), ({"fsdp": 8}, 8)])
def test_a_batch_is_shared_by_data_and_fsdp(sizes, shards):
    assert parallel.batch_shards(fake_mesh(**sizes)) == shards


@pytest.mark.parametrize("batch, micro", [(12, 1), (8, 2), (0, 1)])
def test_a_batch_that_the_devices_do_not_divide_is_refused(batch, micro):
    mesh = fake_mesh(data=8)
    with pytest.raises(ConfigError, match=rf"global_batch is {batch}, expected a multiple"):
        parallel.check_batch(mesh, batch, micro)
    with pytest.raises(ConfigError, match="micro_batches is 0, expected at least 1"):
        parallel.check_batch(mesh, 16, 0)


def test_a_batch_that_fits_is_taken():
    parallel.check_batch(fake_mesh(data=4, fsdp=2), 16, 2)


def test_rows_of_one_process_are_the_whole_array():
    mesh = parallel.make_mesh(mesh_config(data=-1))
    rows = np.arange(24, dtype=np.uint8).reshape(8, 3)
    array = parallel.global_array(rows, parallel.split_batch(mesh))
    np.testing.assert_array_equal(array, rows)
    assert parallel.replicated(mesh).is_fully_replicated


def on_devices(count, *arguments) -> subprocess.CompletedProcess:
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
    more = {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": tiny.PYTHONPATH,
    }
    command = [sys.executable, "-c", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, check=False
    )


def test_eight_devices_give_the_gradients_of_one():
    done = on_devices(8, ON_EIGHT_DEVICES)
    assert done.stdout.split() == ["same"], done.stderr


def test_a_run_on_two_devices_goes_through_its_phases(tmp_path):
    done = on_devices(2, tiny.SCRIPT, tmp_path / "cache", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    with tiny.small_programs(tiny.session() / "cache"):
        alone = metric_writer.read(tiny.finished_run())
    ours = metric_writer.read(tmp_path / "run")
    first = [
        next(row["train/loss"] for row in rows if "train/loss" in row) for rows in (ours, alone)
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    last = [
        next(row["eval/psnr"] for row in rows[::-1] if "eval/psnr" in row) for rows in (ours, alone)
    ]
    assert last[0] == pytest.approx(last[1], abs=0.2)  # dB; the codes of near ties may differ
