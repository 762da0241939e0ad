r"""Measures the speed of sampling with guidance, and whether codes depend on the batch size.

    python -m gigatok_jax.benchmarks.sampling --models prior-B prior-XXL --batches 8 64 256
    python -m gigatok_jax.benchmarks.sampling --models prior-B --batches 8 64 256 --images 1000

Weights are random. Cached decoding is first checked against the full pass. Times are medians of
runs; each run waits for the device. `bound` is the share of the time in which the device could read
what every step must read (weights, the filled part of the cache) at the rate of a measured copy.
"""

import argparse
import json
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.library import Prior
from gigatok_jax.model_config import model_config
from gigatok_jax.models import ar, ar_decoding
from gigatok_jax.run import command_line, metric_writer

SCALE = 1.75


class Timing(NamedTuple):
    """Record of the speed and memory of sampling from one prior at one batch size."""

    model: str
    dtype: str
    batch: int
    images_per_second: float
    ms_per_code: float
    bound: float  # least time to read weights and cache, as a share of the time taken
    peak_gib: float  # of the process so far; 0 if the device does not say


def main() -> None:
    """Measures each model at each batch size and prints figures; with `--out` writes JSON."""
    arguments = parse()
    rate = copy_rate()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, copy {rate / 1e12:.2f} TB/s")
    rows = []
    for name in arguments.models:
        prior = random_prior(name, arguments.tokens, arguments.dtype)
        print(f"{name}: {check(prior):.1e} between cached and whole logits, relative", flush=True)
        if arguments.images:
            rows += differences(prior, name, arguments.images, arguments.batches)
            continue
        for batch in arguments.batches:
            rows.append(measure(prior, name, batch, rate, arguments.repeats)._asdict())
            print(" ".join(f"{key} {show(value)}" for key, value in rows[-1].items()), flush=True)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(rows, file, indent=1)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["prior-B"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64, 256])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=256, help="codes of an image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=0, help="compare codes, do not time")
    parser.add_argument("--out", default="", help="JSON file of all figures")
    return parser.parse_args()


def random_prior(name: str, tokens: int, dtype: str) -> Prior:
    """Creates a prior of a published size with random weights, also in the head."""
    model = model_config(name, tokens=tokens)
    module = ar.make(model)
    ids, codes = jnp.zeros(1, jnp.int32), jnp.zeros((1, 2), jnp.int32)

    @jax.jit
    def create(key):
        params = module.init(key, ids, codes)["params"]
        head = jax.random.normal(key, params["head"]["kernel"].shape) * model.width**-0.5
        return jax.tree.map(lambda x: x.astype(dtype), params | {"head": {"kernel": head}})

    return Prior(create(jax.random.key(0)), model, dtype)


def check(prior: Prior) -> float:
    """Compares the logits of cached decoding with the logits of the full pass.

    Returns the largest error relative to the standard deviation of the full pass's logits.

    Raises:
        AssertionError: that error is 1e-3 or more.
    """
    module = ar.make(prior.config, jnp.float32)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), prior.params)
    ids = jnp.arange(2, dtype=jnp.int32)
    codes = jax.random.randint(jax.random.key(1), (2, 6), 0, prior.config.vocab)
    with jax.default_matmul_precision("highest"):
        whole = module.apply({"params": params}, ids, codes)
        logits, cache = ar_decoding.prefill(module, params, ids, ar_decoding.empty_cache(module, 2))
        for t in range(1, 6):
            place = ar.Place(jnp.int32(t), 8)
            logits, cache = ar_decoding.decode_step(module, params, codes[:, t - 1], cache, place)
    error = float(jnp.abs(logits - whole[:, -1]).max() / whole.std())
    assert error < 1e-3, f"cached decoding is {error} from the full pass"
    return error


def measure(prior: Prior, name: str, batch: int, rate: float, repeats: int) -> Timing:
    """Times `Prior.generate` with guidance; returns the figures of the median time.

    Args:
        prior: model to measure.
        name: of the model.
        batch: images per call; guidance doubles it.
        rate: bytes per second that the device can read, from `copy_rate`.
        repeats: timed calls.
    """
    ids = np.arange(batch) % prior.config.classes

    def once(seed):
        start = time.perf_counter()
        jax.block_until_ready(prior.generate(ids, seed=seed, cfg_scale=SCALE))
        return time.perf_counter() - start

    once(0)  # compiles
    seconds = statistics.median(once(seed) for seed in range(1, repeats + 1))
    tokens = prior.config.tokens
    peak = metric_writer.peak_memory().get("peak_memory_gib", 0.0)
    bound = bytes_read(prior, batch) / rate / seconds
    kind = str(prior.params["head"]["kernel"].dtype)
    return Timing(name, kind, batch, batch / seconds, seconds / tokens * 1e3, bound, peak)


def bytes_read(prior: Prior, batch: int) -> int:
    """Returns the least number of bytes that all steps of one guided generation must read."""
    c = prior.config
    item = prior.params["head"]["kernel"].dtype.itemsize
    tables = c.width * (
        c.vocab + c.classes + 1 + c.tokens + 1
    )  # tables of which a step reads single rows
    weights = sum(x.size for x in jax.tree.leaves(prior.params)) - tables
    cached = 2 * batch * c.layers * 2 * c.kv_heads * (c.width // c.heads)  # per position
    return item * (c.tokens * weights + cached * c.tokens * (c.tokens + 1) // 2)


def copy_rate() -> float:
    """Measures a large copy on the device; returns its bytes read and written per second."""
    size = 2**30 if jax.default_backend() == "gpu" else 2**26
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def differences(prior: Prior, name: str, images: int, batches: list[int]) -> list[dict]:
    """Samples the same images at each batch size; counts codes that differ from the first's.

    Prints and returns a row of figures for every other batch size.
    """
    codes = {batch: in_batches(prior, images, batch) for batch in batches}
    rows = []
    for batch in batches[1:]:
        differ = codes[batch] != codes[batches[0]]
        row = {"model": name, "dtype": str(prior.params["head"]["kernel"].dtype)}
        row |= {"batches": [batches[0], batch], "images": images, "codes": int(differ.sum())}
        row |= {"images_that_differ": int(differ.any(1).sum()), "all_codes": differ.size}
        rows.append(row)
        print(row, flush=True)
    return rows


def in_batches(prior: Prior, images: int, batch: int) -> np.ndarray:
    """Samples codes i32[images n] in calls of `batch` images; the last call is padded."""
    chunks = []
    for start in range(0, images, batch):
        ids = np.arange(start, start + batch)
        codes = prior.generate(ids % prior.config.classes, image_ids=ids, cfg_scale=SCALE)
        chunks.append(np.asarray(codes))
    return np.concatenate(chunks)[:images]


def show(value: object) -> str:
    """Formats a figure as text; floats get four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
