"""Finds the place of a process in its cluster, from flags or the environment of a launcher.

Known launchers: GKE TPU, Open MPI, Slurm, Kubernetes, Cloud TPU.
"""

import dataclasses
import glob
import importlib.util
import os
import re
import socket
import urllib.request
from collections.abc import Mapping, Sequence

import ml_collections

from gigatok_jax.errors import ClusterError

PORT = 8476  # of the coordinator, where the launcher names none


@dataclasses.dataclass(frozen=True)
class Place:
    """Record of the position of a process in its cluster.

    0, -1 and "" stand for an unknown number of processes, index and coordinator.
    """

    source: str  # name of the launcher, or "flags"
    processes: int
    process: int
    coordinator: str  # host:port of process 0
    devices: tuple[int, ...] | None = None  # GPUs of this host for this process; None is all


def find(flags: ml_collections.ConfigDict, env: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the index of this process and the size of its cluster; None if the process is alone.

    Args:
        flags: `config.cluster`; reads coordinator, processes and process.
        env: environment variables of this process.

    Raises:
        ClusterError: a launcher shows several tasks, but not which of them this process is or
            where process 0 is; or flags and launcher disagree.
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
    """Returns the first host of Slurm's list of nodes.

    "a3,b1" gives "a3", "a[07-09,11],b1" gives "a07".
    """
    return re.sub(r"^([^,\[]*)(?:\[([^,\-\]]*))?.*", r"\1\2", nodes)


def _tasks_of(counts: str, node: int) -> int:
    """Returns the number of tasks of a node, from Slurm's list such as "2(x3),1"."""
    each = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(number)] * int(times or 1)
    return each[node] if node < len(each) else 1


def _gpus(tasks: int, local: int, env) -> tuple[int, ...] | None:
    """Returns the indices of a task's GPUs among the GPUs of its host.

    None means all that the task sees: it is alone on its host, or sees a single GPU.
    """
    visible = list(filter(None, env.get("CUDA_VISIBLE_DEVICES", "").split(",")))
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
    """Returns the place of a TPU VM in its cluster, as its metadata server knows it.

    None stands for a machine that is no such VM, or is the only one.
    """
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    known = "GCE_METADATA_IP" in env or (chips and importlib.util.find_spec("libtpu"))
    if not known or env.get("TPU_SKIP_MDS_QUERY") or env.get("JAX_PLATFORMS") == "cpu":
        return None
    worker = _metadata("agent-worker-number", env)
    hosts = _metadata("worker-network-endpoints", env)
    if worker is None or hosts is None:
        return None
    hosts = [entry.split(":")[-1] for entry in hosts.split(",")]  # host, or name:id:host
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
