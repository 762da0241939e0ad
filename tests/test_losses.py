import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import losses
from gigatok_jax.errors import ConfigError

torch = pytest.importorskip("torch")
F = torch.nn.functional


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check(ours, theirs, inputs):
    """Values and gradients of a loss equal those of PyTorch's float64 autograd."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = theirs(*leaves)
    expected.backward()
    numbers = tuple(range(len(inputs)))
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=numbers))(*inputs)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    for grad, leaf in zip(grads, leaves, strict=True):
        expected_grad = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_reconstruction_is_torchs():
    check(losses.reconstruction, F.mse_loss, arrays(0, (2, 8, 8, 3), (2, 8, 8, 3)))


def bce(logits, target):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


GENERATOR = {
    "hinge": lambda fake: -fake.mean(),
    "vanilla": lambda fake: torch.log(1 - torch.sigmoid(fake)).mean(),
    "non_saturating": lambda fake: -torch.log(torch.sigmoid(fake)).mean(),
}
DISCRIMINATOR = {
    "hinge": lambda real, fake: (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2,
    "vanilla": lambda real, fake: (bce(real, 1.0) + bce(fake, 0.0)) / 2,
    "non_saturating": lambda real, fake: (bce(real, 1.0) + bce(fake, 0.0)) / 2,
}


@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_adversarial_losses_are_the_textbook_ones(kind):
    real, fake = arrays(1, (2, 30, 30, 1), (3, 30, 30, 1))
    check(lambda x: losses.adversarial_generator(x, kind), GENERATOR[kind], [2 * fake])
    check(
        lambda x, y: losses.adversarial_discriminator(x, y, kind),
        DISCRIMINATOR[kind],
        [2 * real, 2 * fake],
    )


@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_adversarial_losses_stay_finite_at_large_logits(kind):
    logits = jnp.array([-500.0, 500.0])

    def both(x):
        discriminator = losses.adversarial_discriminator(x, x, kind)
        return losses.adversarial_generator(x, kind) + discriminator

    value, grad = jax.value_and_grad(both)(logits)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_codebook_loss_moves_rows_and_commitment_moves_inputs():
    rows, inputs = arrays(2, (2, 16, 8), (2, 16, 8))
    check(losses.codebook_loss, lambda r, z: F.mse_loss(r, z.detach()), [rows, inputs])
    check(losses.commitment_loss, lambda r, z: F.mse_loss(r.detach(), z), [rows, inputs])


def test_feature_loss_leaves_the_cnn_feature_alone():
    decoded, encoded = arrays(3, (2, 4, 4, 16), (2, 4, 4, 16))
    check(losses.feature_loss, lambda d, e: F.mse_loss(d, e.detach()), [decoded, encoded])


def test_alignment_is_minus_the_mean_cosine():
    features, teacher = arrays(4, (2, 16, 24), (2, 16, 24))

    def reference(x, y):
        return -(F.normalize(x, dim=-1) * F.normalize(y.detach(), dim=-1)).sum(-1).mean()

    check(losses.alignment_loss, reference, [features, teacher])
    np.testing.assert_allclose(losses.alignment_loss(features, 3 * features), -1.0, rtol=1e-6)


def test_alignment_of_zero_features_has_a_finite_gradient():
    features, teacher = arrays(5, (1, 4, 8), (1, 4, 8))
    features[0, 1] = 0
    value, grad = jax.value_and_grad(losses.alignment_loss)(features, teacher)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_alignment_refuses_features_of_another_shape():
    with pytest.raises(ValueError, match="must agree"):
        losses.alignment_loss(jnp.zeros((2, 4, 8)), jnp.zeros((2, 4, 6)))


def test_bfloat16_inputs_are_reduced_in_float32():
    images, reconstructed = arrays(8, (2, 32, 32, 3), (2, 32, 32, 3))
    low = [jnp.asarray(x, jnp.bfloat16) for x in (images, reconstructed)]
    expected = np.square(np.float64(low[0]) - np.float64(low[1])).mean()
    np.testing.assert_allclose(losses.reconstruction(*low), expected, rtol=1e-6)


def test_unknown_kinds_are_named():
    with pytest.raises(ConfigError, match=r"kind is 'wasserstein', expected one of .*saturating"):
        losses.adversarial_generator(jnp.zeros(3), "wasserstein")
