"""What the library raises; `main.py` turns these into one line and exit status 1."""


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
