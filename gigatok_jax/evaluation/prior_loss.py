"""Mean loss of a prior over held-out codes, and the task `evaluate` that computes the loss.

Axes: b batch, n codes of an image.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gigatok_jax import files, library, parallel
from gigatok_jax.data import codes as codes_lib
from gigatok_jax.data import pipeline, sources
from gigatok_jax.errors import ConfigError, DataError
from gigatok_jax.evaluation import pair
from gigatok_jax.losses import cross_entropy
from gigatok_jax.models import ar
from gigatok_jax.run import processes


def make_losses(prior: ar.Prior) -> Callable[..., jax.Array]:
    """Makes a jitted function that computes a prior's loss on the codes of each image.

    The function takes parameters, class ids i32[b] and codes int[b n], and returns the mean
    cross-entropy of each image's codes, f32[b], in nats. Class id -1, for an
    image without a class, counts as the null class.
    """

    @jax.jit
    def losses(params, class_ids, codes):
        class_ids, codes = jnp.where(class_ids < 0, prior.classes, class_ids), codes.astype(int)
        logits = prior.apply({"params": params}, class_ids, codes)  # [b n v]
        return cross_entropy(logits, codes).mean(-1)

    return losses


def mean_loss(losses: Callable, params: Any, batches: Iterable[dict]) -> dict[str, float]:
    """Computes a prior's mean cross-entropy over all images of batches; each image counts once.

    Args:
        losses: function from `make_losses`.
        params: parameters of the prior.
        batches: dicts with "codes" int[b n], "label" i32[b] and "mask" bool[b], False for padding.

    Returns:
        "loss" in nats per code, "perplexity" (its exponential) and "images" (their number).

    Raises:
        DataError: the batches hold no image.
    """
    total, count = 0.0, 0
    for batch in batches:
        keep = np.asarray(batch["mask"])
        values = processes.whole(losses(params, batch["label"], batch["codes"]))
        values = values.astype(np.float64)
        total, count = total + values[keep].sum(), count + int(keep.sum())
    if not count:
        raise DataError("no image to take the loss of: the held-out set is empty")
    return {"loss": total / count, "perplexity": math.exp(total / count), "images": count}


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs the task `evaluate`: measures a prior on held-out codes or images.

    Writes loss and perplexity to `results.json`.

    Args:
        config: see `configs/evaluate.py`.
        workdir: folder of the results, created if it does not exist.

    Raises:
        ConfigError: the config names no checkpoint or data, a setting is outside its range, or the
            codes are of another tokenizer.
        DataError: no image is readable, or classes are unknown to the prior.
        CheckpointError: the checkpoint is missing, damaged, or not of a prior.
    """
    if not config.checkpoint:
        raise ConfigError("checkpoint is empty: name a prior's run with --config.checkpoint=DIR")
    placement = pair.placement(config)
    prior = library.load_prior(config.checkpoint, weights=config.weights_kind, **placement)
    mesh = placement["sharding"].mesh
    check_batch(config.eval.batch, mesh)
    batches = _code_batches if config.codes or config.eval_codes else _image_batches
    placed = place(batches(config, prior, placement), mesh)
    losses = make_losses(ar.make(prior.config, placement["dtype"]))
    results = mean_loss(losses, prior.params, placed) | {"step": prior.step}
    if processes.is_first():
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)
        files.write_json(epath.Path(workdir) / "results.json", results)


def place(batches: Iterable[dict], mesh: Mesh) -> Iterator[dict]:
    """Yields batches with codes and labels divided over a mesh; masks stay on the host."""
    split = parallel.split_batch(mesh)
    for batch in batches:
        arrays = {name: batch[name] for name in ("codes", "label")}
        yield {"mask": batch["mask"]} | jax.device_put(arrays, split)


def image_codes(
    source: Any, tokenizer: library.Tokenizer, batch: int, max_unreadable: int
) -> Iterator[dict]:
    """Yields batches of every image of a source, with the "codes" that a tokenizer makes added."""
    size = tokenizer.image_size
    with pipeline.eval_batches(source, size, batch, max_unreadable=max_unreadable) as batches:
        for images in batches:
            yield images | {"codes": processes.whole(tokenizer.encode(images["image"]))}


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ConfigError unless the batch is a positive multiple of the devices that share it."""
    shards = parallel.batch_shards(mesh)
    if batch < 1 or batch % shards:
        raise ConfigError(f"eval.batch is {batch}, expected a multiple of the {shards} devices")


def _code_batches(config, prior: library.Prior, placement: dict) -> Iterator[dict]:
    """Yields batches of the extracted codes that a config names, after a check of the prior."""
    del placement
    if config.codes:
        _, source = codes_lib.open_codes(config.codes, config.eval_codes, config.data.eval_images)
    else:
        source = codes_lib.CodesSource(config.eval_codes)
    header = source.header
    pair.check(prior, header.tokens, header.vocab, header.tokenizer)
    _check_labels(source, prior)
    yield from codes_lib.eval_batches(source, config.eval.batch)


def _image_batches(config, prior: library.Prior, placement: dict) -> Iterator[dict]:
    """Yields batches of images that a config names, with codes by the config's tokenizer."""
    if not config.tokenizer:
        raise ConfigError(
            "tokenizer is empty: name it with --config.tokenizer=DIR, or codes with"
            " --config.codes=DIR"
        )
    tokenizer = library.load_tokenizer(config.tokenizer, **placement)
    pair.check_tokenizer(prior, tokenizer)
    data = config.data.copy_and_resolve_references()
    data.folder = data.folder or data.eval_folder
    source = sources.make_source(data, "held_out", tokenizer.image_size)
    _check_labels(source, prior)
    yield from image_codes(source, tokenizer, config.eval.batch, data.max_unreadable)


def _check_labels(source, prior: library.Prior) -> None:
    """Raises DataError if a source has classes unknown to a prior, by name (if named) or by id."""
    ours, theirs = tuple(source.class_names), tuple(prior.class_names)
    if ours and theirs and ours != theirs:
        raise DataError(
            f"the {len(ours)} classes of the held-out images are not the {len(theirs)} that the"
            " prior learned: their folder needs the same sub-folders"
        )
    highest, classes = int(source.labels.max()), prior.config.classes
    if highest >= classes:
        raise DataError(
            f"images of class {highest} for a prior of {classes} classes: 0 to {classes - 1}"
        )
