r"""Measures speed and memory of a training step on this machine or cluster, for any mesh.

    python -m gigatok_jax.benchmarks.training --config=configs/xlxxl.py --out=runs/scale \
        --config.mesh.fsdp=4 --config.train.global_batch=64 [--save=DIR]
    python -m gigatok_jax.benchmarks.training --table=runs/scale

The step is the run's own, in the last phase of its recipe. Images and weights, also of frozen
networks, are random and the same on every mesh: losses of one global batch can be compared. The
time of an update is a mean over several that follow each other as in a run; loading data is not in
it. The share of collectives is read from a trace of three updates, on the first GPU. A cluster is
joined as by main.py; --out and --save are then folders that all hosts share.
"""

import json
import pathlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from gigatok_jax import files, parallel
from gigatok_jax.benchmarks import markdown
from gigatok_jax.errors import ConfigError
from gigatok_jax.planning import plan
from gigatok_jax.run import checkpoint, cluster, command_line, metric_writer, processes
from gigatok_jax.run import workdir as workdir_lib
from gigatok_jax.train import program as program_lib
from gigatok_jax.train import settings
from gigatok_jax.weights import frozen

MEASURED = "gigatok_jax_measured"  # folder of a checkpoint that is only timed
LOSSES = 5  # updates whose losses are recorded, from the first
ALIKE = ("config", "dtype", "remat", "unrolled", "micro_batches")  # equal if efficiency compares
NAMED = (*ALIKE, "mesh", "global_batch")  # fields in the file name of a measurement
COLLECTIVES = ("nccl", "allgather", "allreduce", "reducescatter", "all_gather", "all_reduce")


def main(argv) -> None:
    """Measures the training step of a config, or prints the table of all measurements."""
    del argv
    options = flags.FLAGS
    with command_line.one_line_errors():
        if options.table:
            print(table(read(options.table)))
            return
        if options.config is None:
            raise ConfigError("nothing to measure: name --config=configs/<run>.py, or --table=DIR")
        if options.save and (left := epath.Path(options.save) / MEASURED).exists():
            raise ConfigError(f"{left} is the checkpoint of an interrupted measurement: delete it")
        folder = options.out or options.save or tempfile.gettempdir()
        with cluster.joined(options.config, folder), command_line.one_line_errors():
            figures = measure(options.config, options.repeats, options.save)
            if processes.is_first():
                report(figures, options.out)


def report(figures: dict[str, Any], folder: epath.PathLike) -> None:
    """Prints the figures of a measurement; writes them into `folder` unless it is ""."""
    print(json.dumps(figures), flush=True)
    if folder:
        name = f"{'_'.join(str(figures[key]) for key in NAMED)}.json"
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        (epath.Path(folder) / name).write_text(json.dumps(figures, indent=1))


def measure(config: ml_collections.ConfigDict, repeats: int, save: str) -> dict[str, Any]:
    """Measures a run's training step; returns the figures as JSON values.

    Args:
        config: of a run that trains; its mesh covers all devices.
        repeats: number of timed updates.
        save: folder to write a checkpoint into, which is read again and deleted; "" for none.

    Raises:
        GigatokError: the mesh or the batch does not fit, or a value of the config is wrong.
    """
    compiled, run = timed(Running, config)
    figures = describe(config, run.mesh) | {"compile_s": compiled, "needed_gib": run.needed_gib}
    report_so_far(figures)
    figures["create_s"], _ = timed(run.create)
    figures["losses"] = [float(run.advance(seed)) for seed in range(LOSSES)]
    report_so_far(figures)
    seconds = timed(run.updates, repeats)[0] / repeats
    figures |= {"ms": 1e3 * seconds, "images_per_second": config.train.global_batch / seconds}
    figures |= metric_writer.peak_memory()
    report_so_far(figures)
    figures |= trace(run)
    return figures | (save_and_restore(run, epath.Path(save) / MEASURED) if save else {})


def report_so_far(figures: dict[str, Any]) -> None:
    """Prints the figures known so far on stderr, in case the measurement is interrupted."""
    print(json.dumps(figures), file=sys.stderr, flush=True)


class Running:
    """Training run to measure: compiled step, state and random batches; no data, no workdir."""

    def __init__(self, config: ml_collections.ConfigDict):
        mesh = self.mesh = parallel.make_mesh(config.mesh)
        parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
        self.program = plan.program_of(config, mesh, random_frozen)
        with futures.ThreadPoolExecutor() as pool:  # two programs are compiled at once
            create = pool.submit(self.program.create.lower().compile)
            lowered = self.program.lower(config.train.micro_batches)
            self._step = lowered.compile()
            bounds = limits(config)
            self._batches = [random_batch(self.program.batch, bounds, i) for i in range(LOSSES)]
            self._create, self.state = create.result(), None

    @property
    def needed_gib(self) -> float:
        """GiB per device that a step needs, by the compiler; 0 if the compiler does not say."""
        return (program_lib.memory_needed(self._step) or 0) / 2**30

    def create(self) -> None:
        """Creates the first state and waits for it."""
        self.state = jax.block_until_ready(self._create())

    def advance(self, seed: int) -> jax.Array:
        """Makes one update on the random batch of a seed; returns its loss."""
        self.state, scalars = self._step(self.state, self._batches[seed], self.program.frozen)
        return scalars["loss"]

    def updates(self, count: int) -> None:
        """Makes updates and waits for each loss while the next update runs, as a run does."""
        late = self.advance(0)
        for i in range(1, count):
            late, ready = self.advance(i % LOSSES), late
            ready.block_until_ready()
        jax.block_until_ready((late, self.state))


def describe(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the figures that identify a measurement: config, devices and software."""
    software = workdir_lib.software()
    return {
        "config": config.name,
        "mesh": "x".join(str(size) for size in mesh.shape.values()),  # data x fsdp x tensor
        "devices": mesh.size,
        "kind": jax.devices()[0].device_kind,
        "global_batch": config.train.global_batch,
        "dtype": config.train.dtype,
        "remat": config.train.remat,
        "unrolled": settings.make_loop(config.train).unrolled,
        "micro_batches": config.train.micro_batches,
        "commit": software["commit"],
        "jax": jax.__version__,
        "flags": software["flags"],
    }


def timed(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Calls a function; returns the seconds that the call takes, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def random_frozen(name: str, folder: epath.PathLike = "") -> Any:
    """Draws random parameters of a frozen network, scaled to keep the size of activations.

    Weights of heads are positive, as those of LPIPS are.
    """

    def draw(keys, shape):
        if len(shape.shape) < 2:
            return np.full(shape.shape, float(keys[-1].key == "scale"), np.float32)
        path = jax.tree_util.keystr(keys)
        rng = np.random.default_rng(zlib.crc32(f"{name}{path}".encode()))
        values = rng.standard_normal(shape.shape, np.float32)
        values = np.abs(values) if keys[-1].key.startswith("head") else values
        return values * np.sqrt(2 / np.prod(shape.shape[:-1]), dtype=np.float32)

    return jax.tree_util.tree_map_with_path(draw, frozen.frozen_shapes(name, folder))


def limits(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Returns the exclusive upper bound of each integer input, by name.

    Bounds are 256 for pixels, the vocabulary for codes, and the number of classes for labels.
    """
    model = config.model
    return {"image": 256, "codes": model.get("vocab"), "label": model.get("classes")}


def random_batch(shapes: Any, limits: dict[str, int], seed: int) -> Any:
    """Draws a batch of uniform integers in [0, limit of the name); an unnamed array is an image."""
    rng = np.random.default_rng(seed)

    def draw(keys, x):
        limit = limits[keys[0].key] if keys else limits["image"]
        return jax.device_put(rng.integers(limit, size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def save_and_restore(run: Running, folder: epath.Path) -> dict[str, float]:
    """Saves a run's state, reads the checkpoint again, and deletes it.

    Returns the seconds to start the save, to complete it, and to read and verify the checkpoint,
    and the checkpoint's GiB.
    """
    kept = checkpoint.Checkpoints(folder)
    blocked, _ = timed(kept.save, 1, run.state, {})
    rest, _ = timed(kept.wait)
    kept.close()
    run.state = None
    other = checkpoint.Checkpoints(folder)  # verifies again: the first one remembers its checks
    seconds, _ = timed(other.restore, run.program.abstract, 1)
    other.close()
    processes.gather(b"")  # waits until all processes have read the checkpoint
    size = processes.from_first(lambda: delete(folder))
    figures = {"save_blocks_s": blocked, "save_s": blocked + rest, "restore_s": seconds}
    return figures | {"checkpoint_gib": size / 2**30}


def delete(folder: epath.Path) -> int:
    """Deletes the folder of a measured checkpoint; returns the checkpoint's number of bytes."""
    written = files.read_json(folder / checkpoint.FOLDER / "1" / checkpoint.CHECKSUMS)
    folder.rmtree()
    return sum(file["bytes"] for file in written.values())


# Collectives in a trace.


def trace(run: Running) -> dict[str, float]:
    """Traces three updates; returns `shares` of their time on the first GPU, {} without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run.updates(3)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = {
            plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        }
        device = next((name for name in planes if name.startswith("/device:GPU")), None)
        return shares(kernels(planes[device])) if device else {}


def kernels(plane: Any) -> list[tuple[str, float, float]]:
    """Lists name, begin and end in ns of every kernel and copy on the streams of a GPU."""
    streams = [line for line in plane.lines if line.name.startswith("Stream")]
    return [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for line in streams
        for event in line.events
    ]


def shares(events: list[tuple[str, float, float]]) -> dict[str, float]:
    """Returns the shares of a GPU's time, from the first kernel's begin to the last kernel's end.

    Returns:
        "collectives": a collective ran; "exposed": only collectives ran; "idle": nothing ran.
        Empty for a trace without kernels.
    """
    if not events:
        return {}
    sending, computing = [], []
    for name, begin, end in events:
        collective = any(word in name.lower() for word in COLLECTIVES)
        (sending if collective else computing).append((begin, end))
    span = max(end for *_, end in events) - min(begin for _, begin, _ in events)
    busy = length(sending + computing)
    return {
        "collectives": length(sending) / span,
        "exposed": (busy - length(computing)) / span,
        "idle": 1 - busy / span,
    }


def length(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, reached = 0.0, -np.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


# Tables.


def read(folder: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the measurements of a folder, sorted by config, devices, mesh and batch.

    Raises:
        ConfigError: the folder holds no measurements.
    """
    rows = [json.loads(path.read_text()) for path in epath.Path(folder).glob("*.json")]
    if not rows:
        raise ConfigError(f"{folder} holds no figures: measure into it with --out={folder}")
    order = ("config", "devices", "mesh", "global_batch")
    return sorted(rows, key=lambda row: [row[name] for name in order])


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of measurements.

    Efficiency is relative to one device with the same batch per device.
    """
    head = (
        "config", "remat", "devices", "data x fsdp x tensor", "batch", "images/s", "efficiency",
        "peak GiB", "collectives", "exposed", f"loss 1 to {LOSSES}",
    )  # fmt: skip
    lines = []
    for row in rows:
        ratio = efficiency(row, rows)
        shown = (f"{row[name]:.1%}" if name in row else "" for name in ("collectives", "exposed"))
        cells = (
            row["config"], row["remat"] + ", unrolled" * row["unrolled"],
            *(row["devices"], row["mesh"], row["global_batch"]),
            f"{row['images_per_second']:.1f}", f"{ratio:.1%}" if ratio else "",
            f"{row.get('peak_memory_gib', 0):.0f}", *shown,
            " ".join(f"{loss:.5g}" for loss in row["losses"]),
        )  # fmt: skip
        lines.append(cells)
    return markdown.table(head, lines)


def efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Returns a measurement's images per second and device, relative to one device.

    Returns None if no measurement on one device has the same settings and batch per device.
    """
    for alone in rows:
        same = alone["devices"] == 1 and all(alone.get(key) == row.get(key) for key in ALIKE)
        if same and alone["global_batch"] * row["devices"] == row["global_batch"]:
            return row["images_per_second"] / row["devices"] / alone["images_per_second"]
    return None


def define_flags() -> None:
    """Defines the flags of the command line; importing the module alone defines none."""
    config_flags.DEFINE_config_file("config", None, "configs/<run>.py[:arg=value,...]")
    flags.DEFINE_integer("repeats", 10, "Timed updates.")
    flags.DEFINE_string("save", "", "Folder for a checkpoint whose writing and reading are timed.")
    flags.DEFINE_string("out", "", "Folder to write the figures into.")
    flags.DEFINE_string("table", "", "Folder of figures to print as a table.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command_line.parse_known)
