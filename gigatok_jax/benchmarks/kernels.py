"""What the benchmarks of kernels share: inputs, timing, memory, a table and a picture."""

import argparse
import importlib
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from gigatok_jax.run import command_line

# Of a device: multiply-adds of bfloat16 (measured, twice a multiply-add) and exponentials a second
# (16 a clock and multiprocessor).
LIMITS = {"NVIDIA H200": {"products": 790e12, "exponentials": 16 * 132 * 1.98e9}}
_PEER_BYTES = 2**34  # of one tokens x rows matrix; larger ones are not tried
_COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280"]


class Case(NamedTuple):
    tokens: int
    rows: int
    width: int


class Result(NamedTuple):
    tokens: int
    rows: int
    implementation: str
    ms: float
    share: float  # of the limit; 0 where the device's is not known
    peak_mib: float  # inputs and results left out
    error: str  # of what was checked before


def arguments(description: str) -> argparse.Namespace:
    """The command line; sizes are small where there is no accelerator."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch
    large = jax.default_backend() != "cpu"
    tokens = [2**12, 2**14, 2**16, 2**18, 2**20] if large else [256, 512]
    rows = [2**10, 2**12, 2**14, 2**16, 2**18] if large else [64, 128]
    parser = command_line.Parser(description=description)
    parser.add_argument("--tokens", nargs="+", type=int, default=tokens)
    parser.add_argument("--rows", nargs="+", type=int, default=rows)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--at", nargs=2, type=int, default=[2**16, 2**14] if large else [256, 128],
                        help="tokens while rows vary, rows while tokens do")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=9 if large else 2)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=large)
    parser.add_argument("--out", default="", help="folder for the picture and the figures")
    return parser.parse_args()


def cases(given: argparse.Namespace) -> list[Case]:
    """Tokens vary at one number of rows, rows at one number of tokens."""
    pairs = [(m, given.at[1]) for m in given.tokens] + [(given.at[0], k) for k in given.rows]
    return [Case(m, k, given.width) for m, k in dict.fromkeys(pairs)]


def unit_vectors(seed: int, count: int, width: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inputs(case: Case, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and rows; others every time, so that nothing is computed once for all."""
    return [
        (
            unit_vectors(2 * i, case.tokens, case.width),
            unit_vectors(2 * i + 1, case.rows, case.width),
        )
        for i in range(number)
    ]


def time_jax(function: Callable, case: Case, repeats: int) -> tuple[float, float]:
    """Milliseconds of one call, in a program of several on other inputs, and MiB of temporaries.

    Within a program the device does not wait for the host, as in a training step.
    """
    number = 4 if case.tokens * case.rows <= 2**32 else 1
    data = jax.device_put(inputs(case, number))
    single = jax.jit(function).lower(*data[0]).compile()
    program = jax.jit(lambda data: [function(*x) for x in data]).lower(data).compile()
    memory = single.memory_analysis()
    jax.block_until_ready(program(data))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(5):
            made = program(data)
        jax.block_until_ready(made)
        seconds.append((time.perf_counter() - start) / (5 * number))
    return 1e3 * statistics.median(seconds), memory.temp_size_in_bytes / 2**20


def time_torch(function: Callable, case: Case, repeats: int) -> tuple[float, float]:
    """The same in PyTorch, on CUDA."""
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
    """Whether PyTorch can be timed on the same GPU."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return False
    return importlib.import_module("torch").cuda.is_available()


def fits_peer(case: Case) -> bool:
    """Whether a matrix of tokens x rows is tried."""
    return 4 * case.tokens * case.rows <= _PEER_BYTES


def share(kind: str, work: float, ms: float) -> float:
    """Part of the device's rate of `kind` at which the work was done; 0 if it is not known."""
    rate = LIMITS.get(jax.devices()[0].device_kind, {}).get(kind)
    return work / rate / (ms * 1e-3) if rate else 0.0


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = ["| tokens | rows | implementation | ms | of the limit | MiB | checked |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        part = f"{r.share:.0%}" if r.share else ""
        lines.append(
            f"| {r.tokens} | {r.rows} | {r.implementation} | {r.ms:.4g} | {part} | "
            f"{r.peak_mib:.1f} | {r.error} |"
        )
    return "\n".join(lines)


def finish(name: str, given: argparse.Namespace, results: Sequence[Result]) -> None:
    """Prints the table; with `--out` writes it, the figures and a picture as well."""
    text = f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n{table(results)}"
    print(text)
    if not given.out:
        return
    folder = epath.Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps([r._asdict() for r in results], indent=1))
    with (folder / f"{name}.png").open("wb") as file:
        picture(name, given.at, results).save(file, "PNG")


def picture(name: str, at: Sequence[int], results: Sequence[Result]) -> Image.Image:
    """Milliseconds over tokens, and over rows, both on logarithmic scales."""
    image = Image.new("RGB", (1000, 420), "white")
    draw = ImageDraw.Draw(image)
    over_tokens = [r for r in results if r.rows == at[1]]
    over_rows = [r for r in results if r.tokens == at[0]]
    _panel(draw, (70, 40), f"{name}: ms over tokens, {at[1]} rows", over_tokens, "tokens")
    _panel(draw, (570, 40), f"{name}: ms over rows, {at[0]} tokens", over_rows, "rows")
    return image


def _panel(draw, corner, title, results, axis):
    if not results:
        return
    left, top, width, height = *corner, 400, 320
    span = [_range([getattr(r, axis) for r in results]), _range([r.ms for r in results])]

    def place(r):
        x = (math.log(getattr(r, axis)) - span[0][0]) / (span[0][1] - span[0][0])
        y = (math.log(r.ms) - span[1][0]) / (span[1][1] - span[1][0])
        return left + width * x, top + height * (1 - y)

    draw.rectangle((left, top, left + width, top + height), outline="black")
    draw.text((left, top - 20), title, "black")
    _labels(draw, results, axis, place, corner, height)
    for i, kind in enumerate(dict.fromkeys(r.implementation for r in results)):
        colour = _COLOURS[i % len(_COLOURS)]
        points = [place(r) for r in sorted(results, key=lambda r: getattr(r, axis))
                  if r.implementation == kind]  # fmt: skip
        draw.line(points, colour, 2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        draw.text((left + 10, top + 8 + 14 * i), kind, colour)


def _labels(draw, results, axis, place, corner, height):
    for r in results:
        draw.text((place(r)[0] - 12, corner[1] + height + 6), f"{getattr(r, axis)}", "black")
    for r in (min(results, key=lambda r: r.ms), max(results, key=lambda r: r.ms)):
        draw.text((corner[0] - 50, place(r)[1] - 6), f"{r.ms:.3g}", "black")


def _range(values: Sequence[Any]) -> tuple[float, float]:
    low, high = math.log(min(values)), math.log(max(values))
    return (low, high) if high > low else (low - 1, high + 1)
