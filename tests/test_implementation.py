"""Which implementation is taken, where, and what is said about it."""

import sys

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from gigatok_jax.ops import attention, implementation

WIDTHS = range(1, 65)


class Hopper:
    platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"


class Volta:
    platform, device_kind, compute_capability = "gpu", "Tesla V100", "7.0"


class Instinct:
    platform, device_kind, compute_capability = "gpu", "AMD Instinct MI300X", "gfx942"


class Trillium:
    platform, device_kind = "tpu", "TPU v6 lite"


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    implementation._log.cache_clear()
    yield lines
    implementation._log.cache_clear()


def on(monkeypatch, device):
    monkeypatch.setattr(jax, "devices", lambda *_: [device])


def test_a_choice_is_logged_once(said):
    for _ in range(3):
        assert implementation.choose("search", 8, WIDTHS) == "xla"
    assert said == ["search: xla on cpu"]


@pytest.mark.parametrize("device, impl", [(Hopper, "pallas_gpu"), (Trillium, "pallas_tpu")])
def test_an_accelerator_takes_its_kernel_for_widths_that_fit(monkeypatch, said, device, impl):
    on(monkeypatch, device)
    assert implementation.choose("search", 8, WIDTHS) == impl
    assert implementation.choose("search", 100, WIDTHS) == "xla"
    assert "vectors are 100 wide, and it takes up to 64; use 'xla'" in said[1]


@pytest.mark.parametrize("device", [Volta, Instinct])
def test_another_gpu_takes_xla(monkeypatch, said, device):
    on(monkeypatch, device)
    assert implementation.choose("search", 8, WIDTHS) == "xla" and "8.0 or newer" in said[0]


def test_a_jax_without_the_dialect_takes_xla(monkeypatch, said):
    on(monkeypatch, Hopper)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert implementation.choose("search", 8, WIDTHS) == "xla"
    with pytest.raises(NotImplementedError, match=r"has no jax\.experimental\.pallas\.triton"):
        implementation.check("search", "pallas_gpu", 8, WIDTHS, interpret=True)


def test_a_default_device_is_asked_instead_of_the_first(monkeypatch, said):
    cpu = jax.devices("cpu")[0]
    on(monkeypatch, Hopper)
    with jax.default_device(cpu):
        assert implementation.choose("search", 8, WIDTHS) == "xla"
    assert implementation.choose("search", 8, WIDTHS) == "pallas_gpu"


def test_several_tpus_take_the_kernel_where_it_can_be_divided(monkeypatch, said):
    """Their compiler divides XLA's search, but no kernel."""
    on(monkeypatch, Trillium)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert implementation.choose("search", 8, WIDTHS) == "xla"
    assert said == [
        "search: xla on TPU v6 lite (pallas_tpu: several chips and no mesh in force, see"
        " jax.set_mesh)"
    ]
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"), axis_types=types)
    with jax.sharding.use_abstract_mesh(mesh):
        assert implementation.choose("search", 8, WIDTHS) == "pallas_tpu"


@pytest.mark.parametrize("width, library", [(64, "cudnn"), (60, "xla"), (512, "xla")])
def test_attention_of_heads_that_cudnn_does_not_take_is_xlas(monkeypatch, width, library):
    """A head of 512 is that of the CNN's own attention."""
    asked = []
    on(monkeypatch, Hopper)
    monkeypatch.setattr(implementation, "is_here", lambda: True)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **how: asked.append(how) or q
    )
    x = jnp.zeros((1, 4, 1, width), jnp.bfloat16)
    attention.attend(x, x, x)
    assert asked[0]["implementation"] == library
