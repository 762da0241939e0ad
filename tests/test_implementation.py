"""Which implementation is taken, where, and what is said about it."""

import sys

import jax
import pytest
from absl import logging

from gigatok_jax.ops import implementation

WIDTHS = range(1, 65)


class Hopper:
    device_kind, compute_capability = "NVIDIA H200", "9.0"


class Volta:
    device_kind, compute_capability = "Tesla V100", "7.0"


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    implementation._log.cache_clear()
    yield lines
    implementation._log.cache_clear()


def on(monkeypatch, platform, device):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])


def test_a_choice_is_logged_once(said):
    for _ in range(3):
        assert implementation.choose("search", 8, WIDTHS) == "xla"
    assert said == ["search: xla on cpu"]


@pytest.mark.parametrize("platform, impl", [("gpu", "pallas_gpu"), ("tpu", "pallas_tpu")])
def test_an_accelerator_takes_its_kernel_for_widths_that_fit(monkeypatch, said, platform, impl):
    on(monkeypatch, platform, Hopper)
    assert implementation.choose("search", 8, WIDTHS) == impl
    assert implementation.choose("search", 100, WIDTHS) == "xla"
    assert "vectors are 100 wide, and it takes up to 64; use 'xla'" in said[1]


def test_an_old_gpu_takes_xla(monkeypatch, said):
    on(monkeypatch, "gpu", Volta)
    assert implementation.choose("search", 8, WIDTHS) == "xla" and "8.0 or newer" in said[0]


def test_a_jax_without_the_dialect_takes_xla(monkeypatch, said):
    on(monkeypatch, "gpu", Hopper)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert implementation.choose("search", 8, WIDTHS) == "xla"
    with pytest.raises(NotImplementedError, match=r"has no jax\.experimental\.pallas\.triton"):
        implementation.check("search", "pallas_gpu", 8, WIDTHS, interpret=True)
