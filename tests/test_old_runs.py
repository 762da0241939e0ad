"""Runs and codes written at commit 1cbdabb resume and load, though the house was rebuilt since.

`tests/golden/1cbdabb` holds a tokenizer's run at step 4 of 8, codes of it, and a prior's run at
step 2 of 4. Their results are those of the uninterrupted runs. See test_old_files.py for the rest.
"""

import contextlib
import json
import pathlib
import shutil
from unittest import mock

import numpy as np
import pytest
import tiny

from configs import ar as ar_config
from gigatok_jax.data import codes
from gigatok_jax.models import cnn, qformer
from gigatok_jax.models import tokenizer as tokenizer_model
from gigatok_jax.run import metric_writer
from gigatok_jax.train import ar, tokenizer

OLD = pathlib.Path(__file__).parent / "golden" / "1cbdabb"


@pytest.fixture(scope="module", autouse=True)
def small_programs():
    # The old runs are those of `tiny` with narrow tokens, which keeps their files small.
    with contextlib.ExitStack() as stack:
        stack.enter_context(tiny.small_programs(tiny.session() / "cache"))
        for module in (cnn, qformer, tokenizer_model):
            stack.enter_context(mock.patch.object(module, "TOKEN_WIDTH", 32))
        yield


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old folders; the configs of the runs name them from where they lie."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    return pathlib.Path("old")


def tokenizer_config():
    config = tiny.run_config()
    config.model.latent_tokens = 16
    return config


def prior_config():
    config = ar_config.get_config("size=b,smoke")
    # No tokenizer: that of the codes is the one at step 8, which is not kept here.
    config.codes, config.tokenizer = "old/codes", ""
    config.model.update(vocab=32, tokens=16, width=16, layers=1)
    config.train.update(steps=4, micro_batches=2)
    config.save.every, config.eval.every, config.log.pictures_every = 2, 4, 4
    return config


def last_rows(workdir, step):
    """Metrics of the last step, without those that depend on the machine."""
    rows = [row for row in metric_writer.read(workdir) if row["step"] == step]
    return {k: v for row in rows for k, v in row.items() if not k.startswith("time/")}


@pytest.mark.parametrize(
    ("name", "train", "config", "steps"),
    [
        ("tokenizer", tokenizer.train, tokenizer_config, 8),
        ("prior", ar.train, prior_config, 4),
    ],
)
def test_a_run_resumes_and_ends_as_it_would_have(old, name, train, config, steps, capsys):
    expected = last_rows(old / name, steps)
    (old / name / "results.json").unlink()  # as the run stood when it was stopped
    train(config(), old / name)
    assert f"resuming at step {steps // 2} of {steps}" in capsys.readouterr().out
    found = last_rows(old / name, steps)
    assert set(expected) <= set(found)
    for key, value in expected.items():
        # Compiled for another processor a code may change place; what is lost here is not.
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert json.loads((old / name / "results.json").read_text())["step"] == steps


def test_codes_are_read(old):
    source = codes.CodesSource(old / "codes")
    results = json.loads((old / "codes" / "results.json").read_text())
    assert (len(source), source.header.tokenizer) == (results["records"], results["tokenizer"])
    counts = source.counts()
    assert np.mean(counts > 0) == results["codebook_usage"]
    (train, held_out) = codes.open_codes(str(old / "codes"), "", 50)
    assert (len(train), len(held_out)) == (len(source) - 50, 50)
