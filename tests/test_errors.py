"""Checks of values: what they let through, and the one line they say."""

import pytest

from gigatok_jax import errors


@pytest.mark.parametrize("value", ["cosine", "wsd", 3, None])
def test_a_known_value_passes(value):
    errors.one_of("optim.schedule", value, ("cosine", "wsd", 3, None))


@pytest.mark.parametrize(
    ("value", "hint"), [("cosin", "; did you mean 'cosine'?"), ("zigzag", ""), (None, ""), (7, "")]
)
def test_an_unknown_value_is_refused_with_all_that_work(value, hint):
    with pytest.raises(errors.ConfigError) as caught:
        errors.one_of("optim.schedule", value, ("cosine", "wsd"))
    expected = f"optim.schedule is {value!r}, expected one of cosine, wsd{hint}"
    assert str(caught.value) == expected


def test_as_many_names_are_suggested_as_asked_for():
    assert errors.near("aab", ["aaa", "aac", "xyz"], count=2) in (
        "; did you mean 'aaa' or 'aac'?",
        "; did you mean 'aac' or 'aaa'?",
    )
