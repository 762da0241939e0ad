"""Exceptions of the library, which `main.py` turns into one line and exit status 1, and checks."""

import difflib
from collections.abc import Iterable
from typing import Any


class GigatokError(Exception):
    """Base of every error that names something the caller can change."""


class ConfigError(GigatokError, ValueError):
    """A configuration value that does not exist, has the wrong type or cannot work."""


class ClusterError(GigatokError):
    """Processes that cannot run as one."""


class DataError(GigatokError):
    """Images or folders that cannot be read or used."""


class CheckpointError(GigatokError):
    """A checkpoint that is missing, damaged, or of another model."""


class MissingWeightsError(GigatokError, FileNotFoundError):
    """Weights of a frozen network that are not on this machine."""


class NonFiniteError(GigatokError, FloatingPointError):
    """A loss or gradient that is no longer a number."""


class ImmutableError(GigatokError, AttributeError):
    """An attempt to change an object that other threads may be using."""


def one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Refuses a value that is not among the known ones.

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
    """A hint to end an error with: "; did you mean 'cosine'?", or "" if nothing known is similar.

    Args:
        word: what was given.
        known: what would have worked.
        count: largest number of suggestions.
        cutoff: smallest similarity of a suggestion, in [0, 1].
    """
    if not isinstance(word, str):
        return ""
    similar = difflib.get_close_matches(word, list(map(str, known)), count, cutoff)
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
