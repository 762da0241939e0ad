"""Training of a prior: from a config and a workdir to a checkpoint and a page.

It learns codes that were extracted before, or makes them of images in the same step, with a frozen
tokenizer. The same command again resumes.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import files, library, parallel, sampling
from gigatok_jax.data import codes as codes_lib
from gigatok_jax.data import pipeline, sources
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.evaluation import metrics, prior_loss
from gigatok_jax.model_config import model_config, validate
from gigatok_jax.models import ar
from gigatok_jax.models import tokenizer as tokenizer_lib
from gigatok_jax.run import checkpoint, cluster, pictures, processes
from gigatok_jax.run.signals import Interrupts
from gigatok_jax.train import ar_step, optim
from gigatok_jax.train import program as program_lib
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
from gigatok_jax.train.settings import check_values, make_loop, steps_per_epoch, total_steps

DTYPES = ("bfloat16", "float32")
UNTRAINED = "untrained"  # in the place of a tokenizer's checkpoint
GUIDANCE = ("cfg_scale", "cfg_schedule", "cfg_start", "cfg_end", "cfg_interval")
SAMPLING = (*GUIDANCE, "temperature", "top_k", "top_p")  # of `config.sample` and `Prior.generate`
COOLDOWN = "cooldown.json"  # where a cool-down branched off


class Data:
    """What a run learns from and is measured on: codes, or images.

    Attributes:
        source, held_out: of `data.codes` or `data.sources`.
        inputs: what a training step takes of a batch.
        fingerprint: of what is trained on.
        codes: header of the codes; None for images.
    """

    def __init__(self, config, tokenizer: library.Tokenizer | None, share: parallel.Share):
        self.codes = None
        if config.codes:
            self.source, self.held_out = codes_lib.open_codes(
                config.codes, config.eval_codes, config.data.eval_images
            )
            self.inputs, self.codes = ("codes", "label"), self.source.header
            self.fingerprint = self.source.fingerprint
        else:
            size = tokenizer.image_size
            self.source, self.held_out = (
                sources.make_source(config.data, split, size) for split in ("train", "held_out")
            )
            self.inputs, self.fingerprint = ("image", "label"), sources.fingerprint(self.source)
        self._config, self._tokenizer, self._share = config, tokenizer, share

    def train_batches(self, start: int) -> contextlib.AbstractContextManager:
        """Batches from that of update `start + 1` on."""
        config = self._config
        rest = (config.train.global_batch, config.seed, start, *self._share[:2])
        if self.codes:
            return contextlib.closing(codes_lib.train_batches(self.source, *rest))
        return pipeline.train_batches(config.data, self.source, self._tokenizer.image_size, *rest)

    def held_out_codes(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches "codes" int[b n], "label" and "mask" of every held-out image, once."""
        batch, most = self._config.eval.batch, self._config.data.max_unreadable
        if self.codes:
            return codes_lib.eval_batches(self.held_out, batch)
        return prior_loss.image_codes(self.held_out, self._tokenizer, batch, most)


@dataclasses.dataclass
class PriorRun(Run):
    """A run that trains a prior."""

    held_out: "HeldOut"
    tokenizer: library.Tokenizer | None
    inputs: tuple[str, ...]

    shown = ("loss", "gradient_norm")

    def advance(self, state, batch, done):
        return self.step(state, batch, self.frozen)

    def figures(self, state):
        return self.held_out.figures(state, self.watchdog)

    def draw(self, state, done):
        """Samples of a few classes, a row for each; none without a tokenizer."""
        if self.tokenizer is None:
            return
        picture = sample(self.config, state.params, self.tokenizer)
        if processes.is_first():
            pictures.save(self.workdir, "samples", done, picture)
            self.writer.picture(done, "samples", picture)


def train(config, workdir: epath.PathLike) -> None:
    """Trains `config.model` and leaves checkpoints, metrics, pictures, results and a page.

    Args:
        config: of a run that trains a prior, see `configs/common.py`.
        workdir: folder of the run; one that holds a checkpoint is resumed.

    Raises:
        GigatokError: whatever the user can change: config, codes, data, disk, a checkpoint.
        SystemExit: after a signal, once the state is saved; status 128 + the signal's number.
    """
    workdir = epath.Path(workdir)
    check_config(config)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
    prior_loss.check_batch(config.eval.batch, mesh)
    tokenizer = load_tokenizer(config, mesh)
    data = Data(config, tokenizer, parallel.share(mesh))
    extras = check_data(config, data, tokenizer)
    branch = find_branch(config, workdir, extras["tokenizer"])
    extras["decay_from"] = branch and branch["step"]
    run = make_run(config, workdir, mesh, tokenizer, data, extras)
    with contextlib.closing(run), Interrupts() as interrupts:
        claim(run.workdir, config)
        tell_placement(run)
        state, done = begin(run, branch)
        if done < run.total_steps or not has_results(run.workdir, done):
            batches = data.train_batches(done)
            finish(run, loop(run, state, done, batches, interrupts), interrupts)


def check_config(config) -> None:
    """Refuses values that cannot work, before anything is loaded."""
    validate(config.model)
    check_values(config)
    make_loop(config.train)
    if config.train.dtype not in DTYPES:
        raise ConfigError(
            f"train.dtype is {config.train.dtype!r}, expected one of {', '.join(DTYPES)}"
        )
    for name in ("dropout", "token_dropout", "class_dropout", "drop_path"):
        if not 0 <= config.train[name] < 1:
            raise ConfigError(f"train.{name} is {config.train[name]}, expected 0 to below 1")
    check_sample(config.sample)
    if not config.codes and not config.tokenizer:
        raise ConfigError(
            "nothing to learn from: name codes with --config.codes=DIR, or a tokenizer that makes"
            " them of images with --config.tokenizer=DIR"
        )


def check_sample(settings) -> None:
    """Refuses settings that no picture can be drawn with, hours before it would be."""
    for name in ("classes", "images"):
        if settings[name] < 1:
            raise ConfigError(f"sample.{name} is {settings[name]}, expected at least 1")
    sampling.weights(2, *(settings[name] for name in GUIDANCE))
    sampling.make_draw(settings.temperature, settings.top_k, settings.top_p)


def load_tokenizer(config, mesh) -> library.Tokenizer | None:
    """The frozen tokenizer, in float32 as the original runs it; None when only codes are given."""
    if config.tokenizer == UNTRAINED:
        return None if config.codes else untrained(config.model, mesh)
    if config.tokenizer:
        return library.load_tokenizer(config.tokenizer, sharding=parallel.replicated(mesh))
    print("no tokenizer is named: no pictures of samples; --config.tokenizer=DIR draws them")
    return None


def untrained(model, mesh) -> library.Tokenizer:
    """A small tokenizer with random weights, to see whether everything fits together."""
    print("the tokenizer is untrained, its codes mean nothing: this run only tries the machinery")
    small = {"image_size": 32, "stem": "patch", "patch_size": 2, "align_block": 0}
    small |= {"encoder": "pico", "decoder": "pico"}
    made = model_config("S-S", latent_tokens=model.tokens, codebook_size=model.vocab, **small)
    images = np.zeros((1, made.image_size, made.image_size, 3), np.float32)
    create = jax.jit(tokenizer_lib.make(made).init, out_shardings=parallel.replicated(mesh))
    return library.Tokenizer(create(jax.random.key(0), images)["params"], made)


def check_data(config, data: Data, tokenizer: library.Tokenizer | None) -> dict[str, Any]:
    """Refuses codes and images that the model or the tokenizer does not fit.

    Returns:
        What is saved beside each state: config, fingerprints, names of the classes.

    Raises:
        ConfigError: numbers in the model to change.
        DataError: codes of another tokenizer, images without a class, or other held-out classes.
    """
    if tokenizer and data.codes and data.codes.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{config.codes} holds codes of tokenizer {data.codes.tokenizer}, {config.tokenizer} is"
            f" {tokenizer.fingerprint}: extract its codes, or name the tokenizer they are of"
        )
    vocab = data.codes.vocab if data.codes else tokenizer.config.codebook_size
    tokens = data.codes.tokens if data.codes else tokenizer.num_tokens
    for name, given in {"vocab": vocab, "tokens": tokens}.items():
        if config.model[name] != given:
            raise ConfigError(
                f"model.{name} is {config.model[name]}, the codes have {given}: set"
                f" --config.model.{name}={given}"
            )
    check_labels(config.model.classes, data)
    return {
        "config": config.to_dict(),
        "data": {"fingerprint": data.fingerprint},
        "tokenizer": data.codes.tokenizer if data.codes else tokenizer.fingerprint,
        "class_names": list(data.source.class_names),
    }


def check_labels(classes: int, data: Data) -> None:
    """Refuses images whose class is missing, or not one of the model's."""
    for source in (data.source, data.held_out):
        if missing := int((source.labels < 0).sum()):
            raise DataError(
                f"{missing} of {len(source)} images have no class: put the images of each class in"
                " a sub-folder of their own"
            )
        if (highest := int(source.labels.max())) >= classes:
            raise ConfigError(
                f"model.classes is {classes}, the images have labels up to {highest}: set"
                f" --config.model.classes={highest + 1}"
            )
    ours, theirs = (list(source.class_names) for source in (data.source, data.held_out))
    if ours != theirs:
        raise DataError(
            f"the {len(theirs)} classes of the held-out images are not the {len(ours)} that are"
            " trained on: both folders need the same sub-folders"
        )
    if ours and len(ours) != classes:
        raise ConfigError(
            f"model.classes is {classes}, the images have {len(ours)} classes: set"
            f" --config.model.classes={len(ours)}"
        )


def make_run(config, workdir, mesh, tokenizer, data: Data, extras) -> PriorRun:
    """Puts a run together; nothing is computed yet."""
    online = None if data.codes else tokenizer
    program = make_program(config, mesh, online, extras["decay_from"])
    return PriorRun(
        **common_parts(config, workdir, mesh, program),
        extras=extras,
        held_out=HeldOut(ar.make(config.model, np.dtype(config.train.dtype)), data, mesh),
        tokenizer=tokenizer,
        inputs=data.inputs,
    )


def make_program(
    config, mesh, tokenizer: library.Tokenizer | None = None, decay_from: int | None = None
) -> program_lib.Program:
    """The training step of a config on a mesh.

    Args:
        config: of the run.
        mesh: devices of the run.
        tokenizer: makes codes of images within the step; None learns codes.
        decay_from: of a cool-down, see `optim.learning_rate`.
    """
    dtype, train = np.dtype(config.train.dtype), config.train
    dropouts = ar.Dropouts(train.token_dropout, train.dropout, train.class_dropout, train.drop_path)
    prior = ar.make(config.model, dtype, loop=make_loop(train), dropouts=dropouts)
    optimizer = optim.make_optimizer(config.optim, is_decayed)
    rate = optim.learning_rate(
        config.optim, total_steps(config), steps_per_epoch(config), decay_from=decay_from
    )
    encode, frozen = None, {}
    if tokenizer:
        encode = functools.partial(library.encode, config=tokenizer.config)
        frozen = {name: tokenizer.params[name] for name in library.CODE_PARTS}

    def make_step(micro_batches, place):
        return ar_step.make(prior, optimizer, rate, config.optim.ema, encode, micro_batches, place)

    plain = ar.make(config.model, dtype)
    create = functools.partial(ar_step.create, plain, optimizer, config.seed)
    batch = batch_shapes(config, tokenizer)
    return program_lib.make(config, mesh, create, make_step, frozen=frozen, batch=batch)


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to the parameter at `path`: to all but norms and biases.

    For `optim.decay_mask = "matrices"`. The axes of an array do not tell: the layers' vectors are
    stacked, and the original's own offsets of shared modulation, [1 1 6 c], are decayed.
    """
    return path.rpartition("/")[2] not in ("scale", "bias")


def batch_shapes(config, tokenizer: library.Tokenizer | None) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step takes of a global batch."""
    n, model = config.train.global_batch, config.model
    label = jax.ShapeDtypeStruct((n,), np.int32)
    if tokenizer is None:
        codes = jax.ShapeDtypeStruct((n, model.tokens), codes_lib.dtype(model.vocab))
        return {"label": label, "codes": codes}
    size = tokenizer.image_size
    return {"label": label, "image": jax.ShapeDtypeStruct((n, size, size, 3), np.uint8)}


class HeldOut:
    """Loss over held-out images, each counted once, of the trained and the averaged parameters."""

    def __init__(self, prior: ar.Prior, data: Data, mesh):
        self._losses, self._data = prior_loss.make_losses(prior), data
        self._mesh, self._batches = mesh, []

    def figures(self, state: ar_step.PriorState, watchdog: cluster.Watchdog) -> dict[str, float]:
        """Nats per code, and the number of images."""
        self._batches = self._batches or [  # kept: a tokenizer has to make them but once
            {name: one[name] for name in ("codes", "label", "mask")}
            for one in watchdog.hears(self._data.held_out_codes())
        ]
        trained = self._mean(state.params)
        averaged = self._mean(parallel.to_device(state.ema_params))
        return {"loss": trained["loss"], "loss_ema": averaged["loss"], "images": trained["images"]}

    def _mean(self, params) -> dict[str, float]:
        placed = prior_loss.place(self._batches, self._mesh)
        return prior_loss.mean_loss(self._losses, params, placed)


def sample(config, params, tokenizer: library.Tokenizer) -> np.ndarray:
    """Picture uint8[H W 3] of a few images of a few classes, evenly chosen; a row per class."""
    classes = config.model.classes
    rows, columns = min(config.sample.classes, classes), config.sample.images
    chosen = np.repeat(np.arange(rows) * classes // rows, columns)
    prior = library.Prior(params, config.model, np.dtype(config.train.dtype))
    settings = {name: config.sample[name] for name in SAMPLING}
    codes = processes.whole(prior.generate(chosen, config.seed, **settings))
    images = metrics.to_uint8(processes.whole(tokenizer.decode(codes)))
    return pictures.grid(images, columns)


# Cool-down.


def find_branch(config, workdir: epath.Path, tokenizer: str) -> dict[str, Any] | None:
    """Where a cool-down branches off: the "checkpoint", and its "step"; None for other runs.

    A workdir that has begun to cool down knows it, so the other run may go on or disappear.

    Raises:
        CheckpointError: the checkpoint is of another model or tokenizer, or its rate has begun to
            fall already.
        ConfigError: the run would end before it begins.
    """
    if not config.cooldown_from:
        return None
    if (workdir / COOLDOWN).exists():
        return files.read_json(workdir / COOLDOWN)
    _, extras = checkpoint.load_params(config.cooldown_from, ())
    check_branch(config, extras, tokenizer)
    root, _ = checkpoint.find(config.cooldown_from)
    return {"checkpoint": str(root / str(extras["step"])), "step": extras["step"]}


def check_branch(config, extras: dict[str, Any], tokenizer: str) -> None:
    """Refuses a checkpoint that no cool-down of this config can start from; see `find_branch`."""
    there, step, what = extras["config"], extras["step"], f"checkpoint {config.cooldown_from}"
    ours = config.model.to_dict()
    if there["model"] != ours:
        names = sorted(k for k in ours | there["model"] if ours.get(k) != there["model"].get(k))
        differ = ", ".join(f"{k} {there['model'].get(k)!r} not {ours.get(k)!r}" for k in names)
        raise CheckpointError(f"{what} is of another model: {differ}")
    if extras["tokenizer"] != tokenizer:
        raise CheckpointError(
            f"{what} learned codes of tokenizer {extras['tokenizer']}, these are of {tokenizer}"
        )
    there = ml_collections.ConfigDict(there)
    rate = optim.learning_rate(
        there.optim, total_steps(there), steps_per_epoch(there), decay_from=extras["decay_from"]
    )
    if not math.isclose(rate(step), there.optim.learning_rate):
        raise CheckpointError(
            f"{what} is not in a constant phase: its learning rate is {rate(step):.3g} and the base"
            f" {there.optim.learning_rate:.3g}; choose an earlier step, or one after the warm-up"
        )
    if total_steps(config) <= step:
        raise ConfigError(
            f"train.steps is {total_steps(config)}, {what} is at step {step} already: set it beyond"
        )


def begin(run: PriorRun, branch: dict[str, Any] | None) -> tuple[ar_step.PriorState, int]:
    """The state to go on from and the updates done; a new cool-down takes its first state along."""
    if branch is None or run.checkpoints.latest() is not None or run.checkpoints.damaged():
        return restore(run)
    state, _ = checkpoint.restore_from(branch["checkpoint"], run.abstract)
    if processes.is_first():
        files.write_json(run.workdir / COOLDOWN, branch)
    run.writer.truncate_after(branch["step"])
    print(f"the rate falls from step {branch['step']} to {run.total_steps}", flush=True)
    run.checkpoints.save(branch["step"], state, run.extras)
    return state, branch["step"]
