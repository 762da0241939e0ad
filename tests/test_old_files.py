"""Saved folders written at commit 1cbdabb load, and their models compute what they did there."""

import json
import pathlib

import numpy as np
import pytest
import tiny

import gigatok_jax

OLD = pathlib.Path(__file__).parent / "golden" / "1cbdabb"


@pytest.fixture(scope="module")
def expected():
    return json.loads((OLD / "expected.json").read_text())


def test_a_saved_tokenizer_computes_what_it_did(expected):
    tokenizer = gigatok_jax.load_tokenizer(OLD / "saved_tokenizer")
    assert tokenizer.fingerprint == expected["tokenizer"]
    assert tokenizer.training == {"weights": "raw"}
    np.testing.assert_array_equal(tokenizer.encode(tiny.images(2)), expected["codes"])
    decoded = tokenizer.decode(np.asarray(expected["decode"]))  # [b h w 3]
    corner = decoded[:, 0, :4, 0]
    np.testing.assert_allclose(corner, expected["decoded_corner"], rtol=0, atol=1e-4)


def test_a_saved_prior_generates_what_it_did(expected):
    prior = gigatok_jax.load_prior(OLD / "saved_prior")
    assert (prior.step, prior.training["weights"]) == (4, "raw")
    codes = prior.generate(expected["classes"], seed=expected["seed"])
    np.testing.assert_array_equal(codes, expected["generated"])
