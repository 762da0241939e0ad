"""The benchmarks of kernels run where there is no accelerator, and refuse wrong results."""

import sys

import numpy as np
import pytest
from PIL import Image

from gigatok_jax.benchmarks import codebook_search, compare, entropy


@pytest.mark.parametrize("module", [codebook_search, entropy])
def test_a_table_and_a_picture_on_a_cpu(module, monkeypatch, tmp_path, capsys):
    sizes = ["--tokens", "128", "256", "--rows", "64", "--at", "128", "64", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *sizes, "--out", str(tmp_path)])
    module.main()
    name = module.__name__.split(".")[-1]
    said = capsys.readouterr().out
    assert "| 256 | 64 | xla |" in said and (tmp_path / f"{name}.json").exists()
    pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2  # a line besides black on white


def test_a_wrong_search_is_counted():
    z, codebook = compare.unit_vectors(0, 100, 8), compare.unit_vectors(1, 32, 8)
    codes = np.square(z[:, None] - codebook).sum(-1).argmin(1)
    assert codebook_search.count_wrong(z, codebook, codes) == 0
    codes[:7] = (codes[:7] + 1) % 32
    assert codebook_search.count_wrong(z, codebook, codes) == 7


def test_gradients_are_checked_against_those_of_differences():
    z, codebook = (compare.unit_vectors(i, 6, 4).astype(np.float64) for i in range(2))
    dz, _ = entropy.float64_gradients(z, codebook)
    step = np.zeros_like(z)
    step[2, 1] = 1e-6

    def loss(z):
        logits = -np.square(z[:, None] - codebook).sum(-1) / entropy.TEMPERATURE
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = p.mean(0)
        of_tokens = -(p * np.log(np.maximum(p, 1e-300))).sum(1).mean()
        return of_tokens + (mean * np.log(mean + entropy.EPSILON)).sum()

    slope = (loss(z + step) - loss(z - step)) / 2e-6
    assert dz[2, 1] == pytest.approx(slope, rel=1e-4, abs=1e-7)
