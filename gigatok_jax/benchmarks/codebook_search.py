r"""Speed of the codebook search beside XLA and PyTorch; no time is taken of a wrong search.

    python -m gigatok_jax.benchmarks.codebook_search --out /tmp/search

Codes of random unit tokens are checked against float64 first, all or 4096 of them, by the rule that
`nearest` states. `of the limit` is the part of the device's rate of bfloat16 products at which
the kernel's own products (three float16 ones for a float32 one, padded) were done.
"""

import importlib

import jax
import numpy as np

from gigatok_jax.benchmarks import kernels
from gigatok_jax.ops import implementation
from gigatok_jax.ops.codebook_search import nearest

_CHECKED = 4096


def main() -> None:
    """Prints a table; writes it and a picture with `--out`."""
    given = kernels.arguments(__doc__.splitlines()[0])
    results = []
    for case in kernels.cases(given):
        for impl in implementations(case):
            results.append(measure(case, impl, given.repeats))
            print(*results[-1], flush=True)
        if given.torch and kernels.torch_is_here() and kernels.fits_peer(case):
            for name, search in torch_searches().items():
                ms, peak = kernels.time_torch(search, case, given.repeats)
                results.append(result(case, name, ms, peak, ""))
                print(*results[-1], flush=True)
    kernels.finish("codebook_search", given, results)


def implementations(case: kernels.Case) -> list[str]:
    """XLA and what the device has besides."""
    widths = range(1, 65)
    return [name for name in implementation.NAMES
            if implementation.obstacle(name, case.width, widths) is None]  # fmt: skip


def measure(case: kernels.Case, impl: str, repeats: int) -> kernels.Result:
    """One implementation at one size, checked before it is timed."""

    def search(z, codebook):
        return nearest(z, codebook, impl=impl)

    z, codebook = kernels.inputs(case, 1)[0]
    wrong = count_wrong(z, codebook, np.asarray(jax.jit(search)(z, codebook)))
    assert not wrong, f"{wrong} codes of {impl} are wrong at {case}"
    ms, peak = kernels.time_jax(search, case, repeats)
    return result(case, impl, ms, peak, "0 wrong")


def result(case, name, ms, peak, error) -> kernels.Result:
    packed = max(16, 1 << (3 * case.width + 2).bit_length())
    part = kernels.share("products", 2 * packed * case.tokens * case.rows, ms)
    return kernels.Result(case.tokens, case.rows, name, ms, part, peak, error)


def count_wrong(z: np.ndarray, codebook: np.ndarray, codes: np.ndarray) -> int:
    """Codes whose float64 distance exceeds the smallest by over 1e-6 (|z|^2 + |e|^2)."""
    step, wrong = max(1, len(z) // _CHECKED), 0
    rows = codebook.astype(np.float64)
    squares = np.square(rows).sum(1)
    for part in np.array_split(np.arange(0, len(z), step), 16):
        tokens = z[part].astype(np.float64)
        lengths = np.square(tokens).sum(1)
        distance = lengths[:, None] + squares - 2 * tokens @ rows.T
        chosen = np.take_along_axis(distance, codes[part][:, None], axis=1)[:, 0]
        allowed = 1e-6 * (lengths + squares[codes[part]])
        wrong += int(np.sum(chosen - distance.min(1) > allowed))
    return wrong


def torch_searches() -> dict:
    """The formula in PyTorch, in float32."""
    torch = importlib.import_module("torch")

    def search(z, codebook):
        squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return torch.argmin(squares - 2 * z @ codebook.T, dim=1)

    return {"torch": search, "torch.compile": torch.compile(search, dynamic=False)}


if __name__ == "__main__":
    main()
