"""Nearest rows: exactness of every implementation, on inputs made to confuse them."""

import functools
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest

from gigatok_jax.models.quantizer import VectorQuantizer
from gigatok_jax.ops import codebook_search_gpu
from gigatok_jax.ops.codebook_search import nearest
from gigatok_jax.ops.implementation import NAMES

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = [impl for impl in NAMES if impl != "xla"]
TOKENS, ROWS = 130, 1024  # not a whole number of blocks


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(kind: str, tokens=TOKENS, rows=ROWS, width=8):
    """Tokens and codebook; all but the first kind have rows that are hard to tell apart."""
    rng = np.random.default_rng(rows + width)
    z, table = unit(rng.normal(size=(tokens, width))), unit(rng.normal(size=(rows, width)))
    if kind == "twice":
        table = np.concatenate([table[: rows // 2]] * 2)[rng.permutation(rows)]
    elif kind == "five rows":
        table = table[rng.integers(0, 5, rows)]
    elif kind == "one row":
        table[:] = table[0]
    elif kind.startswith("within"):
        table = table[0] + float(kind.split()[1]) * rng.normal(size=table.shape)
    elif kind == "zero":
        table[:], z[::2] = 0, 0
    elif kind == "zero tokens":
        z[::3] = 0
    elif kind == "any norm":
        z *= 10 ** rng.uniform(-3, 3, size=(tokens, 1))
        table *= 10 ** rng.uniform(-3, 3, size=(rows, 1))
    elif kind == "huge":
        z, table = 1e25 * z, 3e25 * table
    return z.astype(np.float32), table.astype(np.float32)


KINDS = ["random", "twice", "five rows", "one row", "within 1e-3", "within 1e-7", "zero"]
KINDS += ["zero tokens", "any norm", "huge"]


def check(codes, z, table):
    """The rule that `nearest` states."""
    assert codes.dtype == np.int32 and codes.min() >= 0 and codes.max() < len(table)
    z, rows = np.float64(z), np.float64(table)
    distance = np.square(z[:, None] - rows).sum(-1)
    chosen = np.take_along_axis(distance, codes[:, None], axis=1)[:, 0]
    allowed = 1e-6 * (np.square(z).sum(-1) + np.square(rows[codes]).sum(-1))
    assert np.all(chosen - distance.min(1) <= allowed)
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(table)))}
    np.testing.assert_array_equal(codes, [first[table[code].tobytes()] for code in codes])


@functools.cache  # one program for all kinds
def compiled(impl):
    return jax.jit(functools.partial(nearest, impl=impl, interpret=impl in KERNELS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", NAMES)
def test_the_row_is_the_nearest_and_the_first_of_equals(impl, kind):
    z, table = make(kind)
    check(np.asarray(compiled(impl)(z, table)), z, table)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("tokens, rows, width", [(1, 16, 4), (70, 300, 12), (9, 40, 64)])
def test_any_number_of_tokens_and_rows_of_any_width(impl, tokens, rows, width):
    z, table = make("random", tokens, rows, width)
    check(np.asarray(nearest(z, table, impl=impl, interpret=True)), z, table)


@functools.cache
def shared_codebook():
    tiling = codebook_search_gpu.Tiling(tokens=64, rows=64, unroll=2, splits=3)
    return jax.jit(functools.partial(codebook_search_gpu.search, tiling=tiling, interpret=True))


@pytest.mark.parametrize("kind", ["random", "twice", "five rows", "within 1e-7", "any norm"])
def test_programs_that_share_a_codebook_agree_on_the_first_of_equals(kind):
    z, table = make(kind)
    check(np.asarray(shared_codebook()(z, table)), z, table)


@pytest.mark.parametrize("impl", NAMES)
def test_tokens_and_rows_that_are_not_finite_get_in_nobodys_way(impl):
    z, table = make("random")
    table[[3, 700]], z[5], z[9, 1] = np.nan, np.nan, -np.inf
    table[8, 2] = np.inf
    codes = np.asarray(compiled(impl)(z, table))
    assert codes.min() >= 0 and codes.max() < ROWS
    sound, rows = np.isfinite(z).all(-1), np.flatnonzero(np.isfinite(table).all(-1))
    distance = np.square(z[sound, None].astype(np.float64) - table[rows]).sum(-1)
    np.testing.assert_array_equal(codes[sound], rows[distance.argmin(1)])


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_searched_as_the_values_it_holds(impl, dtype):
    z, table = (jnp.asarray(x, dtype) for x in make("random"))
    codes = compiled(impl)(z.astype(jnp.float32), table.astype(jnp.float32))
    low = jax.eval_shape(compiled(impl), z, table)
    assert (low.shape, low.dtype) == ((TOKENS,), jnp.int32)
    check(np.asarray(codes), np.float32(z), np.float32(table))


@pytest.mark.parametrize("impl", NAMES)
def test_no_tokens_have_no_codes(impl):
    codes = nearest(jnp.zeros((0, 3, 8)), jnp.zeros((16, 8)), impl=impl, interpret=True)
    assert (codes.shape, codes.dtype) == ((0, 3), jnp.int32)


def test_there_is_no_gradient():
    z, table = make("random", 4, 16)
    weights = jnp.arange(16.0)
    grads = jax.grad(lambda *x: weights[nearest(*x)].sum(), argnums=(0, 1))(z, table)
    assert not any(map(np.any, grads))


@pytest.mark.parametrize("impl, platform", [("pallas_gpu", "cuda"), ("pallas_tpu", "tpu")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_lower_for_their_platform_without_it(impl, platform):
    module = importlib.import_module(f"gigatok_jax.ops.codebook_search_{impl.split('_')[1]}")
    z, table = jnp.zeros((1000, 8)), jnp.zeros((4096, 8))
    assert "codebook_search" in lowering.lowered(module.search, platform, z, table)


def test_a_named_search_runs_or_says_why_not():
    z, table = make("random", 4, 16)
    for impl in KERNELS:
        with pytest.raises(
            NotImplementedError, match=r"it needs a [gt]pu, and the device is a cpu"
        ):
            nearest(z, table, impl=impl)
    with pytest.raises(ValueError, match="impl is 'cuda', expected one of xla, pallas_gpu"):
        nearest(z, table, impl="cuda")
    with pytest.raises(NotImplementedError, match="65 wide, and it takes up to 64"):
        nearest(np.zeros((1, 65)), np.zeros((16, 65)), impl="pallas_tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="device is a cpu"):
        VectorQuantizer(16, 8, search="pallas_gpu").init(jax.random.key(0), z[None])


# Runs in a process of its own: the number of devices is fixed when jax starts.
ON_EIGHT_DEVICES = """
import re
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from gigatok_jax.ops.codebook_search import nearest

mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
z = rng.normal(size=(16, 10, 8)).astype(np.float32)
table = rng.normal(size=(512, 8)).astype(np.float32)
expected = np.square(z[:, :, None].astype(np.float64) - table).sum(-1).argmin(-1)
for impl, specs in (
    ("xla", [(P(("data", "fsdp")), P()), (P("data", "fsdp"), P(("data", "fsdp")))]),
    ("pallas_gpu", [(P(("data", "fsdp")), P("fsdp"))]),
):
    search = jax.jit(lambda z, table: nearest(z, table, impl=impl, interpret=impl != "xla"))
    for tokens, rows in specs:
        placed = (
            jax.device_put(z, NamedSharding(mesh, tokens)),
            jax.device_put(table, NamedSharding(mesh, rows)),
        )
        compiled = search.lower(*placed).compile()
        codes = compiled(*placed)
        np.testing.assert_array_equal(codes, expected)
        assert codes.sharding.is_equivalent_to(NamedSharding(mesh, tokens), 2)
        collective = r"= (\\S+?)[{ ].*? (?:all-gather|all-to-all|all-reduce)\\("
        moved = re.findall(collective, compiled.as_text())
        assert set(moved) <= {"f32[512,8]"}, moved  # the codebook at most, never tokens
print("same")
"""


def test_devices_search_for_their_own_tokens():
    more = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    run = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert run.stdout.strip() == "same", run.stderr


@pytest.mark.device
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_chooses_no_wrong_row_of_a_million(kind):
    torch = pytest.importorskip("torch")
    z, table = make(kind, 2**20 if kind == "random" else 2**16, 16384)
    codes = np.asarray(nearest(z, table, impl="pallas_gpu"))
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(table)))}
    np.testing.assert_array_equal(codes, [first[row.tobytes()] for row in table[codes]])
    rows = torch.tensor(table, device="cuda").double()
    for part in np.array_split(np.arange(len(z)), 128):
        tokens = torch.tensor(z[part], device="cuda").double()
        chosen = rows[torch.tensor(codes[part], device="cuda").long()]
        distance = tokens.square().sum(1, keepdim=True) + rows.square().sum(1)
        excess = (tokens - chosen).square().sum(1) - (distance - 2 * tokens @ rows.T).amin(1)
        assert (excess <= 1e-6 * (tokens.square() + chosen.square()).sum(1)).all()
