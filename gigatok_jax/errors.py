"""Exceptions of the library and a check of values that raises one of these exceptions.

`main.py` turns an exception of the library into one line and exit status 1.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class GigatokError(Exception):
    """Base class of the library's exceptions, each for a cause that the caller can change."""


class ConfigError(GigatokError, ValueError):
    """Exception for a configuration value that is unknown, has the wrong type or cannot work."""


class ClusterError(GigatokError):
    """Exception for processes of a cluster that cannot run as one job."""


class DataError(GigatokError):
    """Exception for input data, such as images, codes or folders, that cannot be read or used."""


class CheckpointError(GigatokError):
    """Exception for a checkpoint that cannot be used: missing, damaged, or of another model."""


class MissingWeightsError(GigatokError, FileNotFoundError):
    """Exception for weights of a frozen network that are not on this machine."""


class NonFiniteError(GigatokError, FloatingPointError):
    """Exception for a loss or gradient that is infinite or not a number."""


class ImmutableError(GigatokError, AttributeError):
    """Exception for an attempt to change an object that other threads may be using."""


def one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises ConfigError if a value is not among the known values.

    Args:
        name: how the value is set, such as "train.dtype".
        value: the value of the caller.
        known: every value that works, in the order to show them.

    Raises:
        ConfigError: "<name> is <value>, expected one of <known>", with the nearest known name.
    """
    known = tuple(known)
    if value not in known:
        choices = ", ".join(map(str, known))
        raise ConfigError(f"{name} is {value!r}, expected one of {choices}{near(value, known)}")


def near(word: Any, known: Iterable[Any], *, count: int = 1, cutoff: float = 0.6) -> str:
    """Returns "; did you mean 'cosine'?" to end an error with, or "" if no known word is similar.

    Args:
        word: the value of the caller.
        known: every value that works.
        count: largest number of suggestions.
        cutoff: smallest similarity of a suggestion, in [0, 1].
    """
    if not isinstance(word, str):
        return ""
    similar = difflib.get_close_matches(word, list(map(str, known)), count, cutoff)
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
