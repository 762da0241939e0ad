"""The quantizer: nearest rows, the rotation trick and the original's losses and gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from gigatok_jax.models.quantizer import VectorQuantizer
from gigatok_jax.ops import codebook_search, quantize
from gigatok_jax.train import objective, tokenizer_step

CASES = [
    f"N{rows}_l2{l2}_rot{rot}" for rows in (512, 16384) for l2, rot in ((1, 1), (1, 0), (0, 0))
]
ALL_ON = objective.Phase(shortcut=False, adversarial=False, entropy=True)
WEIGHTS = types.SimpleNamespace(
    codebook=1.0, commitment=0.25, entropy=0.005, entropy_temperature=0.01
)


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tokens(x) -> np.ndarray:
    """The original's [b e 1 n] as [b n e]."""
    return np.ascontiguousarray(x[:, :, 0].swapaxes(1, 2))


@functools.cache
def golden_run(case: str):
    """Golden arrays, its figures, our quantized values, terms, and gradients of both losses."""
    golden, meta = rule.load(rule.golden_path("quantizer_train.npz"))
    rows, l2, rot = map(int, _numbers(case))
    module = VectorQuantizer(rows, 8, bool(l2), bool(rot))
    networks = types.SimpleNamespace(tokenizer=types.SimpleNamespace(quantizer=module))
    codebook = rule.rule_tensor("quantize.embedding.weight", (rows, 8))

    def run(z, codebook, entropy_alone):
        params = {"quantizer": {"codebook": codebook}}
        quantized = module.apply({"params": params["quantizer"]}, z)
        terms = objective._codebook_terms(params, networks, quantized, WEIGHTS, ALL_ON, 1)
        whole = jnp.sum(quantized.latents * tokens(golden["R"])) + sum(terms.values())
        return jnp.where(entropy_alone, terms["entropy"], whole), (quantized, terms)

    graded = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    z = tokens(golden["z"])
    (scalar, (quantized, terms)), grads = graded(z, codebook, False)
    arrays = {name.removeprefix(f"{case}_"): x for name, x in golden.items() if case in name}
    figures = meta["cases"][case] | {"our_scalar": scalar}
    return arrays, figures, quantized, terms, grads, graded(z, codebook, True)[1]


def _numbers(case: str) -> list[str]:
    rows, l2, rot = case.split("_")
    return [rows[1:], l2[2:], rot[3:]]


def same_codes(arrays, quantized) -> np.ndarray:
    """bool[b n] where our code is the original's; asserted wherever no near tie excuses it."""
    same = np.asarray(quantized.codes).reshape(-1) == arrays["idx"]
    assert np.all(same | (arrays["gap"] < 1e-4))
    assert same.mean() > 0.98
    return same.reshape(quantized.codes.shape)


def check_close(ours, expected, tolerance):
    """Largest difference relative to the largest value."""
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_codes_values_and_losses_are_the_originals(case):
    arrays, figures, quantized, terms, _, _ = golden_run(case)
    same = same_codes(arrays, quantized)
    np.testing.assert_allclose(
        np.asarray(quantized.latents)[same], tokens(arrays["zq"])[same], rtol=0, atol=2e-6
    )
    for ours, theirs in (("codebook", "vq"), ("commitment", "commit"), ("entropy", "entropy")):
        np.testing.assert_allclose(terms[ours], figures[f"{theirs}_loss"], rtol=1e-4)
    np.testing.assert_allclose(figures["our_scalar"], figures["scalar"], rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_originals(case):
    arrays, figures, quantized, _, (dz, de), (entropy_dz, entropy_de) = golden_run(case)
    same = same_codes(arrays, quantized)
    check_close(np.asarray(dz)[same], tokens(arrays["grad_z"])[same], 1e-3)
    check_close(np.asarray(entropy_dz), tokens(arrays["grad_z_entropy"]), 1e-3)
    np.testing.assert_allclose(np.linalg.norm(dz), figures["grad_z_norm"], rtol=1e-3)
    check_close(np.asarray(de)[:512], arrays["grad_emb_first512"], 1e-3)
    check_close(np.asarray(de)[arrays["idx"]], arrays["grad_emb_at_idx"], 1e-3)
    np.testing.assert_allclose(np.linalg.norm(de), figures["grad_emb_norm"], rtol=1e-3)
    norm = np.linalg.norm(entropy_de)
    np.testing.assert_allclose(norm, figures["grad_emb_norm_entropy"], rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_usage_counts_a_history_that_starts_with_code_zero(case):
    _, figures, quantized, _, _, _ = golden_run(case)
    history = jnp.concatenate([jnp.zeros(65536 - 128), quantized.codes.reshape(-1)])
    scalars = tokenizer_step.codebook_scalars(history, int(_numbers(case)[0]))
    np.testing.assert_allclose(scalars["codebook_usage"], figures["usage"], rtol=1e-5)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plane_rotation(u, q) -> np.ndarray:
    """float64[e e] that turns the unit vector u into q and leaves what is at right angles."""
    across = unit(q - (u @ q) * u)
    cos, sin = u @ q, across @ q
    turn = sin * (np.outer(across, u) - np.outer(u, across))
    return np.eye(len(u)) + turn + (cos - 1) * (np.outer(u, u) + np.outer(across, across))


@pytest.mark.parametrize("width", [2, 8])
def test_rotation_turns_the_gradient_back_with_the_row(width):
    rng = np.random.default_rng(width)
    z, rows, g = rng.normal(size=(3, 50, width))
    rows *= np.where(np.sum(z * rows, -1, keepdims=True) < 0, -1, 1)  # the nearest row is no foe
    out, pull = jax.vjp(quantize.rotate, z.astype("f4"), rows.astype("f4"))
    dz, drows = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(out, rows, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(drows, 0)
    for i in range(len(z)):
        u, length = unit(z[i]), np.linalg.norm(z[i])
        turned = plane_rotation(u, unit(rows[i])).T @ g[i] * np.linalg.norm(rows[i])
        expected = (turned - (turned @ u) * u) / length  # the direction of z, normalised within
        np.testing.assert_allclose(dz[i], expected, rtol=0, atol=1e-4 * np.abs(turned).max() + 1e-4)


def test_rotation_of_unit_vectors_keeps_norms():
    rng = np.random.default_rng(0)
    z, rows = unit(rng.normal(size=(2, 200, 8))).astype(np.float32)
    out = quantize.rotate(z, rows)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, rtol=0, atol=1e-5)


def test_straight_through_is_the_row_and_passes_the_gradient_unchanged():
    rng = np.random.default_rng(3)
    z, rows, g = rng.normal(size=(3, 4, 5, 8)).astype(np.float32)
    out, pull = jax.vjp(quantize.straight_through, z, rows)
    np.testing.assert_allclose(out, rows, rtol=0, atol=1e-6)
    dz, drows = pull(g)
    np.testing.assert_array_equal(dz, g)
    np.testing.assert_array_equal(drows, 0)


@pytest.mark.parametrize("join", [quantize.rotate, quantize.straight_through])
@pytest.mark.parametrize("scale", [0.0, -1.0])  # nowhere; exactly opposite to the row
def test_degenerate_latents_stay_finite(join, scale):
    rows = unit(np.random.default_rng(4).normal(size=(6, 8))).astype(np.float32)
    z = quantize.unit(scale * rows)
    value, pull = jax.vjp(join, z, rows)
    assert np.isfinite(value).all() and np.isfinite(pull(jnp.ones_like(value))[0]).all()


def test_zero_latents_have_a_finite_gradient_through_the_quantizer():
    module = VectorQuantizer(16, 8)
    params = {"codebook": np.random.default_rng(5).normal(size=(16, 8)).astype(np.float32)}

    def loss(z, params):
        out = module.apply({"params": params}, z)
        return jnp.sum(out.latents) + jnp.sum(jnp.square(out.rows - out.inputs))

    grads = jax.grad(loss, argnums=(0, 1))(jnp.zeros((1, 3, 8)), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("width", [1, 8, 12])
@pytest.mark.parametrize("chunk", [1 << 26, 300])  # all tokens at once; three at a time
def test_search_finds_the_nearest_row_and_the_first_of_equals(width, chunk, monkeypatch):
    monkeypatch.setattr(codebook_search, "_CHUNK", chunk)
    rng = np.random.default_rng(width)
    half = rng.normal(size=(50, width)).astype(np.float32)
    table = np.concatenate([half, half])[rng.permutation(100)]  # every row twice
    z = rng.normal(size=(2, 25, width)).astype(np.float32)
    codes = np.asarray(codebook_search.nearest(z, table))
    assert (codes.shape, codes.dtype) == ((2, 25), np.int32)
    distance = np.square(z[:, :, None].astype(np.float64) - table).sum(-1)  # [b n k]
    chosen = np.take_along_axis(distance, codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(-1), rtol=0, atol=1e-5)
    first = np.array([np.flatnonzero((table == table[c]).all(-1))[0] for c in codes.reshape(-1)])
    np.testing.assert_array_equal(codes.reshape(-1), first)


def test_search_in_half_precision_is_the_search_of_its_rounded_values():
    rng = np.random.default_rng(9)
    table = rng.normal(size=(64, 8)).astype(np.float32)
    z = jnp.asarray(rng.normal(size=(40, 8)), jnp.bfloat16)
    codes = codebook_search.nearest(z, table)
    np.testing.assert_array_equal(codes, codebook_search.nearest(z.astype(jnp.float32), table))


def test_search_refuses_other_widths():
    with pytest.raises(ValueError, match="4 wide, codebook rows 8"):
        codebook_search.nearest(np.zeros((1, 4), "f4"), np.zeros((3, 8), "f4"))
    with pytest.raises(ValueError, match="4 wide, expected 8"):
        VectorQuantizer(16, 8).init(jax.random.key(0), jnp.zeros((1, 2, 4)))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_first_codebook_and_lookup(l2_norm):
    module = VectorQuantizer(64, 8, l2_norm)
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, 8)))["params"]
    if l2_norm:
        np.testing.assert_allclose(np.linalg.norm(params["codebook"], axis=-1), 1, atol=1e-6)
    else:
        assert np.abs(params["codebook"]).max() <= 1 / 64
    scaled = {"codebook": 3 * params["codebook"]}
    rows = module.apply({"params": scaled}, np.arange(64)[None], method="lookup")[0]
    # The parameter keeps its length; l2_norm normalises it on every use.
    np.testing.assert_allclose(rows, (1 if l2_norm else 3) * params["codebook"], atol=1e-6)
