"""Reads the command line: every mistake on it is one line on stderr and exit status 1."""

import argparse
import contextlib
import difflib
import errno
import os
import pathlib
import runpy
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import ml_collections
from absl import flags, logging

from gigatok_jax.errors import ConfigError, GigatokError, near

_PARSING = (flags.Error, LookupError, AttributeError, ValueError, TypeError)


@contextlib.contextmanager
def one_line_errors(*also: type[Exception]) -> Iterator[None]:
    """Runs a block, and ends the process with one line if the block raises an expected error.

    Expected are the errors of this library and those of the types in `also`.
    """
    try:
        yield
    except (GigatokError, *also) as error:
        sys.exit("error: " + _reason(error))


def _reason(error) -> str:
    """Returns the message of an error as one line.

    The message is that of the first error of this library in the chain of causes, or else the
    error's own.
    """
    chain = [error]
    while (before := _before(chain[-1])) is not None:
        chain.append(before)
    ours = [error for error in chain if isinstance(error, GigatokError)]
    error = ours[-1] if ours else error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def _before(error) -> BaseException | None:
    """Returns the error that another error was raised over; None after `raise ... from None`."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextlib.contextmanager
def folder_errors(workdir: str) -> Iterator[None]:
    """Runs a block, and turns its errors about a workdir or a full disk into a ConfigError.

    Other errors of the file system pass unchanged.

    Raises:
        ConfigError: a file or folder in the workdir cannot be made or written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        name = os.path.abspath(error.filename or "")
        inside = os.path.commonpath([name, os.path.abspath(workdir)]) == os.path.abspath(workdir)
        if error.errno != errno.ENOSPC and not inside:
            raise
        at = name if error.filename else workdir
        raise ConfigError(f"{at}: {error.strerror}; --workdir=DIR names another folder") from error


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line for absl's `app.run`, and returns the rest: the program's name.

    A mistake ends the process with one line, which names the nearest known file or key where one is
    unknown.
    """
    with one_line_errors(*_PARSING):
        if not any(argument.lstrip("-").startswith("help") for argument in argv):
            config = load_config(_config_value(argv))
            _check_overrides(argv, dict(flatten(config)))
        rest = parse_known(argv)
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is not an option; options look like --config.seed=1")
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # Orbax tells every save in ten lines
        return rest


def parse_known(argv: list[str]) -> list[str]:
    """Parses the command line with absl's own parser, and returns the arguments that are no flags.

    `--help` ends the process with status 0.
    """
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl ends so after --help alone, with status 1
        sys.exit(0)


class Parser(argparse.ArgumentParser):
    """Parser of a module's arguments, for which a mistake is one line and exit status 1."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 1 and one line on stderr that holds the message."""
        sys.exit(f"error: {message}; --help says what there is")


def _config_value(argv) -> str:
    """Returns FILE:arguments from `--config=FILE:arguments` or `--config FILE:arguments`.

    Raises ConfigError if the option is missing.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    names = [argument.partition("=")[0] for argument in argv[1:]]
    similar = difflib.get_close_matches("--config", names, n=1, cutoff=0.8)
    typed = f" ({similar[0]} is not an option)" if similar else ""
    raise ConfigError(f"no config given{typed}; try --config=configs/demo.py")


def load_config(value: str) -> ml_collections.ConfigDict:
    """Runs the Python file of a config, FILE or FILE:arguments, and returns the config it makes.

    Raises:
        ConfigError: the file does not exist, is no Python or has no function `get_config`.
    """
    name, _, argument = value.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        known = [str(other) for other in path.parent.glob("*.py")]
        raise ConfigError(f"no config file {path}{near(str(path), known, cutoff=0.4)}")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
    except (SyntaxError, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no config: {type(error).__name__} {error}") from error
    return get_config(argument or None)


def _check_overrides(argv, defaults):
    """Raises ConfigError if the name or number of a `--config.name=value` is wrong.

    absl checks values of other types.
    """
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            continue
        key = name.removeprefix("--config.")
        if key not in defaults:
            raise ConfigError(f"the config has no key {key!r}{near(key, defaults, cutoff=0.4)}")
        kind = type(defaults[key])
        if equals and kind in (int, float) and not _reads(kind, value):
            expected = f"expected {kind.__name__} like {defaults[key]}"
            raise ConfigError(f"{name} is {value!r}, {expected}")


def _reads(kind, text) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key and the value of every leaf of a nested config."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
