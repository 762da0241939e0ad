"""What every training run goes through: steps, signals, numbers that arrive one step late, saves.

A kind of run brings its own `Run`, with the three methods that set it apart.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import jax
import numpy as np
from absl import logging
from etils import epath

from gigatok_jax import files, parallel
from gigatok_jax.errors import CheckpointError, ConfigError, NonFiniteError
from gigatok_jax.run import checkpoint, cluster, environment, metric_writer, page, processes
from gigatok_jax.run.signals import Interrupts
from gigatok_jax.train.fit import FittedStep
from gigatok_jax.train.program import Program
from gigatok_jax.train.settings import total_steps

PLACEMENT = "placement.txt"  # of the arrays of a state on several devices


@dataclasses.dataclass
class Run:
    """Everything that one training run holds on to."""

    config: Any
    workdir: epath.Path
    total_steps: int
    mesh: jax.sharding.Mesh
    abstract: Any  # shapes and shardings of the state
    create: Callable  # makes the first state in place
    step: FittedStep
    frozen: Any  # parameters of the frozen networks, on the devices
    checkpoints: checkpoint.Checkpoints
    writer: metric_writer.MetricWriter
    timer: metric_writer.StepTimer
    watchdog: cluster.Watchdog
    extras: dict[str, Any]  # saved beside each state

    shown: ClassVar[tuple[str, ...]]  # metrics of the progress line
    inputs: ClassVar[tuple[str, ...]]  # what a step takes of a batch

    def advance(self, state, batch: dict[str, jax.Array], done: int):
        """The state after update `done`, counted from 1, and its scalars."""
        raise NotImplementedError

    def figures(self, state) -> dict[str, float]:
        """What is measured on held-out data."""
        raise NotImplementedError

    def draw(self, state, done: int) -> None:
        """Writes the pictures of a step."""
        raise NotImplementedError

    def close(self) -> None:
        """Waits for the save in progress, and closes the files."""
        self.writer.close()
        self.checkpoints.close()


def common_parts(config, workdir: epath.Path, mesh, program: Program) -> dict[str, Any]:
    """Fields of `Run` that every kind makes alike.

    Args:
        config: of the run.
        workdir: of the run.
        mesh: devices of the run.
        program: of the run, on that mesh.
    """
    total = total_steps(config)
    return {
        "config": config,
        "workdir": workdir,
        "total_steps": total,
        "mesh": mesh,
        "abstract": program.abstract,
        "create": program.create,
        "step": FittedStep(program.make_step, mesh, config.train.micro_batches),
        "frozen": program.frozen,
        "checkpoints": checkpoint.Checkpoints(
            workdir, config.save.keep, config.save.milestone_every
        ),
        "writer": metric_writer.MetricWriter(workdir, total, config.train.global_batch),
        "timer": metric_writer.StepTimer(),
        "watchdog": cluster.Watchdog(config.cluster.hang_minutes),
    }


def claim(workdir: epath.Path, config) -> None:
    """Writes what a run is and runs on, once all that its config names has been found.

    Raises:
        ConfigError: the workdir belongs to a run of another config.
    """
    begun = processes.from_first(lambda: _has_begun(workdir))
    checkpoint.check_workdir(workdir, config, begun)
    environment.write(workdir)


def _has_begun(workdir: epath.Path) -> bool:
    """Whether there is more than a run leaves that fails before its first step."""
    left = ("config.json", "environment.json", PLACEMENT, checkpoint.FOLDER)
    others = (path for path in workdir.glob("*") if path.name not in left)
    return any(others) or any((workdir / checkpoint.FOLDER).glob("*"))


def tell_placement(run: Run) -> None:
    """Where the arrays of the state lie: a line on the screen, `placement.txt` for each of them."""
    if run.mesh.size == 1 or not processes.is_first():
        return
    sizes = ", ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items())
    held = parallel.bytes_per_device(run.abstract) / 2**30
    lines = [f"mesh {sizes}: {held:.2f} GiB of the state on each of {run.mesh.size} devices"]
    print(f"{lines[0]}; {PLACEMENT}", flush=True)
    (run.workdir / PLACEMENT).write_text("\n".join([*lines, *parallel.placement(run.abstract), ""]))


def restore(run: Run) -> tuple[Any, int]:
    """The newest whole checkpoint or a first state, and the updates done.

    Raises:
        CheckpointError: all are damaged, or the newest is of another model or tokenizer.
    """
    step = run.checkpoints.latest()
    if step is None:
        if damaged := run.checkpoints.damaged():
            raise CheckpointError(
                f"no whole checkpoint is left in {run.checkpoints.root}, {', '.join(damaged)} are"
                " damaged: remove that folder to begin anew, or choose another --workdir"
            )
        run.writer.truncate_after(0)
        return run.create(), 0
    state, extras = run.checkpoints.restore(run.abstract, step)
    before, now = (one.get("tokenizer") for one in (extras, run.extras))
    if before and before != now:  # a converted prior may not know
        raise CheckpointError(
            f"{run.workdir} learned codes of tokenizer {before}, these are of {now}: name the same"
            " codes and tokenizer"
        )
    if extras["data"]["fingerprint"] != run.extras["data"]["fingerprint"]:
        logging.warning("the images are not those of the checkpoint: other names or another count")
    run.writer.truncate_after(step)
    if processes.is_first():
        print(f"resuming at step {step} of {run.total_steps}", flush=True)
    return state, step


def loop(
    run: Run, state, start: int, batches: AbstractContextManager, interrupts: Interrupts
) -> int:
    """Steps from `start` to the end or a signal; returns the updates done.

    Args:
        run: of any kind.
        state: after `start` updates.
        start: updates done.
        batches: gives an iterator of batches of numpy arrays, from that of update `start + 1` on.
        interrupts: what to stop for.
    """
    late, split = LateScalars(), parallel.split_batch(run.mesh)
    profile, done = Profile(run.config.profile, run.workdir), start
    with batches as stream, profile, run.watchdog:
        catch_up(run, state, start)
        for done in range(start + 1, run.total_steps + 1):
            with run.timer.measure("data"):
                given = next(stream)
                batch = {name: parallel.global_array(given[name], split) for name in run.inputs}
            profile.at(done)
            with run.timer.measure("compute"):
                state, scalars = run.advance(state, batch, done)
                ready = late.push(done, scalars)
            report_scalars(run, ready)
            stopping = interrupts.agreed()
            if is_due(run, done) or stopping:
                with run.timer.measure("compute"):
                    ready = late.pop()
                report_scalars(run, ready)
            record(run, state, done, stopping)
            run.watchdog.beat()
            if stopping:
                break
    return done


def is_due(run: Run, done: int) -> bool:
    """Whether something is kept of this step, which its metrics have to precede."""
    config = run.config
    periods = (config.save.every, config.eval.every, config.log.pictures_every)
    return done == run.total_steps or any(is_at(done, n) for n in periods)


def is_at(step: int, period: int) -> bool:
    """Whether what is done every `period` steps is done at this one; a period of 0 is never."""
    return bool(period) and step % period == 0


def report_scalars(run: Run, ready: tuple[int, dict[str, float]] | None) -> None:
    """Writes the metrics of a step when its turn has come."""
    if ready is None:
        return
    step, values = ready
    if is_at(step, run.config.log.every) or step in (1, run.total_steps):
        run.writer.write(step, values, "train")
        shown = {name: values[name] for name in run.shown if name in values}
        run.writer.progress(step, shown, run.timer)


def record(run: Run, state, done: int, stopping: bool) -> None:
    """A checkpoint, then held-out figures and pictures, each at its own steps.

    In this order: who takes the machine away does not wait for an evaluation. A run that resumes
    makes up for it, see `catch_up`.
    """
    last = done == run.total_steps
    if last or stopping or is_at(done, run.config.save.every):
        with run.timer.measure("save"):
            run.checkpoints.save(done, state, run.extras)
    if last or not stopping:
        show(run, state, done)


def catch_up(run: Run, state, done: int) -> None:
    """Figures and pictures of the step that a run resumes at, where it was stopped before them."""

    def owes() -> bool:
        rows = metric_writer.read(run.workdir)  # none of a run that branches off another one
        here = (name for row in rows if row["step"] == done for name in row)
        return bool(rows) and not any(name.startswith("eval/") for name in here)

    if processes.from_first(owes):
        show(run, state, done)


def show(run: Run, state, done: int) -> None:
    """Held-out figures and pictures, each at its own steps."""
    config, last = run.config, done == run.total_steps
    if last or is_at(done, config.eval.every):
        with run.timer.measure("evaluate"):
            run.writer.write(done, run.figures(state), "eval")
    if last or is_at(done, config.log.pictures_every):
        with run.timer.measure("evaluate"):
            run.draw(state, done)
            if processes.is_first():
                page.write(run.workdir)


def has_results(workdir: epath.Path, step: int) -> bool:
    """Whether the results of a run of that many steps are there already."""
    path = workdir / "results.json"
    return processes.from_first(lambda: path.exists() and files.read_json(path).get("step") == step)


def finish(run: Run, done: int, interrupts: Interrupts) -> None:
    """Waits for the last save; writes the page, and the results of a run that is complete."""
    with run.timer.measure("save"):
        run.checkpoints.wait()
    if processes.is_first():
        write_results(run, done)
    if done < run.total_steps:
        if processes.is_first():
            print(f"stopped at step {done} of {run.total_steps}; the same command resumes")
        raise SystemExit(128 + interrupts.received)


def write_results(run: Run, done: int) -> None:
    """The page, and the results of a run that is complete."""
    seconds, shares = run.timer.total()
    share = shares.get("compute", 0.0)
    if done >= run.total_steps:
        rows = [row for row in metric_writer.read(run.workdir) if row["step"] == done]
        figures = {name: row[name] for row in rows for name in row if name.startswith("eval/")}
        results = {name.removeprefix("eval/"): value for name, value in figures.items()}
        results |= {"step": done, "seconds": seconds, "useful_share": share}
        files.write_json(run.workdir / "results.json", results)
    written = page.write(run.workdir)
    print(f"{share:.0%} of {metric_writer.duration(seconds)} spent computing; page: {written}")


class LateScalars:
    """Metrics of each step, fetched while the next one runs, and refused when not finite."""

    def __init__(self):
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def push(self, step: int, scalars: Mapping[str, jax.Array]):
        """Takes the arrays of a step that was started; gives the step before it, or None."""
        ready, self._pending = self.pop(), (step, scalars)
        return ready

    def pop(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the last step: its number and its finite values.

        Raises:
            NonFiniteError: a value is not a number or infinite; the first such name is told.
        """
        if self._pending is None:
            return None
        (step, scalars), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        check_finite(step, values)
        return step, values


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises NonFiniteError for the first value that is not finite, single terms before sums."""
    sums = ("loss", "gradient_norm", "discriminator_loss", "discriminator_gradient_norm")
    for name in sorted(values, key=lambda name: name in sums):
        if not np.isfinite(values[name]):
            raise NonFiniteError(
                f"step {step}: {name} is {values[name]}; the last checkpoint is from before."
                " Lower optim.learning_rate or optim.clip, or look at the images of this step"
            )


class Profile:
    """A trace of the steps that `config.profile` names as "start:count"."""

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
        """Starts or ends the trace before the step that is about to run."""
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
