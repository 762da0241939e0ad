"""Choice of an operation's implementation by device, width of vectors and version of jax."""

import functools
import importlib
from collections.abc import Sequence

import jax
from absl import logging

from gigatok_jax.errors import one_of
from gigatok_jax.ops import constrain

NAMES = ("xla", "pallas_gpu", "pallas_tpu")
PLATFORMS = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
_DIALECTS = {"pallas_gpu": "triton", "pallas_tpu": "tpu"}  # modules of jax.experimental.pallas


def choose(operation: str, width: int, widths: Sequence[int]) -> str:
    """Chooses the fastest implementation of an operation on the platform being traced for.

    Returns the implementation's name, one of `NAMES`, and logs each choice once.

    Args:
        operation: name of the operation in the log.
        width: width of the vectors.
        widths: widths that the kernels support.
    """
    impl = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(_device().platform, "xla")
    reason = obstacle(impl, width, widths)
    if impl == "pallas_tpu" and not constrain.reaches_devices():
        reason = "several chips and no mesh in force, see jax.set_mesh"
    _log(operation, "xla" if reason else impl, f" ({impl}: {reason})" if reason else "")
    return "xla" if reason else impl


@functools.cache  # logs each choice once
def _log(operation, impl, note):
    logging.info("%s: %s on %s%s", operation, impl, _device().device_kind, note)


def platform() -> str:
    """Returns the platform being traced for: "cpu", "gpu" or "tpu"."""
    return _device().platform


def is_here() -> bool:
    """Returns whether the devices being traced for exist, rather than being those of a plan."""
    return _device() is _default()


def _device():
    """Returns the device being traced for: that of a planned mesh in force, else the default.

    Arguments that lie on another device are not taken into account.
    """
    default = _default()
    # The mesh of a plan is abstract: it knows the platform and kind of its devices.
    planned = jax.sharding.get_abstract_mesh().abstract_device
    return planned if planned and planned.platform != default.platform else default


def _default():
    """Returns jax's default device; its setting is a device, a platform's name or None."""
    setting = jax.config.jax_default_device
    return setting if hasattr(setting, "platform") else jax.devices(setting)[0]


def check(operation: str, impl: str, width: int, widths: Sequence[int], interpret: bool) -> None:
    """Raises NotImplementedError if an implementation of an operation cannot run here.

    Args:
        operation: name of the operation in the message.
        impl: name of the implementation.
        width: width of the vectors.
        widths: widths that the kernels support.
        interpret: whether a Pallas implementation runs in its interpreter, on any platform.

    Raises:
        ValueError: `impl` is unknown.
        NotImplementedError: `impl` cannot run here; the message says why.
    """
    reason = obstacle(impl, width, widths, interpret)
    if reason is not None:
        raise NotImplementedError(f"{operation} {impl!r} cannot run here: {reason}")


def obstacle(impl: str, width: int, widths: Sequence[int], interpret: bool = False) -> str | None:
    """Returns why an implementation cannot run here on vectors of this width; None if it can."""
    one_of("impl", impl, NAMES)
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
    """Returns the compute capability of an NVIDIA GPU, or 0 for other GPUs."""
    if not is_here():
        return 9.0  # the GPUs in planning/hardware.py have at least this
    try:
        return float(getattr(_device(), "compute_capability", 0))
    except ValueError:  # on AMD GPUs it is a name
        return 0.0


def _has_dialect(impl: str) -> bool:
    """Returns whether jax has the Pallas dialect of the kernels; Triton's is to be removed."""
    try:
        importlib.import_module(f"jax.experimental.pallas.{_DIALECTS[impl]}")
    except ImportError:
        return False
    return True
