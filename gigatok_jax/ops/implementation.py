"""Which implementation of an operation runs: the one place that asks about devices and jax."""

import functools
import importlib
from collections.abc import Sequence

import jax
from absl import logging

from gigatok_jax.ops import constrain

NAMES = ("xla", "pallas_gpu", "pallas_tpu")
PLATFORMS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
_DIALECTS = {"pallas_gpu": "triton", "pallas_tpu": "tpu"}  # modules of jax.experimental.pallas


def choose(operation: str, width: int, widths: Sequence[int]) -> str:
    """The fastest implementation that can run on the default device, logged once.

    Args:
        operation: what the log calls it.
        width: of the vectors.
        widths: that the kernels take.
    """
    impl = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(_device().platform, "xla")
    reason = obstacle(impl, width, widths)
    if impl == "pallas_tpu" and not constrain.reaches_devices():
        reason = "several chips and no mesh in force, see jax.set_mesh"
    _log(operation, "xla" if reason else impl, f" ({impl}: {reason})" if reason else "")
    return "xla" if reason else impl


@functools.cache  # once for each choice
def _log(operation, impl, note):
    logging.info("%s: %s on %s%s", operation, impl, _device().device_kind, note)


def platform() -> str:
    """Platform of the devices that a program is traced for: "cpu", "gpu" or "tpu"."""
    return _device().platform


def is_here() -> bool:
    """Whether those devices are of this process, rather than of a plan."""
    return _device() is _default()


def _device():
    """That programs are compiled for, unless their arguments lie elsewhere."""
    here = _default()
    # A mesh of devices that are not there, to compile for, knows their platform and kind.
    planned = jax.sharding.get_abstract_mesh().abstract_device
    return planned if planned and planned.platform != here.platform else here


def _default():
    given = jax.config.jax_default_device
    return given if hasattr(given, "platform") else jax.devices(given)[0]


def check(operation: str, impl: str, width: int, widths: Sequence[int], interpret: bool) -> None:
    """Refuses an implementation that cannot run here.

    Raises:
        ValueError: it is unknown.
        NotImplementedError: with the reason.
    """
    reason = obstacle(impl, width, widths, interpret)
    if reason is not None:
        raise NotImplementedError(f"{operation} {impl!r} cannot run here: {reason}")


def obstacle(impl: str, width: int, widths: Sequence[int], interpret: bool = False) -> str | None:
    """Why an implementation cannot run here on vectors of this width; None if it can."""
    if impl not in NAMES:
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(NAMES)}")
    if impl == "xla":
        return None
    if width not in widths:
        return f"vectors are {width} wide, and it takes up to {widths[-1]}; use 'xla'"
    if not _has_dialect(impl):
        return f"jax {jax.__version__} has no jax.experimental.pallas.{_DIALECTS[impl]}"
    if interpret:
        return None
    if _device().platform != PLATFORMS[impl]:
        return f"it needs a {PLATFORMS[impl]}, and the device is a {_device().platform}"
    if impl == "pallas_gpu" and _compute_capability() < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def _compute_capability() -> float:
    """Of an NVIDIA GPU; 0 for another."""
    if not is_here():
        return 9.0  # those that programs are planned for have it, or more: hardware.py
    try:
        return float(getattr(_device(), "compute_capability", 0))
    except ValueError:  # AMD's are names
        return 0.0


def _has_dialect(impl: str) -> bool:
    """Whether this jax has the dialect that the kernels are written in; Triton's is to go."""
    try:
        importlib.import_module(f"jax.experimental.pallas.{_DIALECTS[impl]}")
    except ImportError:
        return False
    return True
