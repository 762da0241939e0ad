"""Names of classes, and text that names some of them."""

import re

import pytest

from gigatok_jax.errors import ConfigError
from gigatok_jax.evaluation import classes

IMAGENET = classes.names_of(1000)


def test_imagenet_is_in_the_order_of_its_synsets():
    synsets = [names[-1] for names in IMAGENET]
    assert len(synsets) == len(set(synsets)) == 1000 and synsets == sorted(synsets)
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in synsets)
    assert all(name.strip() == name and name for names in IMAGENET for name in names)
    # Known labels from both ends and the middle.
    known = {0: "tench", 207: "golden retriever", 388: "giant panda", 980: "volcano"}
    known |= {1: "goldfish", 281: "tabby", 970: "alp", 999: "toilet tissue"}
    assert {i: IMAGENET[i][0] for i in known} == known


@pytest.mark.parametrize(
    "text, expected",
    [
        ("207", [207]),
        ("0-3", [0, 1, 2, 3]),
        ("998 - 999, 5", [998, 999, 5]),
        ("all", list(range(1000))),
        ("panda", [388]),  # the second name of the giant one, the third of the lesser one
        ("Lesser Panda", [387]),
        ("golden retr", [207]),
        ("VOLCANO, goldfish,", [980, 1]),
        ("n02510455", [388]),
        ("207,207", [207, 207]),
        ("missile", [657]),  # also a name of 744, projectile
    ],
)
def test_text_names_classes(text, expected):
    assert classes.parse(text, IMAGENET) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("pnda", r"no class 'pnda'; near: 388 \(giant panda, panda\), "),
        ("1000", "class 1000 does not exist, expected 0 to 999"),
        ("-1", "class -1 does not exist"),
        ("990-1000", "class 1000 does not exist"),
        ("9-0", "range '9-0' falls, expected one like 0-9"),
        ("crane", r"'crane' may be 134 \(crane, n02012849\), 517 \(crane, n03126707\): give"),
        ("terrier", r"'terrier' may be .* and \d+ more: give the number"),
        ("panda, qqqqqq", "no class 'qqqqqq'; there are 0 to 999"),
        (" , ", "no class is named"),
        ("", "no class is named"),
    ],
)
def test_text_that_names_none_or_several_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        classes.parse(text, IMAGENET)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_own_names_take_the_place_of_imagenets():
    pets = classes.names_of(3, ("cat", "dog", "house mouse"))
    assert classes.parse("mouse, 0, dog", pets) == [2, 0, 1]
    with pytest.raises(ConfigError, match=r"no class 'panda'"):
        classes.parse("panda", pets)
    assert classes.names_of(3) == (("0",), ("1",), ("2",))
    assert classes.names_of(1000, [str(i) for i in range(1000)])[7] == ("7",)
    assert classes.names_of(1000, [names[-1] for names in IMAGENET]) == IMAGENET


def test_numbers():
    assert list(classes.numbers("5, 9,20-23,")) == [5, 9, 20, 21, 22, 23]
    assert list(classes.numbers("")) == []
    for text in ("-3", "x", "1-99999999999", "3:5"):
        with pytest.raises(ConfigError, match=f"'{text}' is no number or range"):
            list(classes.numbers(text))
