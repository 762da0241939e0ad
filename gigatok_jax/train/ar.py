"""Training of a prior: from a config and a workdir to a checkpoint and a page.

The prior learns codes that were extracted before, or codes that a frozen tokenizer makes of images
in the same step. The same command again resumes the run.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import library, parallel, sampling
from gigatok_jax.data import codes as codes_lib
from gigatok_jax.data import codes_file, pipeline, sources
from gigatok_jax.errors import ConfigError, DataError
from gigatok_jax.evaluation import metrics, prior_loss
from gigatok_jax.model_config import model_config
from gigatok_jax.models import ar
from gigatok_jax.models import tokenizer as tokenizer_lib
from gigatok_jax.run import pictures, processes, signals
from gigatok_jax.train import ar_step, cooldown, loop, optim, settings
from gigatok_jax.train import program as program_lib

SHOWN = ("loss", "gradient_norm")
UNTRAINED = "untrained"  # in the place of a tokenizer's checkpoint
GUIDANCE = ("scale", "schedule", "start", "end", "interval")  # of `config.cfg`
DRAW = ("temperature", "top_k", "top_p")  # of `config.sample`


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Trains the prior of a config; writes checkpoints, metrics, pictures, results and a page.

    Args:
        config: of a run that trains a prior, see `configs/common.py`.
        workdir: folder of the run; a run whose folder holds a checkpoint is resumed.

    Raises:
        GigatokError: whatever the user can change: config, codes, data, disk, a checkpoint.
        SystemExit: after a signal, once the state is saved; status 128 + the signal's number.
    """
    check(config)
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
    prior_loss.check_batch(config.eval.batch, mesh)
    tokenizer = load_tokenizer(config, mesh)
    data = Data(config, tokenizer, parallel.share(mesh))
    extras = check_data(config, data, tokenizer)
    branch = cooldown.find_branch(config, epath.Path(workdir), extras["tokenizer"])
    extras["decay_from"] = branch and branch["step"]
    program = make_program(config, mesh, None if data.codes else tokenizer, extras["decay_from"])
    held_out = HeldOut(config, data, tokenizer, mesh)
    begin = branch and functools.partial(cooldown.begin, branch=branch)
    with loop.open_run(config, workdir, program, held_out, extras, shown=SHOWN, begin=begin) as run:
        for batch in run.batches(data.train_batches(run.done)):
            with run.timer.measure("compute"):
                run.state, scalars = program(run.state, batch)
            run.after(scalars)


class Data:
    """Training data and held-out data of a prior's run: codes, or images to make codes of.

    Attributes:
        source, held_out: records to train on and held-out records; sources of `data.codes` or
            `data.sources`.
        fingerprint: identifies the records to train on.
        codes: header of the codes; None for images.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        tokenizer: library.Tokenizer | None,
        share: parallel.Share,
    ):
        """Opens the codes or the images that a config names.

        Args:
            config: of the run.
            tokenizer: makes codes of images; None where codes are named.
            share: share of this process among the processes that feed the mesh.
        """
        self.codes = None
        if config.codes:
            self.source, self.held_out = codes_lib.open_codes(
                config.codes, config.eval_codes, config.data.eval_images
            )
            self.codes, self.fingerprint = self.source.header, self.source.fingerprint
        else:
            size = tokenizer.image_size
            self.source, self.held_out = (
                sources.make_source(config.data, split, size) for split in ("train", "held_out")
            )
            self.fingerprint = sources.fingerprint(self.source)
        self._config, self._tokenizer, self._share = config, tokenizer, share

    def train_batches(self, start: int) -> contextlib.AbstractContextManager:
        """Opens the stream of training batches, whose first batch is for update `start + 1`."""
        config = self._config
        rest = (config.train.global_batch, config.seed, start, *self._share[:2])
        if self.codes:
            return contextlib.closing(codes_lib.train_batches(self.source, *rest))
        return pipeline.train_batches(config.data, self.source, self._tokenizer.image_size, *rest)

    def held_out_codes(self) -> Iterator[dict[str, np.ndarray]]:
        """Returns batches with "codes" int[b n], "label", "mask": every held-out image once."""
        batch, most = self._config.eval.batch, self._config.data.max_unreadable
        if self.codes:
            return codes_lib.eval_batches(self.held_out, batch)
        return prior_loss.image_codes(self.held_out, self._tokenizer, batch, most)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the config of a prior's run, before data or models are loaded.

    Raises:
        ConfigError: a value cannot work; the error names the first such value and what is possible.
    """
    settings.check(config)
    check_sample(config)
    if not config.codes and not config.tokenizer:
        raise ConfigError(
            "nothing to learn from: name codes with --config.codes=DIR, or a tokenizer that makes"
            " them of images with --config.tokenizer=DIR"
        )


def check_sample(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for settings that samples cannot be drawn with, before training begins."""
    for name in ("classes", "images"):
        if config.sample[name] < 1:
            raise ConfigError(f"sample.{name} is {config.sample[name]}, expected at least 1")
    sampling.weights(2, *(config.cfg[name] for name in GUIDANCE))
    sampling.make_draw(*(config.sample[name] for name in DRAW))


def load_tokenizer(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> library.Tokenizer | None:
    """Loads a prior's frozen tokenizer in float32; returns None if the config names only codes."""
    if config.tokenizer == UNTRAINED:
        return None if config.codes else untrained(config.model, mesh)
    if config.tokenizer:
        return library.load_tokenizer(config.tokenizer, sharding=parallel.replicated(mesh))
    print("no tokenizer is named: no pictures of samples; --config.tokenizer=DIR draws them")
    return None


def untrained(model: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> library.Tokenizer:
    """Makes a small random tokenizer whose codes fit a prior's `model`, for smoke runs."""
    print("the tokenizer is untrained, its codes mean nothing: this run only tries the machinery")
    small = {"image_size": 32, "stem": "patch", "patch_size": 2, "align_block": 0}
    small |= {"encoder": "pico", "decoder": "pico"}
    small |= {"latent_tokens": model.tokens, "codebook_size": model.vocab}
    model = model_config("S-S", **small)
    images = np.zeros((1, model.image_size, model.image_size, 3), np.float32)
    create = jax.jit(tokenizer_lib.make(model).init, out_shardings=parallel.replicated(mesh))
    return library.Tokenizer(create(jax.random.key(0), images)["params"], model)


def check_data(
    config: ml_collections.ConfigDict, data: Data, tokenizer: library.Tokenizer | None
) -> dict[str, Any]:
    """Checks that codes and images fit a prior and its tokenizer; returns values to save.

    Returns:
        JSON values to save beside each state: config, fingerprints, names of the classes.

    Raises:
        ConfigError: a number in the config of the model is not that of the codes or images.
        DataError: the codes are of another tokenizer, images have no class, or the held-out images
            have other classes than the training images.
    """
    if tokenizer and data.codes and data.codes.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{config.codes} holds codes of tokenizer {data.codes.tokenizer}, {config.tokenizer} is"
            f" {tokenizer.fingerprint}: extract its codes, or name the tokenizer they are of"
        )
    vocab = data.codes.vocab if data.codes else tokenizer.config.codebook_size
    tokens = data.codes.tokens if data.codes else tokenizer.num_tokens
    for name, size in {"vocab": vocab, "tokens": tokens}.items():
        if config.model[name] != size:
            raise ConfigError(
                f"model.{name} is {config.model[name]}, the codes have {size}: set"
                f" --config.model.{name}={size}"
            )
    check_labels(config.model.classes, data)
    return {
        "config": config.to_dict(),
        "data": {"fingerprint": data.fingerprint},
        "tokenizer": data.codes.tokenizer if data.codes else tokenizer.fingerprint,
        "class_names": list(data.source.class_names),
    }


def check_labels(classes: int, data: Data) -> None:
    """Checks that all training and held-out images have a class that the prior knows.

    Raises:
        ConfigError: the prior has another number of classes than the images.
        DataError: an image has no class, or the held-out images have other classes.
    """
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


def make_program(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    tokenizer: library.Tokenizer | None = None,
    decay_from: int | None = None,
) -> program_lib.Program:
    """Makes the program of a prior's training step on a mesh; nothing is computed yet.

    Args:
        config: of the run.
        mesh: devices of the run.
        tokenizer: makes codes of images within the step; None learns codes.
        decay_from: updates after which the rate of a cool-down falls, see `optim.learning_rate`.
    """
    dtype, train = np.dtype(config.train.dtype), config.train
    dropouts = ar.Dropouts(train.token_dropout, train.dropout, train.class_dropout, train.drop_path)
    prior = ar.make(config.model, dtype, loop=settings.make_loop(train), dropouts=dropouts)
    optimizer = optim.make_optimizer(config.optim, is_decayed)
    rate = optim.learning_rate(
        config.optim,
        settings.total_steps(config),
        settings.steps_per_epoch(config),
        decay_from=decay_from,
    )
    encode, frozen = None, {}
    if tokenizer:
        encode = functools.partial(library.encode, config=tokenizer.config)
        frozen = {name: tokenizer.params[name] for name in library.CODE_PARTS}

    def make_step(micro_batches, shardings):
        ema = config.optim.ema
        return ar_step.make(prior, optimizer, rate, ema, encode, micro_batches, shardings)

    plain = ar.make(config.model, dtype)
    create = functools.partial(ar_step.create, plain, optimizer, config.seed)
    batch = batch_shapes(config, tokenizer)
    return program_lib.make(config, mesh, create, make_step, frozen=frozen, batch=batch)


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a prior's parameter: to all but scales of norms and biases.

    This is the rule of `optim.decay_mask = "matrices"`. The axes of an array do not tell: vectors
    of all layers are stacked, and the original decays its offsets of shared modulation, [1 1 6 c].
    """
    return path.rpartition("/")[2] not in ("scale", "bias")


def batch_shapes(
    config: ml_collections.ConfigDict, tokenizer: library.Tokenizer | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of the arrays in a global batch: labels, and codes or images."""
    n, model = config.train.global_batch, config.model
    label = jax.ShapeDtypeStruct((n,), np.int32)
    if tokenizer is None:
        codes = jax.ShapeDtypeStruct((n, model.tokens), codes_file.dtype(model.vocab))
        return {"label": label, "codes": codes}
    size = tokenizer.image_size
    return {"label": label, "image": jax.ShapeDtypeStruct((n, size, size, 3), np.uint8)}


class HeldOut:
    """Evaluator of a prior during training: measures its held-out loss and draws samples."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        data: Data,
        tokenizer: library.Tokenizer | None,
        mesh: jax.sharding.Mesh,
    ):
        """Prepares the measurements of a prior's run; nothing is computed yet.

        Args:
            config: of the run.
            data: with the held-out codes or images.
            tokenizer: decodes samples; None draws none.
            mesh: devices of the run.
        """
        prior = ar.make(config.model, np.dtype(config.train.dtype))
        self._losses, self._data, self._mesh = prior_loss.make_losses(prior), data, mesh
        self._config, self._tokenizer = config, tokenizer
        self._batches: list[dict[str, np.ndarray]] = []

    def figures(self, state: ar_step.PriorState, watchdog: signals.Watchdog) -> dict[str, float]:
        """Computes the held-out loss, in nats per code, of a state's trained and EMA parameters.

        Returns:
            "loss", "loss_ema", and "images", the number of images.
        """
        self._batches = self._batches or [  # kept: a tokenizer has to make them but once
            {name: batch[name] for name in ("codes", "label", "mask")}
            for batch in watchdog.hears(self._data.held_out_codes())
        ]
        trained = self._mean(state.params)
        averaged = self._mean(parallel.to_device(state.ema_params))
        return {"loss": trained["loss"], "loss_ema": averaged["loss"], "images": trained["images"]}

    def _mean(self, params: Any) -> dict[str, float]:
        placed = prior_loss.place(self._batches, self._mesh)
        return prior_loss.mean_loss(self._losses, params, placed)

    def pictures(self, state: ar_step.PriorState) -> dict[str, np.ndarray]:
        """Draws the picture "samples" of a few classes; returns {} without a tokenizer."""
        if self._tokenizer is None:
            return {}
        return {"samples": sample(self._config, state.params, self._tokenizer)}


def sample(
    config: ml_collections.ConfigDict, params: Any, tokenizer: library.Tokenizer
) -> np.ndarray:
    """Generates images of a few classes, evenly spaced; returns a picture uint8[h w 3] of them."""
    classes = config.model.classes
    rows, columns = min(config.sample.classes, classes), config.sample.images
    class_ids = np.repeat(np.arange(rows) * classes // rows, columns)
    prior = library.Prior(params, config.model, np.dtype(config.train.dtype))
    guidance = {f"cfg_{name}": config.cfg[name] for name in GUIDANCE}
    draw = {name: config.sample[name] for name in DRAW}
    codes = processes.whole(prior.generate(class_ids, config.seed, **guidance, **draw))
    images = metrics.to_uint8(processes.whole(tokenizer.decode(codes)))
    return pictures.grid(images, columns)
