import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.ops import implementation
from gigatok_jax.ops.entropy import entropy_loss

torch = pytest.importorskip("torch")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(seed, b, n, k, e=8, distinct=None):
    """Unit latents and a codebook of unit rows, of which only `distinct` differ clearly."""
    rng = np.random.default_rng(seed)
    codebook = unit(rng.normal(size=(distinct or k, e)))[np.arange(k) % (distinct or k)]
    codebook = codebook + 1e-3 * rng.normal(size=codebook.shape) * bool(distinct)
    return unit(rng.normal(size=(b, n, e))).astype(np.float32), codebook.astype(np.float32)


def reference(z, codebook, temperature, groups=1):
    """The plain formula in float64 with PyTorch's autograd: value, dz, de."""
    z, codebook = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (z, codebook))
    tokens = z.reshape(groups, -1, z.shape[-1])
    distance = (tokens[:, :, None] - codebook).square().sum(-1)  # [g m k]
    log_p = torch.log_softmax(-distance / temperature, dim=-1)
    token_entropy = -(log_p.exp() * log_p).sum(-1).mean()
    mean = log_p.exp().mean(1)
    entropy_of_mean = -(mean * torch.log(mean + 1e-5)).sum(-1).mean()
    (token_entropy - entropy_of_mean).backward()
    return (token_entropy - entropy_of_mean).item(), z.grad.numpy(), codebook.grad.numpy()


def relative(ours, expected):
    # One token's two entropies cancel to the epsilon in the logarithm: the floor is for it.
    return np.linalg.norm(np.float64(ours) - expected) / max(np.linalg.norm(expected), 1e-3)


@pytest.mark.parametrize(
    "b, n, k, groups, block_elements",
    [
        (1, 1, 16, 1, 2**22),  # one token
        (2, 64, 512, 1, 2**22),  # one block
        (3, 50, 300, 1, 3 * 300 * 8),  # a bound that does not divide the positions
        (2, 7, 1000, 1, 1),  # the bound is below one position of each image
        (4, 32, 512, 2, 4 * 512 * 8),  # statistics of two groups
        (4, 16, 512, 4, 2**22),
    ],
)
def test_value_and_gradients_are_those_of_the_formula(b, n, k, groups, block_elements):
    z, codebook = make(n, b, n, k)

    @jax.jit
    def ours(z, codebook):
        return entropy_loss(z, codebook, 0.01, groups, block_elements=block_elements)

    value, (dz, de) = jax.value_and_grad(ours, argnums=(0, 1))(z, codebook)
    expected, expected_dz, expected_de = reference(z, codebook, 0.01, groups)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert relative(dz, expected_dz) < 1e-4
    assert relative(de, expected_de) < 1e-4


@functools.cache  # one program for all codebooks
def graded(impl, groups=1):
    def loss(z, codebook):
        return entropy_loss(z, codebook, 0.01, groups, impl=impl, interpret=impl != "xla")

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("impl", implementation.NAMES)
@pytest.mark.parametrize("distinct", [None, 1, 5])
def test_collapsed_codebooks_of_full_size_keep_their_gradients(impl, distinct):
    z, codebook = make(distinct or 7, 2, 24, 16384, distinct=distinct)
    # Tokens that share rows: of lonely ones the two entropies cancel, and rounding remains.
    z = unit(z[:, np.arange(24) % 6] + 0.05 * z[:, ::-1])
    value, (dz, de) = graded(impl)(z, codebook)
    expected, expected_dz, expected_de = reference(z, codebook, 0.01)
    assert value == pytest.approx(expected, rel=1e-5, abs=2e-5)
    assert relative(dz, expected_dz) < 1e-4
    assert relative(de, expected_de) < 1e-4


@pytest.mark.parametrize("impl", ["pallas_gpu", "pallas_tpu"])
def test_kernels_take_groups_and_sizes_that_fill_no_block(impl):
    z, codebook = make(6, 4, 33, 300)
    value, (dz, de) = graded(impl, groups=2)(z, codebook)
    expected, expected_dz, expected_de = reference(z, codebook, 0.01, groups=2)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert relative(dz, expected_dz) < 1e-4
    assert relative(de, expected_de) < 1e-4


@pytest.mark.parametrize("impl", ["pallas_gpu", "pallas_tpu"])
def test_kernels_take_rows_of_any_length_and_other_temperatures(impl):
    rng = np.random.default_rng(9)
    z = 3 * rng.normal(size=(1, 40, 6)).astype(np.float32)
    codebook = rng.normal(size=(50, 6)).astype(np.float32)
    run = jax.jit(lambda z, e: entropy_loss(z, e, 1.5, impl=impl, interpret=True))
    value, (dz, de) = jax.value_and_grad(run, argnums=(0, 1))(z, codebook)
    expected, expected_dz, expected_de = reference(z, codebook, 1.5)
    assert value == pytest.approx(expected, rel=1e-5)
    assert relative(dz, expected_dz) < 1e-4 and relative(de, expected_de) < 1e-4


def test_rows_of_any_length_and_other_temperatures():
    rng = np.random.default_rng(9)
    z = rng.normal(size=(2, 24, 6)).astype(np.float32)
    codebook = rng.normal(size=(40, 6)).astype(np.float32)
    value, (dz, de) = jax.value_and_grad(entropy_loss, argnums=(0, 1))(z, codebook, 1.5)
    expected, expected_dz, expected_de = reference(z, codebook, 1.5)
    assert value == pytest.approx(expected, rel=1e-5)
    assert relative(dz, expected_dz) < 1e-4 and relative(de, expected_de) < 1e-4


def test_groups_average_the_losses_of_their_parts():
    z, codebook = make(3, 6, 16, 128)
    parts = [entropy_loss(part, codebook, 0.01) for part in np.split(z, 3)]
    np.testing.assert_allclose(entropy_loss(z, codebook, 0.01, 3), np.mean(parts), rtol=1e-5)


def test_bfloat16_latents_are_computed_in_float32():
    z, codebook = make(4, 2, 32, 256)
    low = jnp.asarray(z, jnp.bfloat16)
    value, dz = jax.value_and_grad(entropy_loss)(low, codebook, 0.01)
    expected, expected_dz, _ = reference(np.float32(low), codebook, 0.01)
    assert dz.dtype == jnp.bfloat16 and value.dtype == jnp.float32
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert relative(dz, expected_dz) < 5e-3  # the gradient itself is rounded to bfloat16


def test_no_buffer_of_all_tokens_by_all_rows():
    b, n, k = 8, 2048, 4096
    gradient = jax.grad(lambda z, e: entropy_loss(z, e, 0.01), argnums=(0, 1))
    compiled = jax.jit(gradient).lower(jnp.zeros((b, n, 8)), jnp.zeros((k, 8))).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 5 * 4 * 2**22 < 4 * b * n * k / 3


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="8 wide and codebook rows 6"):
        entropy_loss(jnp.zeros((2, 4, 8)), jnp.zeros((16, 6)), 0.01)
    with pytest.raises(ValueError, match="3 groups do not divide a batch of 4"):
        entropy_loss(jnp.zeros((4, 4, 8)), jnp.zeros((16, 8)), 0.01, groups=3)
    with pytest.raises(NotImplementedError, match="'pallas_gpu' cannot run here: it needs a gpu"):
        entropy_loss(jnp.zeros((2, 4, 8)), jnp.zeros((16, 8)), 0.01, impl="pallas_gpu")


@pytest.mark.device
@pytest.mark.parametrize("distinct", [None, 1, 5])
def test_a_gpu_keeps_the_gradients_of_collapsed_codebooks(distinct):
    z, codebook = make(8, 4, 256, 16384, distinct=distinct)
    run = jax.jit(lambda z, e: entropy_loss(z, e, 0.01, impl="pallas_gpu"))
    value, (dz, de) = jax.value_and_grad(run, argnums=(0, 1))(z, codebook)
    expected, expected_dz, expected_de = reference(z, codebook, 0.01)
    assert value == pytest.approx(expected, rel=1e-5, abs=2e-5)
    assert relative(dz, expected_dz) < 1e-4
    assert relative(de, expected_de) < 1e-4
