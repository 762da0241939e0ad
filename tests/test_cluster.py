"""Several processes as one run: how they meet, what they refuse, how they end and go on."""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from http import server

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from configs import common
from gigatok_jax.errors import ClusterError
from gigatok_jax.run import checkpoint, cluster, launchers, metric_writer, processes, signals

ROOT = pathlib.Path(__file__).parents[1]

# A process of a tiny run. The signal reaches it within update 4, as in test_train; with -1 it never
# enters update 4, in which the others wait for it.
MEMBER = """
import os, sys, time, jax, numpy as np, tiny
from jax.sharding import NamedSharding, PartitionSpec
from gigatok_jax import library
from gigatok_jax.run import cluster, command_line
from gigatok_jax.train import tokenizer

cache, workdir, address, processes, process, number, minutes = sys.argv[1:]
made = tiny.run_config()
made.cluster.hang_minutes = float(minutes)
made.train.ema_memory = "pinned_host"  # saved and measured from there; who goes on has it elsewhere
made.cluster.update(coordinator=address, processes=int(processes), process=int(process))
phase_at = tokenizer.objective.phase_at

def signalled(done, *rest):
    if done == 3 and number == "-1":
        time.sleep(600)
    if done == 3 and int(number):
        os.kill(os.getpid(), int(number))
    return phase_at(done, *rest)

def check_fingerprint():
    rows = np.arange(8, dtype=np.float32)
    split = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), PartitionSpec("all"))
    shared = jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])
    assert not shared.is_fully_addressable
    assert library.fingerprint({"w": shared}) == library.fingerprint({"w": rows})

tokenizer.objective.phase_at = signalled
with tiny.small_programs(cache), cluster.joined(made, workdir), command_line.one_line_errors():
    check_fingerprint()
    tiny.train(workdir, made)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def environment(**more) -> dict:
    path = {"PYTHONPATH": tiny.PYTHONPATH, "JAX_PLATFORMS": "cpu"}
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | path | more


def start(*command, **more) -> subprocess.Popen:
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(**more), **pipe
    )


def end(members, seconds=300) -> list[tuple[int, str]]:
    """Exit status and stderr of each."""
    try:
        return [(m.communicate(timeout=seconds)[1], m.returncode)[::-1] for m in members]
    finally:
        for member in members:
            member.kill()


def losses(workdir) -> dict:
    """Held-out figures and the losses of training, by step and name."""
    return {
        (row["step"], name): value
        for row in metric_writer.read(workdir)
        for name, value in row.items()
        if name.startswith("eval/") or "loss" in name
    }


def assert_same_losses(workdir, whole, rtol=1e-5):
    ours, expected = losses(workdir), losses(whole)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=rtol, abs=1e-12), key


def test_a_signal_to_one_of_two_ends_both_and_one_goes_on(tmp_path):
    cache, workdir, address = tiny.session() / "cache", tmp_path / "run", free_address()
    members = [
        start("-c", MEMBER, cache, workdir, address, 2, i, signal.SIGTERM if i else 0, 30)
        for i in range(2)
    ]
    ended = end(members)
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert checkpoint.damage(workdir / "checkpoints" / "5") is None  # heard one step late
    with tiny.small_programs(cache):
        tiny.train(workdir)
        assert_same_losses(workdir, tiny.finished_run())


# Who is who.


def flags(**values) -> ml_collections.ConfigDict:
    made = common.cluster_config()
    made.update(values)
    return made


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04,7],x1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),2",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
ONE_PER_NODE = {
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "JOB_COMPLETION_INDEX": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "z:8080",
}


@pytest.mark.parametrize(
    "env, given, expected",
    [
        ({}, {}, None),
        ({"SLURM_NTASKS": "1"}, {}, None),
        ({"SLURM_NTASKS": "4"}, {"processes": 1}, None),
        ({"JOB_COMPLETION_INDEX": "0"}, {"processes": 1}, None),
        (SLURM, {}, (8, 3, "gpu03:61447", (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}, (8, 3, "gpu03:61447", (2, 3))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, {}, (8, 3, "gpu03:61447", None)),
        (SLURM | ONE_PER_NODE, {}, (4, 1, "gpu03:61447", None)),
        (SLURM | {"JAX_COORDINATOR_PORT": "9"}, {}, (8, 3, "gpu03:9", (1,))),
        (OMPI, {}, (4, 2, "10.96.0.1:8476", (0,))),
        (OMPI | SLURM, {}, (4, 2, "10.96.0.1:8476", (0,))),  # mpirun inside a Slurm job
        (GKE, {}, (2, 1, "a:8476", None)),
        (GKE | SLICES, {}, (4, 3, "z:8476", None)),
        (
            {"JOB_COMPLETION_INDEX": "2", "JAX_COORDINATOR_ADDRESS": "j-0.j:5"},
            {"processes": 4},
            (4, 2, "j-0.j:5", None),
        ),
        ({}, {"coordinator": "[::1]:5", "processes": 2, "process": 1}, (2, 1, "[::1]:5", None)),
        ({}, {"coordinator": "[::1]", "processes": 2, "process": 1}, (2, 1, "[::1]:8476", None)),
    ],
)
def test_a_process_knows_its_place(env, given, expected):
    found = launchers.find(flags(**given), env)
    place = found and (found.processes, found.process, found.coordinator, found.devices)
    assert place == expected


@pytest.mark.parametrize(
    "env, given, message",
    [
        ({"SLURM_NTASKS": "4"}, {}, "Slurm without srun"),
        (SLURM, {"processes": 1}, "cluster.processes is 1, Slurm started 8"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, {}, "2 tasks of .* cannot share its 3 GPUs"),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, "does not say which of how many"),
        ({"JOB_COMPLETION_INDEX": "0"}, {"processes": 2}, "process 0 of 2, but not where"),
        ({k: v for k, v in OMPI.items() if "uri" not in k}, {}, "Open MPI .* but not where"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "does not say which of how many"),
        ({}, {"processes": 2, "coordinator": "a:1"}, "process -1 of 2, expected 0 to 1"),
        ({}, {"processes": 2, "coordinator": "a:1", "process": 2}, "process 2 of 2, expected"),
    ],
)
def test_half_a_cluster_is_never_a_run_of_its_own(env, given, message):
    with pytest.raises(ClusterError, match=message) as refused:
        launchers.find(flags(**given), env)
    assert "\n" not in str(refused.value)


def test_a_tpu_vm_is_asked_through_its_metadata():
    values = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.0.0.4,unknown:unknown:10.0.0.5",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
    }

    class Metadata(server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(values[self.path.rsplit("/", 1)[1]].encode())

        def log_message(self, *_):
            pass

    with server.HTTPServer(("127.0.0.1", 0), Metadata) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        place = launchers.find(flags(), {"GCE_METADATA_IP": f"127.0.0.1:{http.server_port}"})
        http.shutdown()
    assert (place.processes, place.process, place.coordinator) == (4, 3, "10.0.0.4:8476")


# Meeting: threads stand for processes, which need nothing of jax until all agree.


def meet(tmp_path, *members, seconds=5.0) -> list[str]:
    """What each (processes, process, change of config, workdir) is told; "" is agreement."""
    address, told = free_address(), {}

    def member(number, size, index, change, workdir):
        made = tiny.run_config()
        made.cluster.start_seconds = seconds
        made.cluster.process = index  # of no concern to the others
        with made.unlocked():
            made.optim.update(change)
        place = launchers.Place("a test", size, index, address)
        try:
            cluster.agree(place, made, workdir)
            told[number] = ""
        except ClusterError as error:
            told[number] = str(error)

    threads = [
        threading.Thread(target=member, args=(i, size, index, change, tmp_path / name))
        for i, (size, index, change, name) in enumerate(members)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list(tmp_path.glob("*/.cluster-*"))
    assert all("\n" not in line for line in told.values())
    return [told[i] for i in range(len(members))]


def test_processes_that_mean_the_same_meet(tmp_path):
    assert meet(tmp_path, (3, 2, {}, "run"), (3, 0, {}, "run"), (3, 1, {}, "run")) == [""] * 3


def test_another_config_is_told_everywhere(tmp_path):
    told = meet(tmp_path, (2, 0, {}, "run"), (2, 1, {"clip": 5.0}, "run"))
    assert told[0] == told[1]
    host = socket.gethostname()
    expected = f"config.optim.clip is 10.0 on process 0 ({host}) and 5.0 on process 1 ({host})"
    assert expected in told[0]


def test_another_version_is_told_everywhere(tmp_path, monkeypatch):
    versions, lock = iter([{"jax": "0.10.2"}, {"jax": "0.11.0"}]), threading.Lock()

    def software():
        with lock:
            return {"packages": next(versions)}

    monkeypatch.setattr(cluster.workdir_lib, "software", software)
    told = meet(tmp_path, (2, 0, {}, "run"), (2, 1, {}, "run"))
    assert told[0] == told[1]
    assert "packages.jax is" in told[0] and "'0.10.2'" in told[0] and "'0.11.0'" in told[0]


def test_who_is_missing_is_told_to_those_who_came(tmp_path):
    told = meet(tmp_path, (4, 0, {}, "run"), (4, 2, {}, "run"), seconds=1.0)
    assert told[0] == told[1]
    assert "process 1, 3 did not come within 1 s" in told[0]
    assert "0 of 4 on" in told[0] and "2 of 4 on" in told[0]


@pytest.mark.parametrize("other", [(4, 1), (2, 0)])
def test_contradictions_are_told(tmp_path, other):
    if other[1] == 0:  # two that take themselves for the first
        told = meet(tmp_path, (2, 0, {}, "run"), (*other, {}, "run"), seconds=1.0)
        assert sum("cannot listen on port" in line for line in told) == 1
    else:
        told = meet(tmp_path, (2, 0, {}, "run"), (*other, {}, "run"), seconds=1.0)
        assert told[0] == told[1] and "1 of 4 on" in told[0]


def test_a_missing_coordinator_is_told_after_the_stated_time(tmp_path):
    started = time.monotonic()
    (told,) = meet(tmp_path, (2, 1, {}, "run"), seconds=1.0)
    assert 1 <= time.monotonic() - started < 10
    assert "finds no coordinator at 127.0.0.1:" in told and "after 1 s" in told


def test_a_workdir_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_appears", lambda path: False)
    told = meet(tmp_path, (2, 0, {}, "run"), (2, 1, {}, "run"))
    assert told[0] == told[1] and "is not shared" in told[0]


def test_storage_may_be_slower_than_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_appears", lambda path: time.sleep(4) or True)
    assert meet(tmp_path, (2, 0, {}, "run"), (2, 1, {}, "run"), seconds=2.0) == ["", ""]


def test_a_stranger_at_the_port_changes_nothing(tmp_path):
    address, told = free_address(), []
    place = launchers.Place("a test", 2, 0, address)

    def first():
        with cluster.Meeting(place, 20) as meeting:
            told.append(meeting.exchange("first"))

    thread = threading.Thread(target=first)
    thread.start()
    host, port = address.split(":")
    for _ in range(50):
        with contextlib.suppress(OSError), socket.create_connection((host, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            break
        time.sleep(0.1)
    with cluster.Meeting(launchers.Place("a test", 2, 1, address), 20) as meeting:
        assert meeting.exchange("second") == ["first", "second"]
    thread.join()
    assert told == [["first", "second"]]


# Alone, and stuck.


def test_one_process_hears_itself():
    assert processes.gather(b"abc") == [b"abc"]
    rows = np.arange(6, dtype=np.float64).reshape(3, 2) / 7
    np.testing.assert_array_equal(processes.gather_rows(rows), rows)
    assert processes.from_first(lambda: 3) == 3 and processes.smallest(4) == 4
    assert int(processes.largest(15)) == 15
    assert jax.process_count() == 1


STUCK = """
import threading, time
from gigatok_jax.run import signals

def a_step_that_never_ends():
    time.sleep(60)

threading.Thread(target=a_step_that_never_ends, daemon=True).start()
with signals.Watchdog(0.01) as watchdog:
    for _ in range(5):
        time.sleep(0.2)
        watchdog.beat()
    print("moving", flush=True)
    a_step_that_never_ends()
"""


def test_a_hung_step_ends_with_the_stacks_of_all_threads():
    process = start("-c", STUCK)
    out, told = process.communicate(timeout=60)
    assert process.returncode == signals.LOST and out == "moving\n"
    assert f"process 0 of 1 on {socket.gethostname()} has finished nothing" in told
    assert told.count("in a_step_that_never_ends") == 2


def test_a_watchdog_may_be_off():
    with signals.Watchdog(0):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_two_of_which_one_is_stuck_end_with_the_stacks_of_both(tmp_path):
    cache, address = tiny.session() / "cache", free_address()
    members = [
        start("-c", MEMBER, cache, tmp_path / "run", address, 2, i, -1 if i else 0, 1.0)
        for i in range(2)
    ]
    for i, (status, told) in enumerate(end(members)):
        assert status == signals.LOST, told
        assert f"process {i} of 2 on {socket.gethostname()} has finished nothing for 1." in told
        assert ("in signalled" in told) == (i == 1) and "in loop" in told


# The demo in several processes that are killed. Minutes.


def demo(workdir, count, port=0, fsdp=1) -> list[subprocess.Popen]:
    """Processes of the demo's tokenizer for 20 steps."""
    values = {
        "task": "train_tokenizer",
        "mesh.cpu_devices": 1,
        "mesh.fsdp": fsdp,
        "train.steps": 20,
        "train.global_batch": 16,
        "log.every": 1,
        "save.every": 3,
        "eval.every": 10,
        "log.pictures_every": 10,
    }
    if count > 1:
        address = f"127.0.0.1:{port}"
        values |= {"cluster.coordinator": address, "cluster.processes": count}
        values |= {"cluster.start_seconds": 300.0}
    options = [f"--config.{name}={value}" for name, value in values.items()]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = ["main.py", "--config=configs/demo.py", f"--workdir={workdir}", *options]
    return [start(*command, f"--config.cluster.process={i}", **cache) for i in range(count)]


def wait_for_step(members, workdir, step):
    while all(member.poll() is None for member in members):
        if any(row["step"] >= step for row in metric_writer.read(workdir)):
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_killed_at_random_end_as_one_that_was_not(tmp_path):
    """Ten times: two processes with copies of the state, or four on a mesh of 2x2x1; one is killed,
    or all are told to end. Then one goes on, then four with copies."""
    rng = random.Random(0)
    assert [status for status, _ in end(demo(tmp_path / "whole", 1))] == [0]
    for turn in range(10):
        workdir, count = tmp_path / str(turn), 2 + 2 * (turn % 2)
        members = demo(workdir, count, free_port(), fsdp=count // 2)
        wait_for_step(members, workdir, rng.randint(2, 8))
        if turn % 4 < 2:
            members[rng.randrange(count)].send_signal(signal.SIGKILL)
            assert all(status for status, _ in end(members)), turn
        else:
            for member in members:
                member.send_signal(signal.SIGTERM)
            assert {status for status, _ in end(members)} == {128 + signal.SIGTERM}, turn
        (alone,) = demo(workdir, 1)
        wait_for_step([alone], workdir, rng.randint(10, 15))
        alone.send_signal(signal.SIGTERM)
        assert end([alone])[0][0] in (0, 128 + signal.SIGTERM)
        ended = end(demo(workdir, 4, free_port()))
        assert [status for status, _ in ended] == [0] * 4, ended
        assert_same_losses(workdir, tmp_path / "whole")
        results = json.loads((workdir / "results.json").read_text())
        assert results["step"] == 20
