"""Training of a tokenizer: from a config and a workdir to a checkpoint and a page.

The loop is `train`; what it carries is `Run`. The same command again resumes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from gigatok_jax import checkpoint, environment, files, metric_writer, parallel, pictures, report
from gigatok_jax.data import pipeline, sources
from gigatok_jax.errors import ConfigError
from gigatok_jax.evaluation import reconstruction
from gigatok_jax.model_config import validate
from gigatok_jax.models import tokenizer
from gigatok_jax.train import networks as networks_lib
from gigatok_jax.train import objective, optim
from gigatok_jax.train import state as state_lib
from gigatok_jax.train import step as step_lib
from gigatok_jax.train.fit import FittedStep
from gigatok_jax.train.loop import Interrupts, LateScalars

SHOWN = ("loss", "reconstruction", "perceptual", "alignment", "adversarial", "codebook_usage")


@dataclasses.dataclass
class Run:
    """Everything that one training run holds on to."""

    config: Any
    workdir: epath.Path
    total_steps: int
    mesh: jax.sharding.Mesh
    parts: networks_lib.Parts
    frozen: Any  # on the devices
    abstract: Any  # shapes and shardings of the state
    create: Callable  # makes the first state in place
    step: Callable
    held_out: "HeldOut"
    checkpoints: checkpoint.Checkpoints
    writer: metric_writer.MetricWriter
    timer: metric_writer.StepTimer


def train(config, workdir: epath.PathLike) -> None:
    """Trains `config.model` and leaves checkpoints, metrics, pictures, results and a page.

    Args:
        config: of a run that trains a tokenizer, see `configs/common.py`.
        workdir: folder of the run; one that holds a checkpoint is resumed.

    Raises:
        GigatokError: whatever the user can change: config, data, weights, disk, a checkpoint.
        SystemExit: after a signal, once the state is saved; status 128 + the signal's number.
    """
    source = sources.make_source(config.data, "train", config.model.image_size)
    with open_run(config, epath.Path(workdir)) as run, Interrupts() as interrupts:
        fingerprint = sources.fingerprint(source)
        state, done = restore(run, fingerprint)
        if done < run.total_steps or not has_results(run.workdir, done):
            done = loop(run, state, done, source, fingerprint, interrupts)
            finish(run, done, interrupts)


@contextlib.contextmanager
def open_run(config, workdir: epath.Path) -> Iterator[Run]:
    """Networks, step, files and devices of a config; closes what has to be closed."""
    validate(config.model)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
    checkpoint.check_workdir(workdir, config)
    environment.write(workdir)
    run = make_run(config, workdir, mesh)
    try:
        yield run
    finally:
        run.writer.close()
        run.checkpoints.close()


def make_run(config, workdir: epath.Path, mesh) -> Run:
    """Puts a run together; nothing is computed yet."""
    groups = parallel.batch_shards(mesh) if statistics_are_local(config) else 1
    parts = networks_lib.build(config, groups)
    optimizers = make_optimizers(config)
    local = config.copy_and_resolve_references()
    local.loss = parts.loss
    size, same = config.model.image_size, parallel.replicated(mesh)

    def create():
        return state_lib.create(parts.networks, optimizers, size, config.seed)

    frozen = jax.device_put(parts.frozen, same)

    def make_step(micro_batches):
        return step_lib.make(parts.networks, optimizers, local, groups, micro_batches, same)

    shapes = jax.eval_shape(create)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=same), shapes)
    return Run(
        config=local,
        workdir=workdir,
        total_steps=total_steps(config),
        mesh=mesh,
        parts=parts,
        frozen=frozen,
        abstract=abstract,
        create=jax.jit(create, out_shardings=same),
        step=FittedStep(make_step, mesh, config.train.micro_batches),
        held_out=HeldOut(local, parts, frozen),
        checkpoints=checkpoint.Checkpoints(workdir, config.save.keep, config.save.milestone_every),
        writer=metric_writer.MetricWriter(workdir, total_steps(config), config.train.global_batch),
        timer=metric_writer.StepTimer(),
    )


def statistics_are_local(config) -> bool:
    """Whether batch statistics stay on each device, as the original's do."""
    if config.train.statistics not in ("global", "local"):
        raise ConfigError(
            f"train.statistics is {config.train.statistics!r}, expected 'global' or 'local'"
        )
    return config.train.statistics == "local"


def total_steps(config) -> int:
    """Updates of the whole run: `train.steps`, or else `train.epochs` worth of them."""
    return config.train.steps or round(config.train.epochs * steps_per_epoch(config))


def steps_per_epoch(config) -> float:
    """An epoch is `train.epoch_images` images whatever the data holds."""
    return config.train.epoch_images / config.train.global_batch


def make_optimizers(config) -> state_lib.Optimizers:
    """Optimizers and learning rates of both networks."""
    total, epoch = total_steps(config), steps_per_epoch(config)
    everything = config.optim.copy_and_resolve_references()
    everything.decay_mask = "all"  # the mask is the generator's
    return state_lib.Optimizers(
        optim.make_optimizer(config.optim, is_decayed),
        optim.make_optimizer(everything),
        optim.learning_rate(config.optim, total, epoch),
        optim.learning_rate(
            config.optim,
            total,
            epoch,
            base=config.optim.discriminator_learning_rate,
            first_step=max(config.loss.discriminator_start - 1, 0),
        ),
    )


def is_decayed(path: str) -> bool:
    """Whether weight decay applies under `optim.decay_mask="no_norm"`.

    The original's trainer for the largest model spares parameters whose name contains "norm"; its
    transformers call the norms at both ends `ln_pre` and `ln_post`, so those decay.
    """
    part, _, rest = path.partition("/")
    ends = part in ("encoder", "decoder") and rest.startswith(("norm_in/", "norm_out/"))
    return ends or "norm" not in path


class HeldOut:
    """Reconstructs held-out images with the EMA copy, by the functions of `reconstruct`."""

    def __init__(self, config, parts: networks_lib.Parts, frozen):
        module = tokenizer.make(config.model, parts.networks.tokenizer.dtype)
        self._reconstruct = reconstruction.make_reconstruct(module, parts.networks.lpips)
        self._lpips = frozen.get("lpips")
        self._config, self._report = config, pipeline.Report()
        self._source = sources.make_source(config.data, "held_out", config.model.image_size)

    def figures(self, params) -> dict[str, float]:
        """PSNR, SSIM, LPIPS, codebook usage and perplexity over all held-out images."""
        size = self._config.model.codebook_size
        with self._batches() as batches:
            return reconstruction.evaluate(lambda x: self._run(params, x), batches, size)

    def picture(self, params) -> np.ndarray:
        """Originals over reconstructions, uint8[H W 3]."""
        with self._batches() as batches:
            batch = next(batches)
        shown = np.flatnonzero(batch["mask"])[: reconstruction.SHOWN]
        made = jax.device_get(self._run(params, batch["image"]))
        return reconstruction.compare(
            batch["image"][shown], made._replace(images=made.images[shown])
        )

    def _run(self, params, images) -> reconstruction.Reconstructed:
        return self._reconstruct(params, images, self._lpips)

    def _batches(self) -> pipeline.Batches:
        size, batch = self._config.model.image_size, self._config.eval.batch
        return pipeline.eval_batches(self._source, size, batch, report=self._report)


def restore(run: Run, fingerprint: str) -> tuple[state_lib.TokenizerState, int]:
    """The newest whole checkpoint or a first state, and the updates done."""
    step = run.checkpoints.latest()
    if step is None:
        run.writer.truncate_after(0)
        return run.create(), 0
    state, extras = run.checkpoints.restore(run.abstract, step)
    if extras["data"]["fingerprint"] != fingerprint:
        logging.warning("the images are not those of the checkpoint: other names or another count")
    run.writer.truncate_after(step)
    print(f"resuming at step {step} of {run.total_steps}", flush=True)
    return state, step


def loop(run: Run, state, start: int, source, fingerprint: str, interrupts: Interrupts) -> int:
    """Steps from `start` to the end or a signal; returns the updates done."""
    config, late, images = run.config, LateScalars(), parallel.split_batch(run.mesh)
    profile, done = Profile(config.profile, run.workdir), start
    batches = pipeline.train_batches(
        config.data, source, config.model.image_size, config.train.global_batch, config.seed,
        start, jax.process_index(), jax.process_count(),
    )  # fmt: skip
    with batches, profile:
        for done in range(start + 1, run.total_steps + 1):
            with run.timer.measure("data"):
                batch = parallel.global_array(next(batches)["image"], images)
            profile.at(done)
            with run.timer.measure("compute"):
                phase = objective.phase_at(done - 1, config.loss, config.codebook)
                state, scalars = run.step(state, batch, run.frozen, phase)
                ready = late.push(done, scalars)
            report_scalars(run, ready)
            if is_due(run, done) or interrupts.received:
                with run.timer.measure("compute"):
                    ready = late.pop()
                report_scalars(run, ready)
            record(run, state, done, fingerprint, bool(interrupts.received))
            if interrupts.received:
                break
    return done


def is_due(run: Run, done: int) -> bool:
    """Whether something is kept of this step, which its metrics have to precede."""
    config = run.config
    periods = (config.save.every, config.eval.every, config.log.pictures_every)
    return done == run.total_steps or any(n and done % n == 0 for n in periods)


def report_scalars(run: Run, ready: tuple[int, dict[str, float]] | None) -> None:
    """Writes the metrics of a step when its turn has come."""
    if ready is None:
        return
    step, values = ready
    if step % run.config.log.every == 0 or step in (1, run.total_steps):
        run.writer.write(step, values, "train")
        shown = {name: values[name] for name in SHOWN if name in values}
        run.writer.progress(step, shown, run.timer)


def record(run: Run, state, done: int, fingerprint: str, stopping: bool) -> None:
    """Held-out figures, pictures and a checkpoint, each at its own steps."""
    config, last = run.config, done == run.total_steps
    if last or (config.eval.every and done % config.eval.every == 0):
        with run.timer.measure("evaluate"):
            run.writer.write(done, run.held_out.figures(state.ema_params), "eval")
    if last or (config.log.pictures_every and done % config.log.pictures_every == 0):
        with run.timer.measure("evaluate"):
            draw(run, state, done)
    if last or stopping or (config.save.every and done % config.save.every == 0):
        with run.timer.measure("save"):
            extras = {"config": config.to_dict(), "data": {"fingerprint": fingerprint}}
            run.checkpoints.save(done, state, extras)


def draw(run: Run, state, done: int) -> None:
    """Pictures of held-out reconstructions and of the codebook's use, and the page so far."""
    codes = np.asarray(state.codebook_used).astype(np.int64)
    counts = np.bincount(codes, minlength=run.config.model.codebook_size)
    made = {
        "reconstruction": run.held_out.picture(state.ema_params),
        "codebook_usage": pictures.codebook_usage(counts),
    }
    for name, picture in made.items():
        pictures.save(run.workdir, name, done, picture)
        run.writer.picture(done, name, picture)
    report.write(run.workdir)


def has_results(workdir: epath.Path, step: int) -> bool:
    """Whether the results of a run of that many steps are there already."""
    path = workdir / "results.json"
    return path.exists() and files.read_json(path).get("step") == step


def finish(run: Run, done: int, interrupts: Interrupts) -> None:
    """Waits for the last save; writes the page, and the results of a run that is complete."""
    with run.timer.measure("save"):
        run.checkpoints.wait()
    seconds, shares = run.timer.total()
    share = shares.get("compute", 0.0)
    if done >= run.total_steps:
        rows = [row for row in metric_writer.read(run.workdir) if row["step"] == done]
        figures = {name: row[name] for row in rows for name in row if name.startswith("eval/")}
        results = {name.removeprefix("eval/"): value for name, value in figures.items()}
        results |= {"step": done, "seconds": seconds, "useful_share": share}
        files.write_json(run.workdir / "results.json", results)
    page = report.write(run.workdir)
    print(f"{share:.0%} of {metric_writer.duration(seconds)} spent computing; page: {page}")
    if done < run.total_steps:
        print(f"stopped at step {done} of {run.total_steps}; the same command resumes", flush=True)
        raise SystemExit(128 + interrupts.received)


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
