"""Prints how two checkpoints differ, and what one checkpoint holds."""

import collections
import math
from collections.abc import Mapping

import numpy as np

from gigatok_jax.conversion import run_state
from gigatok_jax.run.metric_writer import count_bytes
from gigatok_jax.weights import read, recognise
from gigatok_jax.weights.names import Promise
from gigatok_jax.weights.read import Checkpoint

SHOWN = 20  # lines of a kind


def compare(first: str, second: str, tolerance: float = 0.0, weights: str = "auto") -> bool:
    """Prints how two checkpoints of any format differ.

    Args:
        first, second: paths of the checkpoints.
        tolerance: largest difference of two values that passes.
        weights: "ema" or "raw"; "auto" compares all copies that both hold.

    Returns:
        Whether both have the same tensor names, and no difference is above the tolerance.
    """
    a, b = run_state.load(first), run_state.load(second)
    same = [_compare_part(a, b, *pair, tolerance) for pair in _pairs(a, b, weights)]
    return all(same)


def _pairs(a: Checkpoint, b: Checkpoint, weights: str) -> list[tuple[str, str]]:
    """Chooses the parts of two checkpoints to compare, as pairs of names.

    Parts that both checkpoints have are compared, else the chosen copy of each checkpoint.
    """
    every = ("model", "ema", "discriminator")
    wanted = every if weights == "auto" else read.copies(a.kind, weights)
    common = [part for part in wanted if part in a.parts and part in b.parts]
    if common:
        return [(part, part) for part in common]
    return [(read.choose(a, weights), read.choose(b, weights))]


def _compare_part(a: Checkpoint, b: Checkpoint, first: str, second: str, tolerance: float) -> bool:
    left, right = a.parts[first], b.parts[second]
    print(f"{first} of {a.path}, {second} of {b.path}: {len(left)} and {len(right)} tensors")
    missing = [f"missing: {name}" for name in left if name not in right]
    extra = [f"extra: {name}" for name in right if name not in left]
    differences = _differences(left, right)
    worst = sorted(differences.items(), key=lambda pair: -pair[1])
    above = [f"{difference:.3g}: {name}" for name, difference in worst if difference > tolerance]
    for lines in (missing, extra, above):
        _print_first(lines)
    if worst:
        print(f"largest difference {worst[0][1]:.3g}, of {worst[0][0]}; tolerance {tolerance:g}")
    return not (missing or extra or above)


def _print_first(lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        print(line)
    if len(lines) > SHOWN:
        print(f"... and {len(lines) - SHOWN} more")


def _differences(left: Mapping[str, Promise], right: Mapping[str, Promise]) -> dict[str, float]:
    """Computes the largest absolute difference of each common tensor by name.

    The difference is infinite between shapes that differ.
    """
    common = [name for name in left if name in right]
    common.sort(key=lambda name: (left[name].order, right[name].order))  # as they are read fastest
    progress = count_bytes("comparing", sum(left[name].nbytes for name in common))
    differences = {}
    for name in common:
        differences[name] = _difference(left[name], right[name])
        progress(left[name].nbytes)
    return differences


def _difference(left: Promise, right: Promise) -> float:
    if left.shape != right.shape:
        return math.inf
    if not left.size:
        return 0.0
    a, b = left.read().reshape(-1), right.read().reshape(-1)
    step = 1 << 22  # values at a time, in double precision
    return max(
        float(np.abs(a[i : i + step].astype(np.float64) - b[i : i + step]).max())
        for i in range(0, a.size, step)
    )


def inspect(path: str) -> None:
    """Prints the contents of a checkpoint; reads only names, shapes and the config."""
    opened = run_state.load(path)
    print(f"{path}: {opened.kind}" + ("" if opened.step is None else f" at step {opened.step}"))
    for name, part in opened.parts.items():
        kinds = collections.Counter(np.dtype(tensor.dtype).name for tensor in part.values())
        types = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        size, numbers = (sum(getattr(x, n) for x in part.values()) for n in ("nbytes", "size"))
        print(f"  {name}: {len(part)} tensors ({types}), {numbers:,} numbers, {size / 1e9:.3f} GB")
        for top, numbers in _by_module(part).items():
            print(f"    {top:<28} {numbers:>13,}")
    for name, optimizer in opened.optimizers.items():
        states, groups = (len(optimizer.get(key, ())) for key in ("state", "param_groups"))
        print(f"  {name}: moments of {states} parameters, {groups} groups")
    if opened.kind in read.INFER:
        _inspect_model(opened)


def _inspect_model(opened: Checkpoint) -> None:
    model = read.config_of(opened)
    print(f"  {recognise.published_name(model) or 'no published model'}: it has")
    print("    " + ", ".join(f"{key}={value!r}" for key, value in model.items()))
    part = "model" if "model" in opened.parts else "ema"
    read.checked(opened, part, model)


def _by_module(part: Mapping[str, Promise]) -> dict[str, int]:
    counts = collections.Counter()
    for name, tensor in part.items():
        counts[name.split(".")[0]] += tensor.size
    return dict(counts)
