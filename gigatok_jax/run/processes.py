"""Exchanges values between the processes of a run; all processes call each function.

A process that is alone gets its own value back.
"""

import functools
import json
import socket
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigatok_jax.errors import ConfigError


def is_first() -> bool:
    """Returns whether this is process 0, which alone writes files that are not arrays."""
    return jax.process_index() == 0


def name() -> str:
    """Returns the name of this process for people: "process 1 of 4 on host b"."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def alone(task: str, instead: str) -> None:
    """Raises ConfigError if the run has several processes.

    Args:
        task: name of the work that needs a single process, such as "generate".
        instead: end of the message, which says what to do.

    Raises:
        ConfigError: this process is one of several.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"{task} runs in one process, here are {jax.process_count()}: {instead}")


def gather(data: bytes) -> list[bytes]:
    """Returns the byte strings of all processes, in the order of the processes.

    The lengths of the byte strings may differ.
    """
    if jax.process_count() == 1:
        return [data]
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Joins the rows [b ...] of all processes into one array, in the order of the processes.

    Every type stays exact; b may differ between processes.
    """
    parts = gather(np.ascontiguousarray(rows).tobytes())
    shape = (-1, *rows.shape[1:])
    return np.concatenate([np.frombuffer(part, rows.dtype).reshape(shape) for part in parts])


def from_first(make: Callable[[], Any]) -> Any:
    """Calls `make` on process 0 alone, and returns its JSON value in every process."""
    if jax.process_count() == 1:
        return make()
    return json.loads(gather(json.dumps(make()).encode() if is_first() else b"")[0])


def smallest(value: int) -> int:
    """Returns the smallest of the values that the processes give."""
    return int(gather_rows(np.array([value])).min())


def whole(array: jax.Array) -> np.ndarray:
    """Copies a global array to the host of every process, as one numpy array."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def largest(value: int) -> jax.Array:
    """Returns the largest of the values that the processes give, as an i32 array without axes.

    Devices compute the result among the training steps, so read it later.
    """
    return _maximum()(_on_all_devices(value))


@functools.cache
def _devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))


@functools.cache
def _on_all_devices(value: int) -> jax.Array:
    """Makes an array i32[devices] in which each process's devices hold its value.

    The array is cached, because the value is almost always 0.
    """
    split = NamedSharding(_devices(), PartitionSpec("all"))
    rows = np.full(jax.local_device_count(), value, np.int32)
    return jax.make_array_from_process_local_data(split, rows)


@functools.cache
def _maximum() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(_devices(), PartitionSpec()))
