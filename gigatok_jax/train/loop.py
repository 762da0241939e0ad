"""Work between two updates of a training run: metrics, checkpoints, evaluations, signals.

The loops over updates are in `tokenizer.train` and `ar.train`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from gigatok_jax import files, parallel
from gigatok_jax.errors import CheckpointError, ConfigError, NonFiniteError
from gigatok_jax.run import checkpoint, metric_writer, page, pictures, processes
from gigatok_jax.run import workdir as workdir_lib
from gigatok_jax.run.signals import Interrupts, Watchdog
from gigatok_jax.train.program import Program
from gigatok_jax.train.settings import total_steps


class HeldOut(Protocol):
    """Protocol of an evaluator of a model on held-out data; all processes call it together."""

    def figures(self, state: Any, watchdog: Watchdog) -> dict[str, float]:
        """Computes named held-out figures of a state; tells the watchdog of every batch."""

    def pictures(self, state: Any) -> dict[str, np.ndarray]:
        """Draws named pictures uint8[h w 3] of what the model of a training state produces."""


@dataclasses.dataclass
class Run:
    """A training run: its state, its progress and its open files; `open_run` makes it.

    Attributes:
        config: of the run.
        workdir: folder of the run.
        program: training step.
        held_out: measures the model and draws its pictures during the run.
        extras: JSON values saved beside each state.
        shown: names of the metrics in the progress line.
        interrupts: signals that end the run between two updates.
        state: parameters, optimizer state and the like after `done` updates.
        done: number of updates so far.
        over: whether the run and its results were complete when it was opened.
        total_steps: number of updates of the whole run.
        checkpoints, writer, timer, watchdog: helpers made from the config; `close` ends the helpers
            that hold files or threads.
    """

    config: ml_collections.ConfigDict
    workdir: epath.Path
    program: Program
    held_out: HeldOut
    extras: dict[str, Any]
    shown: tuple[str, ...]
    interrupts: Interrupts = dataclasses.field(default_factory=Interrupts)
    state: Any = None
    done: int = 0
    over: bool = False

    def __post_init__(self):
        config, self.total_steps = self.config, total_steps(self.config)
        self._profile = Profile(config.profile, self.workdir)  # refuses a wrong span first
        keep, milestone_every = config.save.keep, config.save.milestone_every
        self.checkpoints = checkpoint.Checkpoints(self.workdir, keep, milestone_every)
        self.writer = metric_writer.MetricWriter(
            self.workdir, self.total_steps, config.train.global_batch
        )
        self.timer = metric_writer.StepTimer()
        self.watchdog = Watchdog(config.cluster.hang_minutes)
        self._late, self._stopping = LateScalars(), False
        self._inside = contextlib.ExitStack()  # closed when the loop ends, whatever ends it

    def batches(self, stream: AbstractContextManager[Iterator[Mapping]]) -> Iterator[Any]:
        """Yields global batches on the devices, until the last update is done or a signal has come.

        Args:
            stream: batches of numpy arrays by name, the first for update `done + 1`.

        Yields:
            Arrays by name, as in `program.batch`; the images alone if `program.batch` is no dict.
        """
        stream = self._inside.enter_context(stream)  # is closed also if nothing is left to do
        if self.over:
            return
        self._inside.enter_context(self._profile)
        self._inside.enter_context(self.watchdog)
        catch_up(self)
        while self.done < self.total_steps and not self._stopping:
            with self.timer.measure("data"):
                batch = self._place(next(stream))
            self.done += 1
            self._profile.at(self.done)
            yield batch
        self._inside.close()

    def _place(self, batch: Mapping[str, np.ndarray]) -> Any:
        split = parallel.split_batch(self.program.mesh)
        if not isinstance(self.program.batch, dict):
            return parallel.global_array(batch["image"], split)
        return {name: parallel.global_array(batch[name], split) for name in self.program.batch}

    def after(self, scalars: Mapping[str, jax.Array]) -> None:
        """Ends update `done`: writes metrics of the update before it; saves and evaluates if due.

        Raises:
            NonFiniteError: a loss is no longer a number.
            GigatokError: a file cannot be written.
        """
        with self.timer.measure("compute"):
            ready = self._late.push(self.done, scalars)
        report_scalars(self, ready)
        self._stopping = self.interrupts.agreed()
        if is_due(self) or self._stopping:
            with self.timer.measure("compute"):
                ready = self._late.pop()
            report_scalars(self, ready)
        record(self, self._stopping)
        self.watchdog.beat()

    def close(self) -> None:
        """Ends the run's threads and processes, waits for the save in progress, closes files."""
        with contextlib.closing(self.checkpoints), contextlib.closing(self.writer):
            self._inside.close()


@contextlib.contextmanager
def open_run(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    program: Program,
    held_out: HeldOut,
    extras: dict[str, Any],
    *,
    shown: tuple[str, ...],
    begin: Callable[[Run], tuple[Any, int]] | None = None,
) -> Iterator[Run]:
    """Context manager: opens a run at its newest state, and writes its results when the block ends.

    Args:
        config: of the run.
        workdir: folder of the run; a run whose folder holds a checkpoint is resumed.
        program, held_out, extras, shown: see `Run`.
        begin: function of the run that returns a first state and its number of updates done; None
            starts from a new state.

    Raises:
        ConfigError: the workdir belongs to a run of another config, or `profile` is no span.
        CheckpointError: all checkpoints are damaged, or the newest is of another model.
        SystemExit: after a signal, once the state is saved; status 128 + the signal's number.
    """
    run = Run(config, epath.Path(workdir), program, held_out, extras, shown)
    with contextlib.closing(run), run.interrupts:
        workdir_lib.claim(run.workdir, config)
        tell_placement(run)
        run.state, run.done = restore(run, begin or first_state)
        run.over = run.done >= run.total_steps and has_results(run.workdir, run.done)
        yield run
        if not run.over:
            finish(run)


def tell_placement(run: Run) -> None:
    """Prints the memory of the state per device, and writes each array's placement to a file."""
    mesh, abstract = run.program.mesh, run.program.abstract
    if mesh.size == 1 or not processes.is_first():
        return
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    held = parallel.bytes_per_device(abstract) / 2**30
    line = f"mesh {sizes}: {held:.2f} GiB of the state on each of {mesh.size} devices"
    print(f"{line}; {workdir_lib.PLACEMENT}", flush=True)
    (run.workdir / workdir_lib.PLACEMENT).write_text(
        "\n".join([line, *parallel.placement(abstract), ""])
    )


def first_state(run: Run) -> tuple[Any, int]:
    """Creates the state of a new run; returns the state and 0, its number of updates."""
    run.writer.truncate_after(0)
    return run.program.create(), 0


def restore(run: Run, begin: Callable[[Run], tuple[Any, int]]) -> tuple[Any, int]:
    """Restores the newest whole checkpoint, or calls `begin`; returns state and updates done.

    Raises:
        CheckpointError: all checkpoints are damaged, or the newest is of another model or
            tokenizer.
    """
    step = run.checkpoints.latest()
    if step is None:
        if damaged := run.checkpoints.damaged():
            raise CheckpointError(
                f"no whole checkpoint is left in {run.checkpoints.root}, {', '.join(damaged)} are"
                " damaged: remove that folder to begin anew, or choose another --workdir"
            )
        return begin(run)
    state, extras = run.checkpoints.restore(run.program.abstract, step)
    check_extras(run, extras)
    run.writer.truncate_after(step)
    if processes.is_first():
        print(f"resuming at step {step} of {run.total_steps}", flush=True)
    return state, step


def check_extras(run: Run, saved: Mapping[str, Any]) -> None:
    """Checks the tokenizer and images of a resumed run against what its checkpoint has saved.

    Warns if the images are others.

    Raises:
        CheckpointError: the codes are of another tokenizer.
    """
    before, now = saved.get("tokenizer"), run.extras.get("tokenizer")
    if before and before != now:  # a converted prior may not know
        raise CheckpointError(
            f"{run.workdir} learned codes of tokenizer {before}, these are of {now}: name the same"
            " codes and tokenizer"
        )
    if saved["data"]["fingerprint"] != run.extras["data"]["fingerprint"]:
        logging.warning("the images are not those of the checkpoint: other names or another count")


def is_due(run: Run) -> bool:
    """Whether a save, an evaluation or pictures are due after the current update."""
    config = run.config
    periods = (config.save.every, config.eval.every, config.log.pictures_every)
    return run.done == run.total_steps or any(is_at(run.done, period) for period in periods)


def is_at(step: int, period: int) -> bool:
    """Whether `step` is a multiple of `period`; never for a period of 0."""
    return bool(period) and step % period == 0


def report_scalars(run: Run, ready: tuple[int, dict[str, float]] | None) -> None:
    """Writes and prints the metrics of an update if due by `log.every`; None is ignored."""
    if ready is None:
        return
    step, values = ready
    if is_at(step, run.config.log.every) or step in (1, run.total_steps):
        run.writer.write(step, values, "train")
        shown = {name: values[name] for name in run.shown if name in values}
        run.writer.progress(step, shown, run.timer)


def record(run: Run, stopping: bool) -> None:
    """Saves a checkpoint, then writes held-out figures and pictures, each if due at this update.

    The checkpoint comes first, and a run that stops before its end is not evaluated: a preemption
    does not wait. A run that resumes makes up for the evaluation, see `catch_up`.
    """
    last = run.done == run.total_steps
    if last or stopping or is_at(run.done, run.config.save.every):
        with run.timer.measure("save"):
            run.checkpoints.save(run.done, run.state, run.extras)
    if last or not stopping:
        show(run)


def catch_up(run: Run) -> None:
    """Writes the due figures and pictures of the update that a run resumes at, unless written."""

    def owes() -> bool:
        rows = metric_writer.read(run.workdir)  # none of a run that branches off another one
        here = (name for row in rows if row["step"] == run.done for name in row)
        return bool(rows) and not any(name.startswith("eval/") for name in here)

    if processes.from_first(owes):
        show(run)


def show(run: Run) -> None:
    """Evaluates a run on held-out data and draws its pictures, each if due at this update."""
    config, last = run.config, run.done == run.total_steps
    if last or is_at(run.done, config.eval.every):
        with run.timer.measure("evaluate"):
            figures = run.held_out.figures(run.state, run.watchdog)
            run.writer.write(run.done, figures, "eval")
    if last or is_at(run.done, config.log.pictures_every):
        with run.timer.measure("evaluate"):
            drawn = run.held_out.pictures(run.state)
            if processes.is_first():
                keep_pictures(run, drawn)


def keep_pictures(run: Run, drawn: Mapping[str, np.ndarray]) -> None:
    """Writes pictures as PNG and TensorBoard events, and the page that shows them."""
    for name, picture in drawn.items():
        pictures.save(run.workdir, name, run.done, picture)
        run.writer.picture(run.done, name, picture)
    page.write(run.workdir)


def has_results(workdir: epath.Path, step: int) -> bool:
    """Whether a workdir has a `results.json` of a run of `step` steps."""
    path = workdir / "results.json"
    return processes.from_first(lambda: path.exists() and files.read_json(path).get("step") == step)


def finish(run: Run) -> None:
    """Ends a run: waits for the last save; writes the page, and results if the run is complete.

    Raises:
        SystemExit: the run was stopped before its last update.
    """
    with run.timer.measure("save"):
        run.checkpoints.wait()
    if processes.is_first():
        write_results(run)
    if run.done < run.total_steps:
        if processes.is_first():
            print(f"stopped at step {run.done} of {run.total_steps}; the same command resumes")
        raise SystemExit(128 + run.interrupts.received)


def write_results(run: Run) -> None:
    """Writes a run's page, and `results.json` if the run is complete; prints the time computing."""
    seconds, shares = run.timer.total()
    share = shares.get("compute", 0.0)
    if run.done >= run.total_steps:
        rows = [row for row in metric_writer.read(run.workdir) if row["step"] == run.done]
        figures = {name: row[name] for row in rows for name in row if name.startswith("eval/")}
        results = {name.removeprefix("eval/"): value for name, value in figures.items()}
        results |= {"step": run.done, "seconds": seconds, "useful_share": share}
        files.write_json(run.workdir / "results.json", results)
    written = page.write(run.workdir)
    print(f"{share:.0%} of {metric_writer.duration(seconds)} spent computing; page: {written}")


class LateScalars:
    """Buffer that fetches a step's metrics while the next step runs, and checks the values."""

    def __init__(self):
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def push(
        self, step: int, scalars: Mapping[str, jax.Array]
    ) -> tuple[int, dict[str, float]] | None:
        """Keeps the metrics of a step that was started; returns the metrics of the step before it.

        Returns:
            Number and finite values of the step before; None if no metrics were kept.

        Raises:
            NonFiniteError: a value of the step before is not a number or infinite.
        """
        ready, self._pending = self.pop(), (step, scalars)
        return ready

    def pop(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the last step's metrics; returns its number and values, None without metrics.

        Raises:
            NonFiniteError: a value is not a number or infinite; the error names the value.
        """
        if self._pending is None:
            return None
        (step, scalars), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        check_finite(step, values)
        return step, values


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises NonFiniteError if a metric is not finite; single terms are named before sums."""
    for name in sorted(values, key=lambda name: name.endswith(("loss", "_norm"))):  # sums last
        if not np.isfinite(values[name]):
            raise NonFiniteError(
                f"step {step}: {name} is {values[name]}; the last checkpoint is from before."
                " Lower optim.learning_rate or optim.clip, or look at the images of this step"
            )


class Profile:
    """Context manager that traces the steps of `config.profile`, "start:count", for a profiler."""

    def __init__(self, span: str, workdir: epath.Path):
        self._first, self._last = self._read(span)
        self._folder, self._running = workdir / "profile", False

    @staticmethod
    def _read(span: str) -> tuple[int, int]:
        if not span:
            return 0, 0
        first, _, count = span.partition(":")
        if not (first.isdigit() and count.isdigit() and int(first) > 0 and int(count) > 0):
            raise ConfigError(f"profile is {span!r}, expected start:count in steps, like 10:3")
        return int(first), int(first) + int(count)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def at(self, step: int) -> None:
        """Starts or ends the profiler trace, if due, before the step that is about to run."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if step == self._last:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"profile: {self._folder}, for xprof or TensorBoard", flush=True)
