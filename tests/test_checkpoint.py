"""Checkpoints: what was saved comes back, and whatever breaks on the way costs one interval."""

import errno
import functools
import os
import pathlib
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from gigatok_jax import files
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.run import checkpoint
from gigatok_jax.run import workdir as workdir_lib


@flax.struct.dataclass
class State:
    params: dict
    ema_params: dict
    optimizer: tuple
    rng: jax.Array
    step: jax.Array


def make_state(seed: int, width: int = 4) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {"kernel": jnp.asarray(rng.normal(size=(3, width)), jnp.float32)},
        "decoder": {"bias": jnp.asarray(rng.normal(size=width), jnp.bfloat16)},
    }
    updates, optimizer = optax.adamw(1e-3).update(
        params, optax.adamw(1e-3).init(params), params
    )  # moments that are not zero
    return State(params, updates, optimizer, jax.random.key(seed), jnp.int32(seed))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


@pytest.fixture
def three(tmp_path):
    """A workdir with steps 10, 20, 30, whose states are made from their steps."""
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step), {"position": {"next_index": step}})
    checkpoints.close()
    return tmp_path


@pytest.fixture
def lines(monkeypatch):
    """Warnings of the module, as they are logged."""
    logged = []
    monkeypatch.setattr(checkpoint.logging, "warning", lambda text, *a: logged.append(text % a))
    return logged


def test_restore_gives_back_every_bit(three):
    state, extras = checkpoint.Checkpoints(three).restore(abstract(make_state(0)))
    assert_same(state, make_state(30))
    assert extras == {"step": 30, "position": {"next_index": 30}}
    older, _ = checkpoint.Checkpoints(three).restore(abstract(make_state(0)), step=10)
    assert_same(older, make_state(10))


def test_restored_random_key_draws_the_same_numbers(three):
    state, _ = checkpoint.Checkpoints(three).restore(abstract(make_state(0)))
    drawn = jax.random.normal(jax.random.split(state.rng)[1], (5,))
    expected = jax.random.normal(jax.random.split(jax.random.key(30))[1], (5,))
    np.testing.assert_array_equal(drawn, expected)


def test_arrays_come_back_in_the_sharding_asked_for(tmp_path):
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = np.random.default_rng(0).normal(size=(8 * devices.size, 4 * devices.size))
    state = {"w": jax.device_put(values.astype(np.float32), rows), "rng": jax.random.key(3)}
    with_rng = jax.ShapeDtypeStruct((), state["rng"].dtype, sharding=everywhere)
    target = {"w": jax.ShapeDtypeStruct(values.shape, "float32", sharding=columns), "rng": with_rng}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(target)
    assert restored["w"].sharding == columns
    assert restored["rng"].sharding.is_equivalent_to(everywhere, 0)
    np.testing.assert_array_equal(restored["w"], values.astype(np.float32))
    checkpoints.close()


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    step = functools.partial(jax.jit, donate_argnums=0)(lambda s: jax.tree.map(lambda x: -x, s))
    values = np.random.default_rng(1).normal(size=(1000, 1000)).astype(np.float32)
    state = {str(i): jnp.array(values + i) for i in range(4)}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = step(state)  # reuses the memory while the save is still being written
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    for i in range(4):
        np.testing.assert_array_equal(restored[str(i)], values + i)
    checkpoints.close()


def test_newest_and_milestones_stay(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, milestone_every=30)
    for step in range(10, 101, 10):
        checkpoints.save(step, {"x": jnp.arange(3)}, {})
    checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [30, 60, 90, 100]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for value in (1, 2):
        checkpoints.save(5, {"x": jnp.int32(value)}, {})
    assert checkpoints.restore({"x": jnp.int32(0)})[0]["x"] == 1
    checkpoints.close()


def cut_off(directory):
    (directory / checkpoint.CHECKSUMS).unlink()


def truncate(directory):
    largest = max((directory / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    os.truncate(largest, largest.stat().st_size // 2)


def lose_a_file(directory):
    next(p for p in (directory / "state" / "d").iterdir()).unlink()


def flip_a_bit(directory, seed=0):
    rng = np.random.default_rng(seed)
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)
    path = paths[rng.integers(len(paths))]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


BREAK = {f"bit {seed}": functools.partial(flip_a_bit, seed=seed) for seed in range(6)}
BREAK |= {"cut off": cut_off, "truncated": truncate, "lost file": lose_a_file}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_step_is_named_and_the_one_before_it_is_used(three, lines, how):
    bad = three / "checkpoints" / "30"
    BREAK[how](bad)
    checkpoints = checkpoint.Checkpoints(three)
    state, extras = checkpoints.restore(abstract(make_state(0)))
    assert_same(state, make_state(20))
    assert extras["step"] == 20
    assert len(lines) == 1 and str(bad) in lines[0] and "\n" not in lines[0]
    checkpoints.save(30, make_state(31), {})  # the run passes the same step again
    checkpoints.close()
    again, _ = checkpoint.Checkpoints(three).restore(abstract(make_state(0)))
    assert_same(again, make_state(31))


def test_nothing_whole_is_none_or_an_error(three, lines):
    for step in (10, 20, 30):
        flip_a_bit(three / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoint.load_params(three, ["params"])
    assert len(lines) == 3
    assert checkpoint.Checkpoints(three).latest() is None
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoint.Checkpoints(three).restore(make_state(0))


def test_a_named_step_is_never_replaced_by_another(three):
    truncate(three / "checkpoints" / "20")
    with pytest.raises(CheckpointError, match="20 is damaged"):
        checkpoint.Checkpoints(three).restore(make_state(0), step=20)
    with pytest.raises(CheckpointError, match="20 is damaged"):
        checkpoint.load_params(three / "checkpoints" / "20", ["params"])
    with pytest.raises(CheckpointError, match=r"no checkpoint .*40"):
        checkpoint.Checkpoints(three).restore(make_state(0), step=40)


def test_another_model_is_refused_with_every_path_and_both_shapes(three):
    state = make_state(0, width=6)
    state.params["extra"] = jnp.zeros((2, 2))
    del state.ema_params["decoder"]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.Checkpoints(three).restore(state)
    title, *found = str(caught.value).splitlines()
    assert "another model, 9 arrays differ" in title
    assert [line.strip() for line in found if "params/e" in line or "ema" in line] == [
        "ema_params/decoder/bias: bfloat16[4] in the checkpoint, none here",
        "ema_params/encoder/kernel: float32[3, 4] in the checkpoint, float32[3, 6] here",
        "params/encoder/kernel: float32[3, 4] in the checkpoint, float32[3, 6] here",
        "params/extra: none in the checkpoint, float32[2, 2] here",
    ]


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/20"])
def test_some_entries_load_without_the_model(three, place):
    entries, extras = checkpoint.load_params(three / place, ["ema_params"])
    expected = make_state(20 if place.endswith("20") else 30)
    assert list(entries) == ["ema_params"]
    assert_same(entries["ema_params"], expected.ema_params)
    assert isinstance(entries["ema_params"]["encoder"]["kernel"], np.ndarray)
    assert extras["step"] == int(expected.step)


def test_entries_load_in_a_sharding(three):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    entries, _ = checkpoint.load_params(three, ["params", "rng"], sharding)
    assert_same(entries["params"], make_state(30).params)
    assert entries["params"]["decoder"]["bias"].sharding == sharding


def test_reading_changes_nothing_on_disk(three, lines):
    cut_off(three / "checkpoints" / "30")  # as a run that is saving right now looks
    before = sorted(three.rglob("*"))
    _, extras = checkpoint.load_params(three, ["params"])
    assert extras["step"] == 20 and len(lines) == 1
    assert sorted(three.rglob("*")) == before


def test_a_missing_entry_or_checkpoint_is_one_clear_line(three, tmp_path):
    with pytest.raises(CheckpointError, match=r"no entry \['discriminator'\], only \['ema_params'"):
        checkpoint.load_params(three, ["discriminator"])
    with pytest.raises(CheckpointError, match="does not exist, expected a workdir"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint, expected a workdir"):
        checkpoint.find(tmp_path / "empty")


def test_find_tells_the_step_only_where_it_is_named(three):
    root = three / "checkpoints"
    assert checkpoint.find(three) == (root, None) == checkpoint.find(root)
    assert checkpoint.find(root / "20") == (root, 20)


@pytest.mark.parametrize("moment", ["arrays", "checksums"])
def test_a_full_disk_is_one_line_and_the_last_step_stays(three, monkeypatch, moment):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = checkpoint.Checkpoints(three)
    if moment == "arrays":
        monkeypatch.setattr(checkpoints._saver, "wait_until_finished", full)
    else:
        monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"40 was not saved: the disk is full; step 30"):
        checkpoints.save(40, make_state(40), {})
        checkpoints.wait()
    monkeypatch.undo()
    assert_same(checkpoints.restore(make_state(0))[0], make_state(30))
    checkpoints.save(40, make_state(40), {})  # room was made
    checkpoints.close()
    assert checkpoint.Checkpoints(three).latest() == 40


def test_a_truly_full_disk_is_one_line_and_the_last_step_stays(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    rng = np.random.default_rng(0)
    small, large = (jnp.asarray(rng.normal(size=(n, 1000)), jnp.float32) for n in (100, 1000))
    try:
        checkpoints = checkpoint.Checkpoints(tmp_path)
        checkpoints.save(1, {"x": small}, {})
        with pytest.raises(CheckpointError, match="2 was not saved: the disk is full; step 1 is"):
            checkpoints.save(2, {"x": large}, {})
            checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore({"x": small})[0]["x"], small)
        checkpoints.close()
        workdir_lib.check_workdir(tmp_path, {})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Forks instead of starting Python anew: imports take longer than the run. The backend starts after
# the fork. Each child resumes, checks that the state belongs to its step, and saves until it dies.
KILLED = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from gigatok_jax.run import checkpoint

def values(step):
    return np.random.default_rng(step).normal(size=(500, 1000)).astype(np.float32)

def resume(workdir):
    checkpoints = checkpoint.Checkpoints(workdir, keep=1)
    step = checkpoints.latest() or 0
    if step:
        state, extras = checkpoints.restore({"x": jax.ShapeDtypeStruct((500, 1000), "float32")})
        assert (np.asarray(state["x"]) == values(step)).all() and extras["step"] == step
    return checkpoints, step

def child(workdir, pipe):
    checkpoints, step = resume(workdir)
    os.write(pipe, b"resumed %d\\n" % step)
    while True:
        step += 1
        checkpoints.save(step, {"x": jnp.asarray(values(step))}, {})
        checkpoints.wait()
        os.write(pipe, b"whole %d\\n" % step)

def trial(workdir, rng):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(workdir, writer)
        finally:
            os._exit(1)
    os.close(writer)
    lines = os.fdopen(reader)
    first = lines.readline().split()
    saves = [lines.readline().split() for _ in range(rng.randrange(3))]  # on any machine, some
    time.sleep(rng.uniform(0.0, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    last = ([first] + saves + [line.split() for line in lines if line.endswith("\\n")])[-1]
    return int(first[1]), int(last[1])

rng, whole = random.Random(0), 0
for _ in range(int(sys.argv[2])):
    resumed, now = trial(sys.argv[1], rng)
    assert resumed in (whole, whole + 1), (resumed, whole)  # killed after commit, before the report
    whole = now
print("steps", whole)
"""


def test_sigkill_at_random_moments_loses_one_interval_at_most(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run"), "8"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 3  # it did save between the kills


def test_a_workdir_of_another_config_is_refused(tmp_path):
    config = ml_collections.ConfigDict(
        {
            "model": {"encoder": "small", "blocks": (1, 2)},
            "train": {"steps": 5},
            "save": {"keep": 3},
        }
    )
    workdir_lib.check_workdir(tmp_path, config)
    config.train.steps, config.save.keep = 9, 1
    workdir_lib.check_workdir(tmp_path, config)  # longer, kept otherwise: the same run
    assert files.read_json(tmp_path / "config.json")["train"]["steps"] == 9
    config.model.encoder = "base"
    with pytest.raises(ConfigError, match=r"another config: model.encoder is 'base' here and 'sm"):
        workdir_lib.check_workdir(tmp_path, config)
    assert files.read_json(tmp_path / "config.json")["model"]["encoder"] == "small"


def test_a_workdir_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(checkpoint.logging, "warning", lambda text, *a: told.append(text % a))
    workdir_lib.check_workdir(tmp_path, {"optim": {"clip": 1.0}})
    workdir_lib.check_workdir(tmp_path, {"optim": {"clip": 1.0, "first_moment": "float32"}})
    assert len(told) == 1 and "optim.first_moment='float32'" in told[0]
    with pytest.raises(ConfigError, match="first_moment is None here and 'float32' there"):
        workdir_lib.check_workdir(tmp_path, {"optim": {"clip": 1.0}})


def test_keys_that_a_version_dropped_do_not_stop_a_run(tmp_path):
    old = {"loss": {"lecam": 0.0, "entropy_end": 0, "reconstruction_type": "l2", "entropy": 0.1}}
    old |= {"sample": {"cfg_scale": 1.5, "classes": 8}, "task": "train_prior"}
    new = {"loss": {"entropy": 0.1}, "sample": {"classes": 8}, "cfg": {"scale": 1.75}}
    new |= {"task": "train_prior"}
    workdir_lib.check_workdir(tmp_path, old)
    workdir_lib.check_workdir(tmp_path, new)
    new["cfg"]["scale"] = 2.0  # of pictures along the way
    workdir_lib.check_workdir(tmp_path, new)
    assert files.read_json(tmp_path / "config.json") == new


def test_guidance_defines_what_is_generated(tmp_path):
    workdir_lib.check_workdir(tmp_path, {"task": "generate", "cfg": {"scale": 1.75}})
    with pytest.raises(ConfigError, match=r"scale is 2\.0 here and 1\.75 there"):
        workdir_lib.check_workdir(tmp_path, {"task": "generate", "cfg": {"scale": 2.0}})


@pytest.mark.parametrize(
    ("key", "value"), [("lecam", 0.001), ("entropy_end", 500), ("reconstruction_type", "l1")]
)
def test_a_run_that_this_version_cannot_go_on_with_is_refused(tmp_path, key, value):
    workdir_lib.check_workdir(tmp_path, {"loss": {key: value, "entropy": 0.1}})
    with pytest.raises(ConfigError, match=f"{key}={value!r}, which this version has no"):
        workdir_lib.check_workdir(tmp_path, {"loss": {"entropy": 0.1}})
