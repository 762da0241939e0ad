"""Names of classes, and text that names some of them: "207", "0-9", "all", "panda"."""

import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from importlib import resources

from gigatok_jax.errors import ConfigError

SHOWN = 5  # candidates that a message lists
MOST = 2**31 - 1  # an image id

Names = Sequence[Sequence[str]]  # the names of each class, most common first


@functools.cache
def imagenet() -> tuple[tuple[str, ...], ...]:
    """Names of the 1000 ImageNet classes in the order of their labels; the synset id is last.

    Source: WordNet 3.0, as in `imagenet_classes.txt`.
    """
    text = (
        resources.files("gigatok_jax.evaluation")
        .joinpath("imagenet_classes.txt")
        .read_text("utf-8")
    )
    lines = (line.split(" ", 1) for line in text.splitlines())
    return tuple((*names.split(", "), synset) for synset, names in lines)


def names_of(count: int, own: Sequence[str] = ()) -> Names:
    """Names of the classes of a prior.

    Args:
        count: of classes.
        own: names in the dataset it was trained on, if they are known. A thousand without names,
            or named by ImageNet's synset ids, are ImageNet's classes.
    """
    if count == len(imagenet()) and (not own or own[0] == imagenet()[0][-1]):
        return imagenet()
    if len(own) == count:
        return tuple((name,) for name in own)
    return tuple((str(i),) for i in range(count))


def parse(text: str, names: Names) -> list[int]:
    """Class ids that a text names, in its order.

    Args:
        text: parts between commas. A part is a number, a range "0-9" with both its ends, "all", a
            name, or a piece of a name that only one class has; case does not matter. A name that
            several classes bear goes to the one that lists it first: "panda" is the giant panda.
        names: of each class, from `names_of`.

    Raises:
        ConfigError: no such class, with near names, or a piece of several names, with their ids.
    """
    parts = [part.strip() for part in text.split(",")]
    ids = [i for part in parts if part for i in _part(part, names)]
    if not ids:
        raise ConfigError("no class is named: give numbers, a range like 0-9, names, or all")
    return ids


def numbers(text: str) -> Iterator[int]:
    """Integers of a text like "5, 9, 20-30"; both ends of a range are in it.

    Raises:
        ConfigError: a part is neither a number in [0, 2^31) nor a range of them that rises.
    """
    for part in filter(None, (part.strip() for part in text.split(","))):
        span = _span(part)
        if span is None or span[0] < 0 or span[-1] > MOST:
            raise ConfigError(f"{part!r} is no number or range of 0 to {MOST}, like 5 or 20-30")
        yield from span


def _part(part: str, names: Names) -> Sequence[int]:
    if part.lower() == "all":
        return range(len(names))
    span = _span(part)
    if span is None:
        return [_named(part.lower(), names)]
    for end in (span[0], span[-1]):
        if not 0 <= end < len(names):
            raise ConfigError(f"class {end} does not exist, expected 0 to {len(names) - 1}")
    return span


def _span(part: str) -> range | None:
    """A number or a range of them, None for other text."""
    match = re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", part)
    if not match:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ConfigError(f"range {part!r} falls, expected one like {last}-{first}")
    return range(first, last + 1)


def _named(wanted: str, names: Names) -> int:
    found = _bearers(wanted, names)
    if not found:
        found = [i for i, own in enumerate(names) if any(wanted in name.lower() for name in own)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{wanted!r} may be {_listed(found, names)}: give the number or more")
    raise ConfigError(f"no class {wanted!r}{_near(wanted, names)}")


def _bearers(wanted: str, names: Names) -> list[int]:
    """Classes that bear a name, of those the ones that list it first."""
    ranks = {}
    for i, own in enumerate(names):
        lower = [name.lower() for name in own]
        if wanted in lower:
            ranks[i] = lower.index(wanted)
    return [i for i, rank in ranks.items() if rank == min(ranks.values())]


def _near(wanted: str, names: Names) -> str:
    known = {name.lower() for own in names for name in own}
    near = difflib.get_close_matches(wanted, sorted(known), SHOWN)
    found = list(dict.fromkeys(i for name in near for i in _bearers(name, names)))
    return f"; near: {_listed(found, names)}" if found else f"; there are 0 to {len(names) - 1}"


def _listed(ids: Sequence[int], names: Names) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(f"{i} ({', '.join(names[i][:2])})" for i in ids[:SHOWN]) + more
