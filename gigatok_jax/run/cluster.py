"""Joins several processes, mostly of several hosts, into one run, and ends them.

The index of a process comes from `config.cluster`, or else from the environment of a launcher, see
`launchers`. Before jax starts, every process sends process 0 what it is about to run, and receives
the answers of all: an incomplete cluster, or a cluster whose members differ, ends with the same
line in every process instead of a hang or several runs in one folder.
"""

import collections
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from gigatok_jax.errors import ClusterError, GigatokError
from gigatok_jax.run import command_line, launchers, signals
from gigatok_jax.run import workdir as workdir_lib

MOST_BYTES = 1 << 20  # of a message of one process
SEEN_SECONDS = 20.0  # until a new file has to show on shared storage
PRIVATE = ("cluster.process", "cluster.coordinator")  # config keys that may differ
SHOWN = 5  # differences that an error lists
GONE = re.compile(
    "gloo|connection (closed|reset|refused)|heartbeat|coordination|unavailable|nccl|"
    "deadline.?exceeded|socket|peer",
    re.IGNORECASE,
)


# Meeting.


class Meeting:
    """Exchange of messages between all processes of a cluster, before jax is started.

    The other processes connect to process 0 at the coordinator's port; `close` frees the port for
    jax.
    """

    def __init__(self, place: launchers.Place, seconds: float):
        """Listens for the other processes as process 0, or connects to process 0 as another.

        Args:
            place: position of this process in its cluster.
            seconds: longest time to wait for the other processes.

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
        """Sends a JSON value to all processes that have come; returns the values of all."""
        if self._listener is None:
            self._send(self._others[0], value)
            return self._receive(self._others[0])
        if not self._others:
            return self._first_round(value)
        return self._send_all([value, *(self._receive(other) for other in self._others)])

    def close(self) -> None:
        """Closes the connections, process 0 last, so that the port of process 0 is free at once."""
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
        """Collects a value from each process that connects to process 0; sends all values to each.

        Ends when the cluster is complete or the time is over. Connections that send no JSON are
        ignored.
        """
        values = [value]
        while len(values) < self._place.processes and (left := self._left()) > 0:
            self._listener.settimeout(left)
            try:
                other, _ = self._listener.accept()
                other.settimeout(min(self._left() + 1, 10))
                values.append(json.loads(self._line(other)))
                other.settimeout(self._seconds + 30)  # a member may wait for slow storage later
                self._others.append(other)
            except (OSError, ValueError):
                continue
        return self._send_all(values)

    def _send_all(self, values: list[Any]) -> list[Any]:
        for other in self._others:
            with contextlib.suppress(OSError):  # jax notices a process that is gone by now
                self._send(other, values)
        return values

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

    def _reach(self, address: tuple[str, int]) -> socket.socket:
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

    def _send(self, other: socket.socket, value: Any) -> None:
        other.sendall(json.dumps(value).encode() + b"\n")

    def _receive(self, other: socket.socket) -> Any:
        try:
            return json.loads(self._line(other))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{_who(self._place)} lost another process while the cluster formed ({error})"
            ) from error

    def _line(self, other: socket.socket) -> bytes:
        data = bytearray()
        # The values of all processes come back in one message, to members only.
        limit = MOST_BYTES * (self._place.processes if self._listener is None else 1)
        while not data.endswith(b"\n"):
            block = other.recv(1 << 16)
            data += block
            if not block or len(data) > limit:
                raise ValueError("connection closed")
        return bytes(data)


def _who(place: launchers.Place) -> str:
    return f"process {place.process} of {place.processes} on {socket.gethostname()}"


# Agreement.


def agree(
    place: launchers.Place, config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> None:
    """Waits until all processes have come; checks that they belong to one run in one workdir.

    Config, workdir and software have to be the same, and the workdir has to be shared by all hosts.

    Raises:
        ClusterError: raised in every process; names the missing processes, or
            what differs between processes.
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


def _introduce(meeting: Meeting, place: launchers.Place, config, workdir, mark: str) -> epath.Path:
    """Checks that all processes have come and agree on their run.

    Returns the path of the file that process 0 has made, to test whether all processes see it.
    """
    values = describe(config, workdir)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    mine = {"process": place.process, "processes": place.processes}
    mine |= {"source": place.source, "host": socket.gethostname()}
    members = meeting.exchange(mine | {"digest": digest, "mark": mark})
    check_members(members, config.cluster.start_seconds)
    if len({member["digest"] for member in members}) > 1:  # whole configs only when they differ
        check_same(meeting.exchange(mine | {"values": values}))
    return epath.Path(_first(members)["mark"])


def describe(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Returns the JSON values, by name, in which all processes of a run have to agree.

    These are config, workdir and software, without the config keys of `PRIVATE`.
    """
    values = {f"config.{name}": value for name, value in command_line.flatten(config)}
    for name in PRIVATE:
        del values[f"config.{name}"]
    values |= {"workdir": str(workdir)} | dict(command_line.flatten(workdir_lib.software()))
    return json.loads(json.dumps(values))


def check_members(members: Sequence[Mapping[str, Any]], seconds: float) -> None:
    """Raises ClusterError if processes of a cluster are missing or contradict each other.

    Args:
        members: "process", "processes", "source" and "host" of every process that came.
        seconds: time that process 0 waited.
    """
    size = _first(members)["processes"]
    indices = sorted(member["process"] for member in members)
    if all(member["processes"] == size for member in members) and indices == list(range(size)):
        return
    came = ", ".join(
        f"{member['process']} of {member['processes']} on {member['host']} ({member['source']})"
        for member in sorted(members, key=_index)
    )
    missing = sorted(set(range(size)) - set(indices))
    names = ", ".join(map(str, missing[:SHOWN])) + ("..." if len(missing) > SHOWN else "")
    why = f"process {names} did not come within {seconds:g} s" if missing else "they contradict"
    raise ClusterError(f"the cluster is not complete, {why}; here are: {came}")


def check_same(members: Sequence[Mapping[str, Any]]) -> None:
    """Raises ClusterError if the "values" of processes differ.

    The error names the values that differ, and two processes that differ in each.
    """
    first, lines = _first(members), {}
    for member in sorted(members, key=_index):
        for name in sorted(first["values"].keys() | member["values"].keys()):
            theirs, ours = member["values"].get(name), first["values"].get(name)
            if theirs != ours and name not in lines:
                lines[name] = (
                    f"{name} is {ours!r} on process 0 ({first['host']}) and {theirs!r} on process"
                    f" {member['process']} ({member['host']})"
                )
    if lines:
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ClusterError(
            f"the processes are not of one run: {'; '.join(list(lines.values())[:SHOWN])}{more}:"
            " start all with the same command and environment"
        )


def check_storage(seen: Sequence[tuple[int, str, bool]], workdir: epath.PathLike) -> None:
    """Raises ClusterError if the workdir is not the same folder on all hosts.

    Args:
        seen: index and host of each process, and whether it sees the file of process 0.
        workdir: folder of the run, for the message.
    """
    blind = [f"{process} on {host}" for process, host, sees in seen if not sees]
    if blind:
        raise ClusterError(
            f"workdir {workdir} is not shared: process {', '.join(blind)} cannot see what process 0"
            " writes there; choose a --workdir on storage that all hosts share"
        )


def check_devices() -> None:
    """Raises ClusterError if processes have different numbers of devices; starts the jax backend.

    A host that has lost devices is found so.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(counts) != jax.process_count() or len(set(counts.values())) != 1:
        each = ", ".join(f"{i}: {counts[i]}" for i in range(jax.process_count()))
        raise ClusterError(f"the processes have different numbers of devices ({each})")


def _index(member: Mapping[str, Any]) -> int:
    return member["process"]


def _first(members: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(members, key=_index)


def _appears(path: epath.Path) -> bool:
    ends = time.monotonic() + SEEN_SECONDS
    while not (visible := path.exists()) and time.monotonic() < ends:
        time.sleep(0.2)
    return visible


# Running.


@contextlib.contextmanager
def joined(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Iterator[None]:
    """Joins the cluster of `config.cluster` while the block runs; does nothing for one process.

    A process that fails inside the block ends at once: in an orderly end it would wait for the
    other processes, which wait for it in the middle of a step.

    Raises:
        ClusterError: the place of this process is unknown, or the processes do not make one run.
    """
    place = launchers.find(config.cluster)
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
            _end(
                signals.LOST,
                f"{_who(place)} ends, another process is gone or cannot be reached: {why}",
            )
        traceback.print_exc()
        _end(1, f"{_who(place)} ends after the exception above")


def start(place: launchers.Place, flags: ml_collections.ConfigDict) -> None:
    """Starts jax's distributed runtime in a process of the cluster; `flags` is `config.cluster`."""
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
