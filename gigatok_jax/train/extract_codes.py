"""The task `extract_codes`: writes codes of every image of a data set, by a trained tokenizer.

Axes: b records, a crops of a record, h w pixels, n codes. The same command again goes on where it
stopped, and leaves a finished folder as it is.
"""

import functools
import json
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import files, library, parallel
from gigatok_jax.data import codes, codes_file, pipeline, sources
from gigatok_jax.errors import ConfigError, one_of
from gigatok_jax.evaluation import metrics
from gigatok_jax.run import metric_writer, processes
from gigatok_jax.run.signals import Interrupts
from gigatok_jax.run.workdir import claim


def extract(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the codes of a config's images, by its tokenizer, into a workdir.

    An unreadable image is named in the log; its record stays, is marked, and is never used.

    Args:
        config: see `configs/extract_codes.py`.
        workdir: local folder that `data.codes.CodesSource` reads afterwards.

    Raises:
        GigatokError: whatever the user can change: config, checkpoint, images, disk.
        SystemExit: after a signal, between two batches; status 128 + the signal's number.
    """
    workdir = epath.Path(workdir)
    check(config)
    mesh = parallel.make_mesh(config.mesh)
    tokenizer = library.load_tokenizer(
        config.checkpoint, sharding=parallel.replicated(mesh), weights=config.weights_kind
    )
    source = sources.make_source(config.data, config.split, tokenizer.image_size)
    header = make_header(tokenizer, source, config.crops)
    claim(workdir, config)
    with (
        codes_file.CodesWriter(workdir, header, source.labels) as writer,
        Interrupts() as interrupts,
    ):
        start = writer.done
        seconds = write_rest(config, mesh, tokenizer, source, writer, interrupts)
        if writer.done < len(source):
            print(f"stopped at image {writer.done} of {len(source)}; the same command resumes")
            raise SystemExit(128 + interrupts.received)
        writer.finish()
        encoded = writer.done - start
    if encoded or not (workdir / "results.json").exists():
        results = figures(workdir, encoded, seconds)
        files.write_json(workdir / "results.json", results)


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the settings of an extraction of codes, before a model or images are loaded.

    Raises:
        ConfigError: unknown crops, an empty batch, or more than one process.
    """
    one_of("crops", config.crops, codes_file.AUGMENTATIONS)
    if config.batch < 1:
        raise ConfigError(f"batch is {config.batch}, expected at least 1")
    processes.alone("extract_codes", "start it on one host, which uses all of its devices")


def make_header(tokenizer: library.Tokenizer, source, crops: str) -> codes_file.Header:
    """Makes the header of a folder of codes, which identifies tokenizer, crops and images."""
    return codes_file.Header(
        tokenizer=tokenizer.fingerprint,
        model=json.loads(json.dumps(tokenizer.config.to_dict())),
        vocab=tokenizer.config.codebook_size,
        tokens=tokenizer.num_tokens,
        crops=crops,
        data=sources.fingerprint(source),
        records=len(source),
        class_names=list(source.class_names),
    )


def write_rest(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    tokenizer: library.Tokenizer,
    source: sources.FolderSource | sources.DigitsSource,
    writer: codes_file.CodesWriter,
    interrupts: Interrupts,
) -> float:
    """Writes codes of records still without codes, until a signal; returns the seconds taken."""
    encode, split = make_encode(tokenizer, mesh), parallel.split_batch(mesh)
    params = {name: tokenizer.params[name] for name in library.CODE_PARTS}
    progress = metric_writer.Progress("encoded", len(source), "images", done=writer.done)
    with image_batches(config, mesh, tokenizer.image_size, source, writer) as batches:
        for batch, encoded in ahead(batches, lambda x: encode(params, jax.device_put(x, split))):
            rows = min(len(batch["mask"]), len(source) - writer.done)  # the last batch is padded
            readable = batch["mask"][:rows]
            writer.write(np.asarray(encoded)[:rows], np.flatnonzero(~readable))
            progress.add(rows)
            if interrupts.received:
                break
    return progress.seconds


def image_batches(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    size: int,
    source: sources.FolderSource | sources.DigitsSource,
    writer: codes_file.CodesWriter,
) -> pipeline.Batches:
    """Opens batches with "image" uint8[b a h w 3] of the records still without codes."""
    shards = parallel.batch_shards(mesh)
    records = max(config.batch // (codes_file.AUGMENTATIONS[config.crops] * shards), 1) * shards
    unreadable = sum(len(part.unreadable) for part in writer.parts)
    return pipeline.eval_batches(
        source,
        size,
        records,
        max_unreadable=max(config.data.max_unreadable - unreadable, 0),
        views=functools.partial(codes.crops_of, crops=config.crops),
        first=writer.done,
        workers=config.data.workers,
    )


def make_encode(tokenizer: library.Tokenizer, mesh: jax.sharding.Mesh) -> Callable:
    """Makes a jitted `encode(params, images)` of images uint8[b a h w 3] to codes i32[b a n]."""

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def encode(params, images):
        flat = images.reshape(-1, *images.shape[2:])
        encoded = library.encode(params, flat, tokenizer.config)
        return encoded.reshape(*images.shape[:2], -1)

    return encode


def ahead(batches: pipeline.Batches, run: Callable) -> Iterator[tuple[dict, jax.Array]]:
    """Yields each batch with the result of `run` on its images; runs are started a batch ahead."""
    before = None
    for batch in batches:
        result = run(batch["image"])
        if before is not None:
            yield before
        before = (batch, result)
    if before is not None:
        yield before


def figures(workdir: epath.Path, encoded: int, seconds: float) -> dict[str, float]:
    """Computes the results of a finished folder of codes: counts, speed and codebook use.

    Args:
        workdir: the folder.
        encoded: number of records that the current command has encoded.
        seconds: time that their encoding took.
    """
    source = codes.CodesSource(workdir)
    use = metrics.codebook_use(source.counts())
    return {
        "records": source.header.records,
        "unreadable": source.header.records - len(source),
        "augmentations": source.augmentations,
        "tokenizer": source.header.tokenizer,
        "seconds": seconds,
        "images_per_second": encoded * source.augmentations / max(seconds, 1e-9),
        "codebook_usage": float(use.usage),
        "perplexity": float(use.perplexity),
    }
