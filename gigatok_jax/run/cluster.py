"""Several processes, mostly of several hosts, as one run: how they find each other and part.

Who is who comes from the flags of `config.cluster`, or else from what a launcher leaves in the
environment: GKE TPU, Open MPI, Slurm, Kubernetes, Cloud TPU. Before jax starts, every process tells
process 0 what it is about to run, and all hear all: a cluster that is half there, or whose members
differ, ends with the same line everywhere instead of a hang or several runs in one folder.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import glob
import hashlib
import importlib.util
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from gigatok_jax.errors import ClusterError, GigatokError
from gigatok_jax.run import command_line, environment, processes

LOST = 75  # exit status when another process is gone or stuck: the same command may help
PORT = 8476  # of the coordinator, where the launcher names none
MOST_BYTES = 1 << 20  # of what one process tells
SEEN_SECONDS = 20.0  # for a new file to show on shared storage
PRIVATE = ("cluster.process", "cluster.coordinator")  # config keys that may differ
TOLD = 5  # differences in one message
GONE = re.compile(
    "gloo|connection (closed|reset|refused)|heartbeat|coordination|unavailable|nccl|"
    "deadline.?exceeded|socket|peer",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its cluster."""

    source: str  # who says so
    processes: int
    process: int
    coordinator: str  # host:port of process 0
    devices: tuple[int, ...] | None = None  # GPUs of this host that it takes; None is all


def find(flags, env: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process; None when it is alone.

    Args:
        flags: `config.cluster`; reads coordinator, processes and process.
        env: of this process.

    Raises:
        ClusterError: several tasks are shown but not enough to join them, or flags and launcher
            disagree.
    """
    coordinator = flags.coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    shown = next(filter(None, (look(env) for look in LAUNCHERS)), None)
    count = flags.processes or (shown.processes if shown else 0)
    index = flags.process if flags.process >= 0 else (shown.process if shown else -1)
    source = shown.source if shown else "flags"
    if shown and flags.processes and shown.processes not in (0, flags.processes):
        raise ClusterError(
            f"cluster.processes is {flags.processes}, {source} started {shown.processes}: leave the"
            " flag out, or start as many"
        )
    if count == 1 or not (count or shown or coordinator):
        return None
    coordinator = coordinator or (shown.coordinator if shown else "")
    _check_known(source, count, index, coordinator)
    if ":" not in coordinator.rsplit("]", 1)[-1]:
        coordinator = f"{coordinator}:{env.get('JAX_COORDINATOR_PORT', PORT)}"
    return Place(source, count, index, coordinator, shown.devices if shown else None)


def _check_known(source: str, count: int, index: int, coordinator: str) -> None:
    here = f"{source} on {socket.gethostname()}"
    if not count:
        raise ClusterError(
            f"{here} does not say which of how many processes this is: start it as"
            " launch/README.md shows, or set --config.cluster.processes=N (1 for one that is alone)"
        )
    if not coordinator:
        raise ClusterError(
            f"{here} shows process {index} of {count}, but not where process 0 is: set"
            " --config.cluster.coordinator=HOST:PORT"
        )
    if not 0 <= index < count:
        raise ClusterError(
            f"{here} shows process {index} of {count}, expected 0 to {count - 1}: set"
            " --config.cluster.process=I"
        )


# What launchers leave. Each gives a Place, in which 0, -1 and "" are not known, or None.


def _gke_tpu(env) -> Place | None:
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    hosts = [host.split(":")[0] for host in hosts.split(",") if host]
    slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices < 2 or "TPU_WORKER_ID" not in env:
        return None
    return _tpu("GKE TPU", hosts, int(env["TPU_WORKER_ID"]), slices, env)


def _tpu(source: str, hosts: Sequence[str], worker: int, slices: int, env) -> Place:
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    process = worker + int(env.get("MEGASCALE_SLICE_ID") or 0) * len(hosts)
    return Place(source, len(hosts) * slices, process, first)


def _open_mpi(env) -> Place | None:
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) < 2:
        return None
    size, rank = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
    # Up to version 4 the launcher's address is in the environment, and process 0 runs beside it.
    uri = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = next(filter(None, uri.groups())) if uri else ""
    local = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)), int(env["OMPI_COMM_WORLD_LOCAL_RANK"])
    return Place("Open MPI", size, rank, host, _gpus(*local, env))


def _slurm(env) -> Place | None:
    size = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if size < 2:
        return None
    if "SLURM_STEP_NODELIST" not in env:  # the batch script itself, or a shell of salloc
        return Place("Slurm without srun", 0, -1, "")
    node, local = int(env["SLURM_NODEID"]), int(env["SLURM_LOCALID"])
    host = _first_host(env["SLURM_STEP_NODELIST"])
    job = int(env["SLURM_JOB_ID"])  # two jobs that meet on a host take different ports
    tasks = _tasks_of(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), node)
    place = f"{host}:{env.get('JAX_COORDINATOR_PORT', 61440 + job % 4096)}"
    return Place("Slurm", size, int(env["SLURM_PROCID"]), place, _gpus(tasks, local, env))


def _first_host(nodes: str) -> str:
    """Of Slurm's list of nodes: "a3" of "a3,b1", "a07" of "a[07-09,11],b1"."""
    return re.sub(r"^([^,\[]*)(?:\[([^,\-\]]*))?.*", r"\1\2", nodes)


def _tasks_of(counts: str, node: int) -> int:
    """Tasks of a node, of Slurm's "2(x3),1"."""
    each = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(number)] * int(times or 1)
    return each[node] if node < len(each) else 1


def _gpus(tasks: int, local: int, env) -> tuple[int, ...] | None:
    """GPUs of one of the tasks of a host; None takes all, which are the task's own already."""
    visible = [one for one in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    if tasks == 1 or len(visible) == 1:
        return None
    if not visible:
        return (local,)
    if len(visible) % tasks:
        raise ClusterError(
            f"{tasks} tasks of {socket.gethostname()} cannot share its {len(visible)} GPUs: start"
            " one per GPU, or one per node"
        )
    each = len(visible) // tasks
    return tuple(range(local * each, (local + 1) * each))


def _kubernetes(env) -> Place | None:
    if "JOB_COMPLETION_INDEX" not in env:
        return None
    return Place("Kubernetes", 0, int(env["JOB_COMPLETION_INDEX"]), "")


def _cloud_tpu(env) -> Place | None:
    """A TPU VM that its own metadata server knows as one of several."""
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    known = "GCE_METADATA_IP" in env or (chips and importlib.util.find_spec("libtpu"))
    if not known or env.get("TPU_SKIP_MDS_QUERY") or env.get("JAX_PLATFORMS") == "cpu":
        return None
    worker = _metadata("agent-worker-number", env)
    hosts = _metadata("worker-network-endpoints", env)
    if worker is None or hosts is None:
        return None
    hosts = [one.split(":")[-1] for one in hosts.split(",")]  # host, or name:id:host
    lines = (_metadata("tpu-env", env) or "").splitlines()
    more = {name: text.strip(" '") for name, _, text in (line.partition(":") for line in lines)}
    slices = int(more.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices < 2:
        return None
    return _tpu("Cloud TPU", hosts, int(worker), slices, more | dict(env))


def _metadata(key: str, env) -> str | None:
    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode().strip()
    except OSError:
        return None


# The innermost launcher first: mpirun inside Slurm, a TPU slice inside Kubernetes.
LAUNCHERS = (_gke_tpu, _open_mpi, _slurm, _kubernetes, _cloud_tpu)


# Meeting.


class Meeting:
    """All processes of a cluster around process 0, which hands on what each one says.

    Uses the coordinator's port, before jax does.
    """

    def __init__(self, place: Place, seconds: float):
        """Args:
        place: of this process.
        seconds: to wait for the others.

        Raises:
            ClusterError: the coordinator's port is taken, or cannot be reached in time.
        """
        self._place, self._ends = place, time.monotonic() + seconds
        self._seconds, self._others = seconds, []
        host, _, port = place.coordinator.rpartition(":")
        address = (host.strip("[]"), int(port))
        if place.process:
            self._listener, self._others = None, [self._reach(address)]
        else:
            self._listener = self._listen(int(port))

    def exchange(self, value: Any) -> list[Any]:
        """What every process that is here says, JSON values; one's own is among them."""
        if self._listener is None:
            self._say(self._others[0], value)
            return self._hear(self._others[0])
        if not self._others:
            return self._first_round(value)
        said = [value, *(self._hear(other) for other in self._others)]
        return self._tell_all(said)

    def close(self) -> None:
        """Process 0 last, so that its port is free at once."""
        for other in self._others:
            if self._listener is not None:
                with contextlib.suppress(OSError):
                    other.settimeout(5)
                    other.recv(1)
            other.close()
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _first_round(self, value) -> list[Any]:
        """Everybody who comes until all are there or the time is over; strangers are ignored."""
        said = [value]
        while len(said) < self._place.processes and (left := self._left()) > 0:
            self._listener.settimeout(left)
            try:
                other, _ = self._listener.accept()
                other.settimeout(min(self._left() + 1, 10))
                said.append(json.loads(self._line(other)))
                other.settimeout(self._seconds + 30)  # a member may wait for slow storage later
                self._others.append(other)
            except (OSError, ValueError):
                continue
        return self._tell_all(said)

    def _tell_all(self, said) -> list[Any]:
        for other in self._others:
            with contextlib.suppress(OSError):  # who is gone now is missed by jax
                self._say(other, said)
        return said

    def _listen(self, port: int) -> socket.socket:
        try:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            return socket.create_server(
                ("", port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as error:
            raise ClusterError(
                f"{_who(self._place)} cannot listen on port {port} ({os.strerror(error.errno)}):"
                " name another one with --config.cluster.coordinator=HOST:PORT"
            ) from error

    def _reach(self, address) -> socket.socket:
        while True:
            try:
                other = socket.create_connection(address, timeout=max(min(self._left(), 10), 0.1))
                other.settimeout(self._seconds + 30)  # process 0 waits for the others itself
                return other
            except OSError as error:
                if self._left() <= 0:
                    raise ClusterError(
                        f"{_who(self._place)} finds no coordinator at {self._place.coordinator}"
                        f" after {self._seconds:g} s ({error}): is process 0 running, and may this"
                        " host reach that port?"
                    ) from error
                time.sleep(min(0.2, max(self._left(), 0.01)))

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _say(self, other, value) -> None:
        other.sendall(json.dumps(value).encode() + b"\n")

    def _hear(self, other) -> Any:
        try:
            return json.loads(self._line(other))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{_who(self._place)} lost another process while the cluster formed ({error})"
            ) from error

    def _line(self, other) -> bytes:
        data = bytearray()
        # What all have said comes back at once, to members only.
        limit = MOST_BYTES * (self._place.processes if self._listener is None else 1)
        while not data.endswith(b"\n"):
            block = other.recv(1 << 16)
            data += block
            if not block or len(data) > limit:
                raise ValueError("connection closed")
        return bytes(data)


def _who(place: Place) -> str:
    return f"process {place.process} of {place.processes} on {socket.gethostname()}"


# Agreement.


def agree(place: Place, config, workdir: epath.PathLike) -> None:
    """Returns once all processes are here, mean the same run, and see the same workdir.

    Raises:
        ClusterError: in every process: who is missing, or what differs between whom.
    """
    mark = epath.Path(workdir).expanduser().absolute() / f".cluster-{secrets.token_hex(8)}"
    if not place.process:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
    try:
        with Meeting(place, config.cluster.start_seconds) as meeting:
            theirs = _introduce(meeting, place, config, workdir, str(mark))
            seen = meeting.exchange([place.process, socket.gethostname(), _appears(theirs)])
            check_storage(seen, workdir)
    finally:
        if not place.process:
            mark.unlink(missing_ok=True)


def _introduce(meeting: Meeting, place: Place, config, workdir, mark: str) -> epath.Path:
    """The file that process 0 has made, once all are here and alike."""
    values = describe(config, workdir)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    mine = {"process": place.process, "processes": place.processes}
    mine |= {"source": place.source, "host": socket.gethostname()}
    said = meeting.exchange(mine | {"digest": digest, "mark": mark})
    check_members(said, config.cluster.start_seconds)
    if len({one["digest"] for one in said}) > 1:  # a few bytes each while all is well
        check_same(meeting.exchange(mine | {"values": values}))
    return epath.Path(_first(said)["mark"])


def describe(config, workdir) -> dict[str, Any]:
    """What has to be the same in all processes, by name, as JSON values."""
    values = {f"config.{name}": value for name, value in command_line.flatten(config)}
    for name in PRIVATE:
        del values[f"config.{name}"]
    values |= {"workdir": str(workdir)} | dict(command_line.flatten(environment.software()))
    return json.loads(json.dumps(values))


def check_members(said: Sequence[Mapping], seconds: float) -> None:
    """Refuses a cluster that is not complete.

    Args:
        said: "process", "processes", "source" and "host" of whoever came.
        seconds: that process 0 waited.
    """
    size = _first(said)["processes"]
    indices = [one["process"] for one in said]
    if all(one["processes"] == size for one in said) and sorted(indices) == list(range(size)):
        return
    saw = ", ".join(
        f"{one['process']} of {one['processes']} on {one['host']} ({one['source']})"
        for one in sorted(said, key=lambda one: one["process"])
    )
    missing = sorted(set(range(size)) - set(indices))
    who = ", ".join(map(str, missing[:TOLD])) + ("..." if len(missing) > TOLD else "")
    what = f"process {who} did not come within {seconds:g} s" if missing else "they contradict"
    raise ClusterError(f"the cluster is not complete, {what}; here are: {saw}")


def check_same(said: Sequence[Mapping]) -> None:
    """Refuses processes of different "values"; says which, and who has what."""
    first, told = _first(said), []
    for one in sorted(said, key=lambda one: one["process"]):
        for name in sorted(first["values"].keys() | one["values"].keys()):
            theirs, ours = one["values"].get(name), first["values"].get(name)
            if theirs != ours and not any(line.startswith(f"{name} ") for line in told):
                told.append(
                    f"{name} is {ours!r} on process 0 ({first['host']}) and {theirs!r} on process"
                    f" {one['process']} ({one['host']})"
                )
    if told:
        more = f"; and {len(told) - TOLD} more" if len(told) > TOLD else ""
        raise ClusterError(
            f"the processes are not of one run: {'; '.join(told[:TOLD])}{more}: start all with the"
            " same command and environment"
        )


def check_storage(seen: Sequence, workdir) -> None:
    """Refuses a workdir that is not the same folder everywhere. `seen`: process, host, whether."""
    blind = [f"{process} on {host}" for process, host, sees in seen if not sees]
    if blind:
        raise ClusterError(
            f"workdir {workdir} is not shared: process {', '.join(blind)} cannot see what process 0"
            " writes there; choose a --workdir on storage that all hosts share"
        )


def check_devices() -> None:
    """Refuses a cluster in which hosts have lost devices; starts the jax backend."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(counts) != jax.process_count() or len(set(counts.values())) != 1:
        each = ", ".join(f"{i}: {counts[i]}" for i in range(jax.process_count()))
        raise ClusterError(f"the processes have different numbers of devices ({each})")


def _first(said):
    return next(one for one in said if one["process"] == 0)


def _appears(path: epath.Path) -> bool:
    ends = time.monotonic() + SEEN_SECONDS
    while not (there := path.exists()) and time.monotonic() < ends:
        time.sleep(0.2)
    return there


# Running.


@contextlib.contextmanager
def joined(config, workdir: epath.PathLike) -> Iterator[None]:
    """The cluster of `config.cluster`, for as long as the block runs; nothing for one process.

    A process that fails inside the block ends at once: in an orderly end it would wait for the
    others, who wait for it in the middle of a step.

    Raises:
        ClusterError: see `find` and `agree`.
    """
    place = find(config.cluster)
    if place is None:
        yield
        return
    agree(place, config, workdir)
    start(place, config.cluster)
    try:
        check_devices()
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            _end(1, error.code)
        raise  # after a signal that all have agreed on
    except GigatokError as error:
        _end(1, f"error: {error}")
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and GONE.search(str(error)):
            why = " ".join(str(error).split())
            _end(LOST, f"{_who(place)} ends, another process is gone or cannot be reached: {why}")
        traceback.print_exc()
        _end(1, f"{_who(place)} ends after the exception above")


def start(place: Place, flags) -> None:
    """Starts jax in its place."""
    # It would take the signal that ends a run, see `signals.Interrupts`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        None if place.devices is None else list(place.devices),
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(flags.start_seconds), 1),
    )
    print(f"{_who(place)}, by {place.source}; coordinator {place.coordinator}", flush=True)


def _end(status: int, line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


class Watchdog:
    """Ends a process that has not moved for too long, with the stacks of all its threads.

    A collective that one process never enters holds all others for ever, so all of them end.
    """

    def __init__(self, minutes: float):
        """`minutes` has to be longer than the longest compilation or save; 0 is off."""
        self._seconds, self._last = minutes * 60, time.monotonic()
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Something was finished."""
        self._last = time.monotonic()

    def hears(self, items: Iterable) -> Iterator:
        """The items; that another one is asked for says that something was finished."""
        for item in items:
            self.beat()
            yield item

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        period = min(self._seconds / 4, 10)
        while not self._stopped.wait(period):
            if (quiet := time.monotonic() - self._last) > self._seconds:
                self._tell(quiet)
                if jax.process_count() > 1:  # jax ends the others with this one: let them tell too
                    self._stopped.wait(2 * period + 5)
                os._exit(LOST)

    def _tell(self, quiet: float) -> None:
        print(
            f"{processes.name()} has finished nothing for {quiet / 60:.1f} min"
            " (config.cluster.hang_minutes); where its threads are:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
