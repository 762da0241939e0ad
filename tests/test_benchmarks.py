"""The benchmarks run where there is no accelerator, and refuse wrong results."""

import json
import sys
import tarfile
import types

import jax
import numpy as np
import pytest
from PIL import Image
from test_cluster import end, free_address, start

from gigatok_jax import parallel
from gigatok_jax.benchmarks import kernels, learning, training
from gigatok_jax.benchmarks import plan as benchmark
from gigatok_jax.planning import plan


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_a_table_on_a_cpu(kernel, monkeypatch, tmp_path, capsys):
    sizes = ["--tokens", "128", "256", "--rows", "64", "--at", "128", "64", "--repeats", "1"]
    options = ["--kernel", kernel, *sizes, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    kernels.main()
    said = capsys.readouterr().out
    written = (tmp_path / f"{kernel}.md").read_text()
    assert "| 256 | 64 | xla |" in said and "| 256 | 64 | xla |" in written
    (row, *_) = json.loads((tmp_path / f"{kernel}.json").read_text())
    assert row["tokens"] == 128 and row["ms"] > 0
    assert {path.stem for path in tmp_path.iterdir()} == {kernel}


@pytest.mark.parametrize(
    ("kernel", "width", "names"),
    [
        ("search", 32, ["xla", "pallas_gpu"]),
        ("search", 65, ["xla"]),
        ("entropy", 16, ["xla", "pallas_gpu"]),
        ("entropy", 32, ["xla"]),  # wider than its kernel takes, though not than the search's
    ],
)
def test_a_kernel_is_measured_at_the_widths_that_it_supports(monkeypatch, kernel, width, names):
    hopper = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0"
    )
    monkeypatch.setattr(jax, "devices", lambda *_: [hopper])
    assert kernels.implementations(kernels.KERNELS[kernel], width) == names


def test_a_wrong_search_is_counted():
    z, codebook = kernels.unit_vectors(0, 100, 8), kernels.unit_vectors(1, 32, 8)
    codes = np.square(z[:, None] - codebook).sum(-1).argmin(1)
    assert kernels.count_wrong(z, codebook, codes) == 0
    codes[:7] = (codes[:7] + 1) % 32
    assert kernels.count_wrong(z, codebook, codes) == 7


def test_gradients_are_checked_against_those_of_differences():
    z, codebook = (kernels.unit_vectors(i, 6, 4).astype(np.float64) for i in range(2))
    dz, _ = kernels.float64_gradients(z, codebook)
    step = np.zeros_like(z)
    step[2, 1] = 1e-6

    def loss(z):
        logits = -np.square(z[:, None] - codebook).sum(-1) / kernels.TEMPERATURE
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = p.mean(0)
        of_tokens = -(p * np.log(np.maximum(p, 1e-300))).sum(1).mean()
        return of_tokens + (mean * np.log(mean + kernels.EPSILON)).sum()

    slope = (loss(z + step) - loss(z - step)) / 2e-6
    assert dz[2, 1] == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_shares_of_a_trace():
    """Nothing, compute, both, a collective alone; then a copy at the end."""
    events = [
        ("gemm", 10.0, 50.0),
        ("ncclDevKernel_AllGather_RING_LL", 40.0, 70.0),
        ("ncclDevKernel_AllReduce_Sum_bf16", 60.0, 80.0),
        ("MemcpyD2D", 100.0, 110.0),
    ]
    found = training.shares(events)
    assert found == pytest.approx({"collectives": 0.4, "exposed": 0.3, "idle": 0.2})
    assert training.shares([]) == {}


def test_efficiency_is_against_the_same_batch_per_device():
    one = {"config": "xlxxl", "dtype": "bfloat16", "remat": "blocks", "micro_batches": 1}
    one["unrolled"] = False
    one |= {"devices": 1, "global_batch": 16, "images_per_second": 50.0}
    four = one | {"devices": 4, "global_batch": 64, "images_per_second": 180.0}
    assert training.efficiency(four, [one, four]) == pytest.approx(0.9)
    for other in ({"global_batch": 128}, {"remat": "none"}, {"unrolled": True}):
        assert training.efficiency(four | other, [one, four]) is None


@pytest.mark.parametrize("name", ["ss:smoke", "ar:smoke"])
def test_a_random_batch_has_all_values_that_there_are(name):
    config = benchmark.read(name)
    config.train.global_batch = 20_000 if config.model.kind == "prior" else 4
    mesh = parallel.make_mesh(config.mesh, jax.devices()[:1])
    shapes = plan.program_of(config, mesh).batch
    batch = training.random_batch(shapes, training.limits(config), seed=1)
    for made, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
        assert (made.shape, made.dtype) == (shape.shape, shape.dtype)
    found = jax.tree.map(lambda x: len(np.unique(x)), batch)
    of_prior = {"codes": config.model.get("vocab"), "label": config.model.get("classes")}
    assert found == (of_prior if config.model.kind == "prior" else 256)


@pytest.mark.slow
def test_a_training_step_is_measured_on_two_devices(tmp_path):
    """Of one process, then of two processes; the checkpoint that was timed is gone afterwards."""
    command = ["-m", "gigatok_jax.benchmarks.training", f"--out={tmp_path}", f"--save={tmp_path}"]
    command += ["--config=configs/ar.py:smoke", "--config.mesh.fsdp=2", "--repeats=2"]
    alone = start(*command, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    told, wrong = alone.communicate(timeout=300)
    assert alone.returncode == 0, wrong[-2000:]
    (row,) = training.read(tmp_path)
    assert json.loads(told) == row
    assert row["mesh"] == "1x2x1" and np.isfinite(row["losses"]).all() and row["checkpoint_gib"] > 0
    assert "| ar_b_smoke | none | 2 | 1x2x1 | 4 |" in training.table([row])
    command += [f"--config.cluster.coordinator={free_address()}", "--config.cluster.processes=2"]
    ended = end([start(*command, f"--config.cluster.process={i}") for i in range(2)])
    assert [status for status, _ in ended] == [0, 0], ended
    (other,) = training.read(tmp_path)
    assert other["losses"] == pytest.approx(row["losses"], rel=1e-5) and other["ms"] != row["ms"]
    assert other["checkpoint_gib"] == pytest.approx(row["checkpoint_gib"], rel=0.01)
    assert not (tmp_path / training.MEASURED).exists()


# Learning.


def run_learning(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["learning", *map(str, arguments)])
    learning.main()


@pytest.fixture
def tar_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for i in range(12):
            small = rng.integers(256, size=(4, 4, 3)).astype(np.uint8)
            Image.fromarray(small.repeat(8, 0).repeat(8, 1)).save(tmp_path / f"{i:02}.png")
            archive.add(tmp_path / f"{i:02}.png", f"pictures/{i:02}.png")
    return tmp_path / "pictures.tar"


def test_learning_of_own_pictures_is_measured(monkeypatch, tmp_path, capsys, tar_of_pictures):
    sizes = ("--size", 32, "--latent_tokens", 16, "--batch", 4, "--updates", 12)
    starts = ("--variants", "last_level_geometry", "--out", tmp_path / "out")
    run_learning(monkeypatch, tar_of_pictures, *sizes, *starts)
    assert "| last_level_geometry |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "learning.json").read_text())
    losses = row["losses"]
    assert len(losses) == 12 and np.mean(losses[-3:]) < np.mean(losses[:3]) and row["psnr"] > 5
    assert "last_level_geometry" in (tmp_path / "out" / "learning.svg").read_text()
    assert "11 pictures to learn, 1 held out" in (tmp_path / "out" / "learning.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--batch", 12), "--batch is 12, expected 1 to 11"),
        (("--batch", 4, "--updates", 1), "--updates is 1, expected at least 2"),
        (("--size", 60), "image_size is 60, expected a multiple of 8"),
        (("--latent_tokens", 256), "finest queries pool a 16 x 8 grid"),
    ],
)
def test_learning_refuses_counts_that_do_not_fit(monkeypatch, tar_of_pictures, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_learning(monkeypatch, tar_of_pictures, *arguments)


def test_learning_needs_pictures(monkeypatch, tmp_path):
    (tmp_path / "notes.tar").write_text("no archive")
    with pytest.raises(SystemExit, match="neither a folder nor a tar file"):
        run_learning(monkeypatch, tmp_path / "notes.tar")
