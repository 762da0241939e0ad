"""Lists the accelerators to plan for, and parses names of their topologies:

v5p:4x4x4    one slice of 64 TPU v5p chips
h200x64      64 H200 GPUs, 8 to a host
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from gigatok_jax.errors import ConfigError, near
from gigatok_jax.train import program as program_lib

GIB = 2**30
GPUS_PER_HOST = 8
SHARE = 0.92  # share of a GPU's memory that launch/xla_flags.sh gives to jax


class Chip(NamedTuple):
    """Record of an accelerator's memory and speeds; links are in bytes per second and direction."""

    name: str
    platform: str
    memory: float  # GiB that programs may use; 0 if unknown
    peak: float  # dense bfloat16 FLOP/s; 0 if unknown
    link: float  # to devices of the same slice (ICI) or host (NVLink)
    network: float  # to devices of other slices or hosts


class Topology(NamedTuple):
    """Record of devices of one kind and how they are joined: TPU slices of one shape, or GPUs."""

    chip: Chip
    shape: tuple[int, ...]  # chips of one slice along its axes; (count,) of GPUs
    slices: int

    @property
    def devices(self) -> int:
        """Number of devices in the topology."""
        return math.prod(self.shape) * self.slices

    @property
    def neighbours(self) -> int:
        """Number of devices that fast links join: the devices of one TPU slice or GPU host."""
        return GPUS_PER_HOST if self.chip.platform == "gpu" else math.prod(self.shape)

    @property
    def limit(self) -> int | None:
        """Number of bytes that programs may use on each device; None if unknown."""
        return int(self.chip.memory * GIB) if self.chip.memory else None

    def __str__(self):
        if self.chip.platform != "tpu":
            return f"{self.chip.name}x{self.shape[0]}"
        piece = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return piece if self.slices == 1 else f"{self.slices} slices of {piece}"


class GPU(NamedTuple):
    """Record of a GPU's properties that its compiler needs on a machine without that GPU."""

    kind: str
    capability: int
    memory: float  # GiB by its driver
    cores: int  # streaming multiprocessors
    bandwidth: int  # bytes per second
    cache: int  # bytes of L2


GPUS = {
    "h100": GPU("NVIDIA H100 80GB HBM3", 9, 79.1, 132, 3_352 * 10**9, 50 * 2**20),
    "h200": GPU("NVIDIA H200", 9, 139.8, 132, 4_814 * 10**9, 60 * 2**20),
    "b200": GPU("NVIDIA B200", 10, 178.3, 148, 8_000 * 10**9, 126 * 2**20),
}
# Sources. TPUs: cloud.google.com/tpu/docs, pages v5e, v5p and v6e, and the TPU compiler's limit of
# memory. GPUs: NVIDIA's data sheets of H100 SXM, H200 SXM and DGX B200, with a 400 Gb/s port each.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75, 197e12, 200e9, 25e9 / 8),
        Chip("v5p", "tpu", 95.73, 459e12, 600e9, 50e9 / 8),
        Chip("v6e", "tpu", 31.24, 918e12, 400e9, 100e9 / 8),
        Chip("h100", "gpu", SHARE * GPUS["h100"].memory, 989e12, 450e9, 400e9 / 8),
        Chip("h200", "gpu", SHARE * GPUS["h200"].memory, 989e12, 450e9, 400e9 / 8),
        Chip("b200", "gpu", SHARE * GPUS["b200"].memory, 2250e12, 900e9, 400e9 / 8),
    )
}
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {capability} }}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: {bytes} memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""
# Settings without which libtpu asks a server of the cloud or warns; nothing runs on a TPU here.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_DEEP = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24"
SLICES = {"v5e": _FLAT.split(), "v6e": _FLAT.split(), "v5p": _DEEP.split()}


def parse(text: str, slices: int = 1) -> Topology:
    """Returns the topology of a name such as "v5p:4x4x4" or "h200x64".

    Args:
        text: name of a TPU slice, like "v5p:4x4x4", or of GPUs, like "h200x64".
        slices: number of such TPU slices, joined by the network of the data centre.

    Raises:
        ConfigError: the chip or slice is unknown, or the number of GPUs or slices is impossible.
    """
    match = re.fullmatch(r"([a-z]\w*?)(?::(\d+(?:x\d+)*)|x(\d+))", text)
    chip = CHIPS.get(match[1]) if match else None
    if chip is None or bool(match[2]) != (chip.platform == "tpu"):
        known = [*(f"{name}:{shape}" for name in SLICES for shape in SLICES[name]), *_SOME_GPUS]
        raise ConfigError(
            f"topology {text!r} is unknown, expected a TPU slice like 'v5p:4x4x4' or GPUs like"
            f" 'h200x64', of {', '.join(CHIPS)}{near(text, known, count=2, cutoff=0.5)}"
        )
    if chip.platform == "gpu":
        return _gpus(chip, int(match[3]), slices)
    if match[2] not in SLICES[chip.name]:
        raise ConfigError(
            f"{chip.name} has no slice {match[2]}, expected one of {', '.join(SLICES[chip.name])}"
        )
    if slices < 1:
        raise ConfigError(f"mesh.dcn is {slices}, expected the number of slices, 1 or more")
    return Topology(chip, tuple(map(int, match[2].split("x"))), slices)


_SOME_GPUS = [f"{c.name}x{n}" for c in CHIPS.values() if c.platform == "gpu" for n in (1, 8, 64)]


def _gpus(chip: Chip, count: int, slices: int) -> Topology:
    if slices != 1:
        raise ConfigError(f"mesh.dcn is {slices}, expected 1: only TPUs have slices")
    if count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise ConfigError(
            f"{chip.name}x{count}: expected 1 to {GPUS_PER_HOST} GPUs, or whole hosts of"
            f" {GPUS_PER_HOST}"
        )
    return Topology(chip, (count,), 1)


def here() -> Topology:
    """Returns the topology of this process's devices; speeds are 0 for chips not in CHIPS."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    words = kind.lower().split()
    name = _KINDS.get(kind) or next((name for name in CHIPS if name in words), None)
    limit = (program_lib.memory_limit() or 0) / GIB
    chip = CHIPS[name] if name else Chip(kind, jax.default_backend(), 0, 0, 0, 0)
    return Topology(chip._replace(memory=limit), (count,), 1)


_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


def compiler(topology: Topology) -> list[jax.Device] | None:
    """Returns absent devices of a topology to compile for; None without their compiler."""
    if topology.chip.platform == "gpu":
        return _absent_gpus(topology) if _has_gpu_compiler() else None
    if importlib.util.find_spec("libtpu") is None:
        return None
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices


def _has_gpu_compiler() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = (f"jax_plugins.xla_cuda{version}" for version in (12, 13))
    return any(importlib.util.find_spec(name) for name in names)


def _absent_gpus(topology: Topology) -> list:
    gpu, count = GPUS[topology.chip.name], topology.devices
    target = _TARGET.format(**gpu._asdict(), bytes=int(gpu.memory * GIB))
    shape = f"1x{math.ceil(count / GPUS_PER_HOST)}x{min(count, GPUS_PER_HOST)}"
    absent = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
    return absent.devices
