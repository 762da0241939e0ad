r"""Measures the speed of the codebook search and the entropy loss beside XLA and PyTorch.

    python -m gigatok_jax.benchmarks.kernels --out /tmp/kernels
    python -m gigatok_jax.benchmarks.kernels --kernel search --tokens 4096 65536 --width 8

Each implementation in jax is checked before it is timed: codes of a sample of tokens against
distances in float64 by the rule that `nearest` states, gradients of the entropy loss of 256 tokens
against float64. "of the limit" is the share of a rate of the device that the kernel reaches: of
bfloat16 products for the search (three float16 products for a float32 one, padded), of exponentials
for the entropy loss, with four for each pair of token and row.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from gigatok_jax.benchmarks import markdown
from gigatok_jax.ops import codebook_search, entropy, implementation
from gigatok_jax.ops.entropy import EPSILON
from gigatok_jax.run import command_line

# Rates of a device per second: FLOPs of bfloat16 products (measured), and exponentials (16 per
# clock cycle and multiprocessor).
LIMITS = {"NVIDIA H200": {"products": 790e12, "exponentials": 16 * 132 * 1.98e9}}
TEMPERATURE = 0.01
_SEARCHED = 4096  # tokens whose codes are checked
_GRADED = 256  # tokens of the checked gradients


class Case(NamedTuple):
    """Record of the size of inputs: tokens f32[tokens width] and codebook f32[rows width]."""

    tokens: int
    rows: int
    width: int

    @property
    def pairs(self) -> int:
        """Number of pairs of a token and a codebook row."""
        return self.tokens * self.rows


class Result(NamedTuple):
    """Record of the measurement of one implementation at one size."""

    tokens: int
    rows: int
    implementation: str
    ms: float
    share: float  # of the device's limit; 0 if the limit is not known
    peak_mib: float  # device memory besides inputs and results
    error: str  # outcome of the check; "" for PyTorch, which is not checked


class Kernel(NamedTuple):
    """Record of an operation on tokens and codebook rows, with all that its benchmark needs."""

    widths: range  # widths that the Pallas kernels support
    function: Callable[[str], Callable]  # implementation -> function of f32[m e] and f32[k e]
    check: Callable[[Case, str], str]  # raises AssertionError on a wrong result
    torch: Callable[[], dict[str, Callable]]  # the formula in PyTorch, by name
    limit: str  # key of LIMITS
    work: Callable[[Case], float]  # units of `limit` in one call
    most_xla: float  # tokens x rows beyond which XLA is not timed
    most_torch: float  # the same for PyTorch


def main() -> None:
    """Measures the chosen kernels and prints a table for each.

    With `--out`, writes each table, and its figures as JSON.
    """
    options = arguments()
    for name in KERNELS if options.kernel == "all" else [options.kernel]:
        results = []
        for case in cases(options):
            for result in measure(KERNELS[name], case, options):
                results.append(result)
                print(name, *result, flush=True)
        finish(name, options.out, results)


def arguments() -> argparse.Namespace:
    """Parses the command line; default sizes are small without an accelerator.

    Also keeps jax from taking all GPU memory, which PyTorch needs too.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch
    large = jax.default_backend() != "cpu"
    tokens = [2**12, 2**14, 2**16, 2**18, 2**20] if large else [256, 512]
    rows = [2**10, 2**12, 2**14, 2**16, 2**18] if large else [64, 128]
    parser = command_line.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kernel", choices=[*KERNELS, "all"], default="all", help="operation (default: all)")
    add("--tokens", nargs="+", type=int, default=tokens, help="at the rows of --at")
    add("--rows", nargs="+", type=int, default=rows, help="codebook sizes, at the tokens of --at")
    add("--width", type=int, default=8, help="length of a vector (default: 8)")
    at = [2**16, 2**14] if large else [256, 128]
    names = "TOKENS", "ROWS"
    add("--at", nargs=2, type=int, default=at, metavar=names, help="where the other one varies")
    add("--repeats", type=int, default=9 if large else 2, help="timings; their median counts")
    add("--torch", action=argparse.BooleanOptionalAction, default=large, help="time PyTorch too")
    add("--out", default="", help="folder for the tables and figures")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> list[Case]:
    """Lists the sizes to measure: tokens vary at one number of rows, and rows at one of tokens."""
    pairs = [(m, options.at[1]) for m in options.tokens] + [
        (options.at[0], k) for k in options.rows
    ]
    return [Case(m, k, options.width) for m, k in dict.fromkeys(pairs)]


def measure(kernel: Kernel, case: Case, options: argparse.Namespace) -> Iterator[Result]:
    """Measures a kernel at one size; yields the result of every implementation that can run.

    Each implementation in jax is checked before it is timed; PyTorch is not checked.
    """
    for name in implementations(kernel, case.width):
        if name == "xla" and case.pairs > kernel.most_xla:
            continue
        error = kernel.check(case, name)
        yield _result(
            kernel, case, name, *time_jax(kernel.function(name), case, options.repeats), error
        )
    if options.torch and torch_is_here() and case.pairs <= kernel.most_torch:
        for name, function in kernel.torch().items():
            yield _result(kernel, case, name, *time_torch(function, case, options.repeats), "")


def implementations(kernel: Kernel, width: int) -> list[str]:
    """Lists the implementations that can run on this device with vectors of this width.

    XLA always can.
    """
    return [
        name
        for name in implementation.NAMES
        if implementation.obstacle(name, width, kernel.widths) is None
    ]


def _result(kernel: Kernel, case: Case, name: str, ms: float, peak: float, error: str) -> Result:
    rate = LIMITS.get(jax.devices()[0].device_kind, {}).get(kernel.limit)
    share = kernel.work(case) / rate / (ms * 1e-3) if rate else 0.0
    return Result(case.tokens, case.rows, name, ms, share, peak, error)


def finish(name: str, out: str, results: Sequence[Result]) -> None:
    """Prints the table of a kernel; writes it and its figures into folder `out`, except for ""."""
    rows = [
        (r.tokens, r.rows, r.implementation, f"{r.ms:.4g}", f"{r.share:.0%}" if r.share else "",
         f"{r.peak_mib:.1f}", r.error)
        for r in results
    ]  # fmt: skip
    head = ("tokens", "rows", "implementation", "ms", "of the limit", "MiB", "checked")
    title = f"{name}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    text = f"{title}\n\n{markdown.table(head, rows)}\n"
    print(text)
    if out:
        folder = epath.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.json").write_text(json.dumps([r._asdict() for r in results], indent=1))


# Inputs and timing.


def unit_vectors(seed: int, count: int, width: int) -> np.ndarray:
    """Draws random directions: vectors f32[count width] of length 1."""
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inputs(case: Case, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws pairs of tokens and codebook rows; all differ, so that no result can be reused."""
    return [
        (
            unit_vectors(2 * i, case.tokens, case.width),
            unit_vectors(2 * i + 1, case.rows, case.width),
        )
        for i in range(number)
    ]


def time_jax(function: Callable, case: Case, repeats: int) -> tuple[float, float]:
    """Times a function in jax; returns milliseconds of one call, and MiB of temporaries.

    One program calls the function on several inputs, so that the device does not wait for the host,
    as in a training step.
    """
    number = 4 if case.pairs <= 2**32 else 1
    data = jax.device_put(inputs(case, number))
    single = jax.jit(function).lower(*data[0]).compile()
    program = jax.jit(lambda data: [function(*x) for x in data]).lower(data).compile()
    memory = single.memory_analysis()
    jax.block_until_ready(program(data))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(5):
            results = program(data)
        jax.block_until_ready(results)
        seconds.append((time.perf_counter() - start) / (5 * number))
    return 1e3 * statistics.median(seconds), memory.temp_size_in_bytes / 2**20


def time_torch(function: Callable, case: Case, repeats: int) -> tuple[float, float]:
    """Times a function in PyTorch on CUDA; returns milliseconds of one call, and its peak MiB.

    The peak is what the calls allocate besides their inputs.
    """
    torch = importlib.import_module("torch")
    data = [[torch.tensor(x, device="cuda") for x in pair] for pair in inputs(case, 2)]
    for pair in data:
        function(*pair)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start = time.perf_counter()
        for pair in data:
            function(*pair)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / len(data))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    torch.cuda.empty_cache()
    return 1e3 * statistics.median(seconds), peak


def torch_is_here() -> bool:
    """Returns whether PyTorch is installed and can use a GPU, and jax uses a GPU."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return False
    return importlib.import_module("torch").cuda.is_available()


# Codebook search.


def search(impl: str) -> Callable:
    """Returns the codebook search of an implementation, as a function of tokens and codebook."""
    return lambda z, codebook: codebook_search.nearest(z, codebook, impl=impl)


def check_search(case: Case, impl: str) -> str:
    """Compares an implementation's codes with distances in float64; returns "0 wrong".

    Raises:
        AssertionError: a code is wrong.
    """
    z, codebook = inputs(case, 1)[0]
    wrong = count_wrong(z, codebook, np.asarray(jax.jit(search(impl))(z, codebook)))
    assert not wrong, f"{wrong} codes of {impl} are wrong at {case}"
    return "0 wrong"


def count_wrong(z: np.ndarray, codebook: np.ndarray, codes: np.ndarray) -> int:
    """Counts wrong codes in a sample of the tokens (all tokens, if there are few).

    A code is wrong if its float64 distance exceeds the smallest by over 1e-6 (|z|^2 + |e|^2).
    """
    step, wrong = max(1, len(z) // _SEARCHED), 0
    rows = codebook.astype(np.float64)
    squares = np.square(rows).sum(1)
    for chunk in np.array_split(np.arange(0, len(z), step), 16):
        tokens = z[chunk].astype(np.float64)
        lengths = np.square(tokens).sum(1)
        distance = lengths[:, None] + squares - 2 * tokens @ rows.T
        chosen = np.take_along_axis(distance, codes[chunk][:, None], axis=1)[:, 0]
        allowed = 1e-6 * (lengths + squares[codes[chunk]])
        wrong += int(np.sum(chosen - distance.min(1) > allowed))
    return wrong


def search_flops(case: Case) -> float:
    """Returns the FLOPs of the search kernel's products, for inputs of a size.

    A float32 product counts as three float16 products, padded.
    """
    return 2 * max(16, 1 << (3 * case.width + 2).bit_length()) * case.pairs


def torch_searches() -> dict[str, Callable]:
    """Returns functions by name: the float32 codebook search in PyTorch, eager and compiled."""
    torch = importlib.import_module("torch")

    def search(z, codebook):
        squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return torch.argmin(squares - 2 * z @ codebook.T, dim=1)

    return {"torch": search, "torch.compile": torch.compile(search, dynamic=False)}


# Entropy loss.


def entropy_gradients(impl: str) -> Callable:
    """Returns a function of tokens and codebook: value and gradients of the entropy loss."""

    def loss(z, codebook):
        return entropy.entropy_loss(
            z.reshape(-1, 64, z.shape[-1]), codebook, TEMPERATURE, impl=impl
        )

    return jax.value_and_grad(loss, argnums=(0, 1))


def check_entropy(case: Case, impl: str) -> str:
    """Compares gradients of the entropy loss with float64; returns the error as text.

    The error is that of the norm, relative, of 256 tokens in 16 groups that are near each other.

    Raises:
        AssertionError: the error is 2e-4 or more.
    """
    codebook = unit_vectors(1, min(case.rows, 2**14), case.width)
    near = unit_vectors(2, 16, case.width)[np.arange(_GRADED) % 16]
    z = near + 0.05 * unit_vectors(3, _GRADED, case.width)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    _, ours = jax.jit(entropy_gradients(impl))(z, codebook)
    exact = float64_gradients(z.astype(np.float64), codebook.astype(np.float64))
    pairs = zip(ours, exact, strict=True)
    error = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)
    assert error < 2e-4, f"gradients of {impl} are off by {error} at {case}"
    return f"{error:.1e}"


def float64_gradients(z: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradients of the entropy loss to tokens and codebook, for inputs in float64.

    The chain rule is applied to the whole matrix [m k] of tokens and codebook rows at once.
    """
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


def torch_losses() -> dict[str, Callable]:
    """Returns functions by name: gradients of the entropy loss in PyTorch, eager and compiled."""
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


KERNELS = {
    "search": Kernel(
        codebook_search.WIDTHS, search, check_search, torch_searches, "products", search_flops,
        float("inf"), 2**32,
    ),
    "entropy": Kernel(  # beyond its limits XLA and PyTorch take minutes
        entropy.WIDTHS, entropy_gradients, check_entropy, torch_losses, "exponentials",
        lambda case: 4 * case.pairs, 2**32, 2**30,
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()
