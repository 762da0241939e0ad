r"""Speed of the entropy loss and its gradients beside XLA and PyTorch.

    python -m gigatok_jax.benchmarks.entropy --out /tmp/entropy

Gradients are checked first, against float64 at 256 tokens that share rows. `of the limit` is the
part of the device's rate of exponentials at which the four that a pair takes were done.
"""

import importlib

import jax
import numpy as np

from gigatok_jax.benchmarks import kernels
from gigatok_jax.benchmarks.codebook_search import implementations
from gigatok_jax.ops.entropy import EPSILON, entropy_loss

TEMPERATURE = 0.01
_CHECKED = 256
_LARGEST = 2**32  # tokens x rows; beyond, XLA and PyTorch take minutes


def main() -> None:
    """Prints a table; writes it and a picture with `--out`."""
    given = kernels.arguments(__doc__.splitlines()[0])
    results = []
    for case in kernels.cases(given):
        for impl in implementations(case):
            if impl == "xla" and case.tokens * case.rows > _LARGEST:
                continue
            results.append(measure(case, impl, given.repeats))
            print(*results[-1], flush=True)
        if given.torch and kernels.torch_is_here() and case.tokens * case.rows <= 2**30:
            for name, loss in torch_losses().items():
                ms, peak = kernels.time_torch(loss, case, given.repeats)
                results.append(result(case, name, ms, peak, ""))
                print(*results[-1], flush=True)
    kernels.finish("entropy", given, results)


def gradients(impl: str):
    """Value and gradients as a function of [m e] tokens and the codebook."""

    def loss(z, codebook):
        return entropy_loss(z.reshape(-1, 64, z.shape[-1]), codebook, TEMPERATURE, impl=impl)

    return jax.value_and_grad(loss, argnums=(0, 1))


def measure(case: kernels.Case, impl: str, repeats: int) -> kernels.Result:
    """One implementation at one size, checked before it is timed."""
    error = largest_error(case, impl)
    assert error < 2e-4, f"gradients of {impl} are off by {error} at {case}"
    ms, peak = kernels.time_jax(gradients(impl), case, repeats)
    return result(case, impl, ms, peak, f"{error:.1e}")


def result(case, name, ms, peak, error) -> kernels.Result:
    part = kernels.share("exponentials", 4 * case.tokens * case.rows, ms)
    return kernels.Result(case.tokens, case.rows, name, ms, part, peak, error)


def largest_error(case: kernels.Case, impl: str) -> float:
    """Relative error of both gradients against float64, by norm."""
    codebook = kernels.unit_vectors(1, min(case.rows, 2**14), case.width)
    near = kernels.unit_vectors(2, 16, case.width)[np.arange(_CHECKED) % 16]
    z = near + 0.05 * kernels.unit_vectors(3, _CHECKED, case.width)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    _, ours = jax.jit(gradients(impl))(z, codebook)
    exact = float64_gradients(z.astype(np.float64), codebook.astype(np.float64))
    return max(
        float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(ours, exact, strict=True)
    )


def float64_gradients(z: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By the chain rule through the whole matrix of distances."""
    distance = np.square(z[:, None] - codebook).sum(-1)
    logits = -distance / TEMPERATURE
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(0)
    # d loss / d p, then through the softmax, then through the distances.
    from_p = (np.log(mean + EPSILON) + mean / (mean + EPSILON) - log_p - 1) / len(z)
    from_logits = p * (from_p - (p * from_p).sum(1, keepdims=True))
    from_distance = -from_logits / TEMPERATURE
    dz = 2 * (from_distance.sum(1, keepdims=True) * z - from_distance @ codebook)
    de = 2 * (from_distance.sum(0)[:, None] * codebook - from_distance.T @ z)
    return dz, de


def torch_losses() -> dict:
    """The formula in PyTorch, forward and backward, in float32."""
    torch = importlib.import_module("torch")

    def loss(z, codebook):
        squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        log_p = torch.log_softmax((2 * z @ codebook.T - squares) / TEMPERATURE, dim=1)
        p = log_p.exp()
        mean = p.mean(0)
        return -(p * log_p).sum(1).mean() + (mean * torch.log(mean + EPSILON)).sum()

    def graded(loss):
        def run(z, codebook):
            leaves = [x.detach().requires_grad_() for x in (z, codebook)]
            return torch.autograd.grad(loss(*leaves), leaves)

        return run

    return {"torch": graded(loss), "torch.compile": graded(torch.compile(loss, dynamic=False))}


if __name__ == "__main__":
    main()
