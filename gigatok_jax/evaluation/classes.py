"""Functions for the names of classes, and for class ids from text like "207", "0-9" or "panda"."""

import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from importlib import resources

from gigatok_jax.errors import ConfigError

SHOWN = 5  # most candidates that a message lists
MOST = 2**31 - 1  # largest image id

Names = Sequence[Sequence[str]]  # the names of each class, most common first


@functools.cache
def imagenet() -> tuple[tuple[str, ...], ...]:
    """Returns names of the 1000 ImageNet classes in the order of ids; a class's synset id is last.

    Source: WordNet 3.0, as in `imagenet_classes.txt`.
    """
    file = resources.files("gigatok_jax.evaluation").joinpath("imagenet_classes.txt")
    lines = (line.split(" ", 1) for line in file.read_text("utf-8").splitlines())
    return tuple((*names.split(", "), synset) for synset, names in lines)


def names_of(count: int, own: Sequence[str] = ()) -> Names:
    """Returns names of a prior's classes: from its dataset, from ImageNet, or else the numbers.

    Args:
        count: number of classes.
        own: names in the dataset that the prior was trained on, empty if unknown. A thousand
            classes without names, or named by synset ids, are the classes of ImageNet.
    """
    if count == len(imagenet()) and (not own or own[0] == imagenet()[0][-1]):
        return imagenet()
    if len(own) == count:
        return tuple((name,) for name in own)
    return tuple((str(i),) for i in range(count))


def parse(text: str, names: Names) -> list[int]:
    """Returns the class ids that a text names, in the order of the text.

    Args:
        text: words between commas. A word is a number, a range such as "0-9" with both ends, "all",
            a name, or a piece of the names of a single class; case does not matter. A name of
            several classes means the class that lists it first: "panda" is the giant panda.
        names: names of each class, from `names_of`.

    Raises:
        ConfigError: no class has the name (the message lists similar names), or the piece is in
            names of several classes (the message lists their ids).
    """
    ids = [i for word in _words(text) for i in _ids(word, names)]
    if not ids:
        raise ConfigError("no class is named: give numbers, a range like 0-9, names, or all")
    return ids


def numbers(text: str) -> Iterator[int]:
    """Yields the integers of a text like "5, 9, 20-30"; a range includes both ends.

    Raises:
        ConfigError: a word is neither a number in [0, 2^31) nor a rising range of such numbers.
    """
    for word in _words(text):
        span = _span(word)
        if span is None or span[0] < 0 or span[-1] > MOST:
            raise ConfigError(f"{word!r} is no number or range of 0 to {MOST}, like 5 or 20-30")
        yield from span


def _words(text: str) -> Iterator[str]:
    return filter(None, map(str.strip, text.split(",")))


def _ids(word: str, names: Names) -> Sequence[int]:
    if word.lower() == "all":
        return range(len(names))
    span = _span(word)
    if span is None:
        return [_named(word.lower(), names)]
    for end in (span[0], span[-1]):
        if not 0 <= end < len(names):
            raise ConfigError(f"class {end} does not exist, expected 0 to {len(names) - 1}")
    return span


def _span(word: str) -> range | None:
    """Parses a number or a range of numbers like "0-9" into a range; None for other text."""
    match = re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", word)
    if not match:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ConfigError(f"range {word!r} falls, expected one like {last}-{first}")
    return range(first, last + 1)


def _named(wanted: str, names: Names) -> int:
    """Returns the id of the one class with the name `wanted`, or with a name that contains it.

    Raises:
        ConfigError: no class or several classes have such a name.
    """
    ids = _bearers(wanted, names)
    if not ids:
        ids = [i for i, own in enumerate(names) if any(wanted in name.lower() for name in own)]
    if len(ids) == 1:
        return ids[0]
    if ids:
        raise ConfigError(f"{wanted!r} may be {_listed(ids, names)}: give the number or more")
    raise ConfigError(f"no class {wanted!r}{_near(wanted, names)}")


def _bearers(wanted: str, names: Names) -> list[int]:
    """Returns the ids of the classes that have a name and list that name earliest."""
    ranks = {}
    for i, own in enumerate(names):
        lower = [name.lower() for name in own]
        if wanted in lower:
            ranks[i] = lower.index(wanted)
    return [i for i, rank in ranks.items() if rank == min(ranks.values())]


def _near(wanted: str, names: Names) -> str:
    """Returns a hint for an error message: the classes of similar names, or the range of ids."""
    known = {name.lower() for own in names for name in own}
    similar = difflib.get_close_matches(wanted, sorted(known), SHOWN)
    ids = list(dict.fromkeys(i for name in similar for i in _bearers(name, names)))
    return f"; near: {_listed(ids, names)}" if ids else f"; there are 0 to {len(names) - 1}"


def _listed(ids: Sequence[int], names: Names) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(f"{i} ({', '.join(names[i][:2])})" for i in ids[:SHOWN]) + more
