"""Training of a tokenizer: from a config and a workdir to a checkpoint and a page.

The same command again resumes.
"""

import contextlib
import dataclasses

import jax
import numpy as np
from etils import epath

from gigatok_jax import parallel
from gigatok_jax.data import pipeline, sources
from gigatok_jax.errors import ConfigError
from gigatok_jax.evaluation import reconstruction
from gigatok_jax.model_config import validate
from gigatok_jax.models import tokenizer
from gigatok_jax.run import cluster, pictures, processes
from gigatok_jax.run.signals import Interrupts
from gigatok_jax.train import networks as networks_lib
from gigatok_jax.train import objective, optim
from gigatok_jax.train import program as program_lib
from gigatok_jax.train import state as state_lib
from gigatok_jax.train import tokenizer_step as step_lib
from gigatok_jax.train.loop import (
    Run,
    claim,
    common_parts,
    finish,
    has_results,
    loop,
    restore,
    tell_placement,
)
from gigatok_jax.train.settings import check_values, steps_per_epoch, total_steps

SHOWN = ("loss", "reconstruction", "perceptual", "alignment", "adversarial", "codebook_usage")


@dataclasses.dataclass
class TokenizerRun(Run):
    """A run that trains a tokenizer."""

    held_out: "HeldOut"

    shown = SHOWN
    inputs = ("image",)

    def advance(self, state, batch, done):
        phase = objective.phase_at(done - 1, self.config.loss, self.config.codebook)
        return self.step(state, batch["image"], self.frozen, phase)

    def figures(self, state):
        return self.held_out.figures(parallel.to_device(state.ema_params), self.watchdog)

    def draw(self, state, done):
        """Pictures of held-out reconstructions and of the codebook's use."""
        codes = processes.whole(state.codebook_used).astype(np.int64)
        counts = np.bincount(codes, minlength=self.config.model.codebook_size)
        made = {
            "reconstruction": self.held_out.picture(parallel.to_device(state.ema_params)),
            "codebook_usage": pictures.codebook_usage(counts),
        }
        for name, picture in made.items() if processes.is_first() else ():
            pictures.save(self.workdir, name, done, picture)
            self.writer.picture(done, name, picture)


def train(config, workdir: epath.PathLike) -> None:
    """Trains `config.model` and leaves checkpoints, metrics, pictures, results and a page.

    Args:
        config: of a run that trains a tokenizer, see `configs/common.py`.
        workdir: folder of the run; one that holds a checkpoint is resumed.

    Raises:
        GigatokError: whatever the user can change: config, data, weights, disk, a checkpoint.
        SystemExit: after a signal, once the state is saved; status 128 + the signal's number.
    """
    validate(config.model)
    check_values(config)
    source = sources.make_source(config.data, "train", config.model.image_size)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
    run = make_run(config, epath.Path(workdir), mesh, sources.fingerprint(source))
    with contextlib.closing(run), Interrupts() as interrupts:
        claim(run.workdir, config)
        tell_placement(run)
        state, done = restore(run)
        if done < run.total_steps or not has_results(run.workdir, done):
            batches = pipeline.train_batches(
                config.data, source, config.model.image_size, config.train.global_batch,
                config.seed, done, *parallel.share(mesh)[:2],
            )  # fmt: skip
            finish(run, loop(run, state, done, batches, interrupts), interrupts)


def make_run(config, workdir: epath.Path, mesh, fingerprint: str) -> TokenizerRun:
    """Puts a run together; nothing is computed yet. `fingerprint` is of its images."""
    parts = networks_lib.build(config, statistics_groups(config, mesh))
    config = config.copy_and_resolve_references()
    config.loss = parts.loss  # without what was left out
    program = make_program(config, mesh, parts)
    return TokenizerRun(
        **common_parts(config, workdir, mesh, program),
        extras={"config": config.to_dict(), "data": {"fingerprint": fingerprint}},
        held_out=HeldOut(config, parts, program.frozen, mesh),
    )


def make_program(config, mesh, parts: networks_lib.Parts) -> program_lib.Program:
    """The training step of a config on a mesh.

    Args:
        config: of the run, with the losses of `parts`.
        mesh: devices of the run.
        parts: networks, and the frozen ones' parameters or shapes.
    """
    optimizers, size = make_optimizers(config), config.model.image_size
    groups = statistics_groups(config, mesh)

    def create():
        return state_lib.create(parts.networks, optimizers, size, config.seed)

    def make_step(micro_batches, place):
        return step_lib.make(parts.networks, optimizers, config, groups, micro_batches, place)

    images = jax.ShapeDtypeStruct((config.train.global_batch, size, size, 3), np.uint8)
    last = objective.phase_at(total_steps(config) - 1, config.loss, config.codebook)
    return program_lib.make(
        config, mesh, create, make_step, frozen=parts.frozen, batch=images, phase=(last,)
    )


def statistics_groups(config, mesh) -> int:
    """Parts of a batch with batch statistics of their own."""
    return parallel.batch_shards(mesh) if statistics_are_local(config) else 1


def statistics_are_local(config) -> bool:
    """Whether batch statistics stay on each device, as the original's do."""
    if config.train.statistics not in ("global", "local"):
        raise ConfigError(
            f"train.statistics is {config.train.statistics!r}, expected 'global' or 'local'"
        )
    return config.train.statistics == "local"


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

    def __init__(self, config, parts: networks_lib.Parts, frozen, mesh):
        module = tokenizer.make(config.model, parts.networks.tokenizer.dtype)
        self._split, self._share = parallel.split_batch(mesh), parallel.share(mesh)
        self._reconstruct = reconstruction.make_reconstruct(
            module, parts.networks.lpips, self._split
        )
        shards = parallel.batch_shards(mesh)
        self._batch = -(-config.eval.batch // shards) * shards
        self._lpips = frozen.get("lpips")
        self._config, self._report = config, pipeline.Report()
        self._source = sources.make_source(config.data, "held_out", config.model.image_size)

    def figures(self, params, watchdog: cluster.Watchdog) -> dict[str, float]:
        """PSNR, SSIM, LPIPS, codebook usage and perplexity over all held-out images."""
        size = self._config.model.codebook_size
        with self._batches() as batches:
            own = (self._counted(batch) for batch in watchdog.hears(batches))
            return reconstruction.evaluate(lambda x: self._run(params, x), own, size)

    def picture(self, params) -> np.ndarray:
        """Originals over reconstructions, uint8[H W 3]."""
        with self._batches() as batches:
            batch = self._counted(next(batches))
        shown = np.flatnonzero(batch["mask"])[: reconstruction.SHOWN]
        made = self._run(params, batch["image"])
        images, rebuilt = (
            processes.gather_rows(rows[shown])[: reconstruction.SHOWN]
            for rows in (batch["image"], made.images)
        )
        return reconstruction.compare(images, made._replace(images=rebuilt))

    def _run(self, params, images) -> reconstruction.Reconstructed:
        """Of this process's images, on the host; all processes go through the program together."""
        placed = parallel.global_array(images, self._split)
        return jax.tree.map(parallel.local_rows, self._reconstruct(params, placed, self._lpips))

    def _counted(self, batch: dict) -> dict:
        """Without the images that another process counts."""
        return batch | {"mask": batch["mask"] & self._share.first}

    def _batches(self) -> pipeline.Batches:
        size, own = self._config.model.image_size, self._share[:2]
        most = self._config.data.max_unreadable
        return pipeline.eval_batches(self._source, size, self._batch, *own, most, self._report)
