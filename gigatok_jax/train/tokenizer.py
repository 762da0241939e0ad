"""Training of a tokenizer: from a config and a workdir to a checkpoint and a page.

The same command again resumes the run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import parallel
from gigatok_jax.data import pipeline, sources
from gigatok_jax.evaluation import reconstruction
from gigatok_jax.models import geometry, tokenizer
from gigatok_jax.run import pictures, processes, signals
from gigatok_jax.train import loop, networks, objective, optim, settings, tokenizer_step
from gigatok_jax.train import program as program_lib

SHOWN = ("loss", "reconstruction", "perceptual", "alignment", "adversarial", "codebook_usage")


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Trains the tokenizer of a config; writes checkpoints, metrics, pictures, results and a page.

    Args:
        config: of a run that trains a tokenizer, see `configs/common.py`.
        workdir: folder of the run; a run whose folder holds a checkpoint is resumed.

    Raises:
        GigatokError: whatever the user can change: config, data, weights, disk, a checkpoint.
        SystemExit: after a signal, once the state is saved; status 128 + the signal's number.
    """
    settings.check(config)
    source = sources.make_source(config.data, "train", config.model.image_size)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
    parts = networks.build(config, statistics_groups(config, mesh))
    trained = config.copy_and_resolve_references()
    trained.loss = parts.loss  # without the losses that are left out
    program = make_program(trained, mesh, parts)
    held_out = HeldOut(trained, parts, program.frozen, mesh)
    extras = {"config": trained.to_dict(), "data": {"fingerprint": sources.fingerprint(source)}}
    with loop.open_run(config, workdir, program, held_out, extras, shown=SHOWN) as run:
        batches = pipeline.train_batches(
            config.data, source, config.model.image_size, config.train.global_batch,
            config.seed, run.done, *parallel.share(mesh)[:2],
        )  # fmt: skip
        for images in run.batches(batches):
            phase = objective.phase_at(run.done - 1, trained.loss, config.codebook)
            with run.timer.measure("compute"):
                run.state, scalars = program(run.state, images, phase)
            run.after(scalars)


def make_program(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, parts: networks.Parts
) -> program_lib.Program:
    """Makes the program of a tokenizer's training step on a mesh; nothing is computed yet.

    Args:
        config: of the run, with the losses of `parts`.
        mesh: devices of the run.
        parts: networks of the run, and parameters of the frozen networks or their shapes.
    """
    optimizers, size = make_optimizers(config), config.model.image_size
    groups = statistics_groups(config, mesh)

    def create():
        state = tokenizer_step.create(parts.networks, optimizers, size, config.seed)
        if config.train.first_weights == "published":
            return state
        params = geometry.first_weights(state.params, config.model)
        return state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))

    def make_step(micro_batches, shardings):
        return tokenizer_step.make(
            parts.networks, optimizers, config, groups, micro_batches, shardings
        )

    images = jax.ShapeDtypeStruct((config.train.global_batch, size, size, 3), np.uint8)
    last = objective.phase_at(settings.total_steps(config) - 1, config.loss, config.codebook)
    return program_lib.make(
        config, mesh, create, make_step, frozen=parts.frozen, batch=images, phase=(last,)
    )


def statistics_groups(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Returns the number of groups of a batch that have batch statistics of their own.

    With `train.statistics="local"` each part of the batch on a device is a group, as in the
    original; otherwise the whole batch is one group.
    """
    return parallel.batch_shards(mesh) if config.train.statistics == "local" else 1


def make_optimizers(config: ml_collections.ConfigDict) -> tokenizer_step.Optimizers:
    """Makes the optimizers and learning-rate schedules of tokenizer and discriminator."""
    total, epoch = settings.total_steps(config), settings.steps_per_epoch(config)
    discriminator = config.optim.copy_and_resolve_references()
    discriminator.decay_mask = "all"  # the mask is the generator's
    rate = functools.partial(optim.learning_rate, config.optim, total, epoch)
    return tokenizer_step.Optimizers(
        generator=optim.make_optimizer(config.optim, is_decayed),
        discriminator=optim.make_optimizer(discriminator),
        rate=rate(),
        discriminator_rate=rate(
            base=config.optim.discriminator_learning_rate,
            first_step=max(config.loss.discriminator_start - 1, 0),
        ),
    )


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a tokenizer's parameter, if `optim.decay_mask` is "no_norm".

    The original's trainer for the largest model spares parameters whose name contains "norm"; its
    transformers call the norms at both ends `ln_pre` and `ln_post`, so weight decay applies to
    both.
    """
    part, _, rest = path.partition("/")
    ends = part in ("encoder", "decoder") and rest.startswith(("norm_in/", "norm_out/"))
    return ends or "norm" not in path


class HeldOut:
    """Evaluator of a tokenizer during training: reconstructs held-out images with the EMA copy."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        parts: networks.Parts,
        frozen: dict[str, Any],
        mesh: jax.sharding.Mesh,
    ):
        """Opens the held-out images of a run and makes the program that reconstructs them.

        Args:
            config: of the run.
            parts: modules of the run; the tokenizer reconstructs, LPIPS compares.
            frozen: network -> parameters on the devices; "lpips" may be missing.
            mesh: devices of the run.
        """
        module = tokenizer.make(config.model, parts.networks.tokenizer.dtype)
        self._split, self._share = parallel.split_batch(mesh), parallel.share(mesh)
        self._program = reconstruction.make_reconstruct(module, parts.networks.lpips, self._split)
        shards = parallel.batch_shards(mesh)
        self._batch = -(-config.eval.batch // shards) * shards
        self._lpips = frozen.get("lpips")
        self._config, self._report = config, pipeline.Report()
        self._source = sources.make_source(config.data, "held_out", config.model.image_size)

    def figures(
        self, state: tokenizer_step.TokenizerState, watchdog: signals.Watchdog
    ) -> dict[str, float]:
        """Computes PSNR, SSIM, LPIPS, codebook usage and perplexity over all held-out images."""
        params, size = parallel.to_device(state.ema_params), self._config.model.codebook_size
        with self._batches() as batches:
            own = (self._counted(batch) for batch in watchdog.hears(batches))
            return reconstruction.evaluate(lambda x: self._reconstruct(params, x), own, size)

    def pictures(self, state: tokenizer_step.TokenizerState) -> dict[str, np.ndarray]:
        """Draws held-out images above their reconstructions, and the use of each codebook row."""
        codes = processes.whole(state.codebook_used).astype(np.int64)
        counts = np.bincount(codes, minlength=self._config.model.codebook_size)
        return {
            "reconstruction": self._compare(parallel.to_device(state.ema_params)),
            "codebook_usage": pictures.codebook_usage(counts),
        }

    def _compare(self, params: Any) -> np.ndarray:
        """Draws a picture uint8[h w 3] of a few held-out images above their reconstructions."""
        with self._batches() as batches:
            batch = self._counted(next(batches))
        shown = np.flatnonzero(batch["mask"])[: reconstruction.SHOWN]
        reconstructed = self._reconstruct(params, batch["image"])
        images, rebuilt = (
            processes.gather_rows(rows[shown])[: reconstruction.SHOWN]
            for rows in (batch["image"], reconstructed.images)
        )
        return reconstruction.compare(images, reconstructed._replace(images=rebuilt))

    def _reconstruct(self, params: Any, images: np.ndarray) -> reconstruction.Reconstructed:
        """Reconstructs this process's images; all processes run the program together."""
        placed = parallel.global_array(images, self._split)
        return jax.tree.map(parallel.local_rows, self._program(params, placed, self._lpips))

    def _counted(self, batch: dict) -> dict:
        """Returns a batch with its mask False also for images that another process counts."""
        return batch | {"mask": batch["mask"] & self._share.first}

    def _batches(self) -> pipeline.Batches:
        size, share = self._config.model.image_size, self._share[:2]
        most = self._config.data.max_unreadable
        return pipeline.eval_batches(self._source, size, self._batch, *share, most, self._report)
