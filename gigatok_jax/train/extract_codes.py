"""Codes of every image of a data set, by a trained tokenizer: the task `extract_codes`.

Axes: b records, a crops of each, h w pixels, n codes. The same command again goes on where it
stopped, and a finished folder is left as it is.
"""

import functools
import json
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from gigatok_jax import files, library, parallel
from gigatok_jax.data import codes, codes_file, pipeline, sources
from gigatok_jax.errors import ConfigError, one_of
from gigatok_jax.evaluation import metrics
from gigatok_jax.run import metric_writer, processes
from gigatok_jax.run.signals import Interrupts
from gigatok_jax.run.workdir import claim


def extract(config, workdir: epath.PathLike) -> None:
    """Writes the codes of `config.data` under `config.checkpoint` into the workdir.

    An unreadable image is named in the log; its record stays, marked, and is never used.

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
        made = writer.done - start
    if made or not (workdir / "results.json").exists():
        results = figures(workdir, made, seconds)
        files.write_json(workdir / "results.json", results)


def check(config) -> None:
    """Refuses values that cannot work, before anything is loaded.

    Raises:
        ConfigError: unknown crops, an empty batch, or more than one process.
    """
    one_of("crops", config.crops, codes_file.AUGMENTATIONS)
    if config.batch < 1:
        raise ConfigError(f"batch is {config.batch}, expected at least 1")
    processes.alone("extract_codes", "start it on one host, which uses all of its devices")


def make_header(tokenizer: library.Tokenizer, source, crops: str) -> codes_file.Header:
    """What the codes of a source under a tokenizer are of."""
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


def write_rest(config, mesh, tokenizer, source, writer, interrupts: Interrupts) -> float:
    """Codes of the records that are not there yet; returns the seconds it took."""
    encode, place = make_encode(tokenizer, mesh), parallel.split_batch(mesh)
    params = {name: tokenizer.params[name] for name in library.CODE_PARTS}
    progress = metric_writer.Progress("encoded", len(source), "images", done=writer.done)
    with image_batches(config, mesh, tokenizer.image_size, source, writer) as batches:
        for batch, made in ahead(batches, lambda x: encode(params, jax.device_put(x, place))):
            rows = min(len(batch["mask"]), len(source) - writer.done)  # the last batch is padded
            readable = batch["mask"][:rows]
            writer.write(np.asarray(made)[:rows], np.flatnonzero(~readable))
            progress.add(rows)
            if interrupts.received:
                break
    return progress.seconds


def image_batches(config, mesh, size: int, source, writer) -> pipeline.Batches:
    """Batches "image" uint8[b a h w 3] of the records that are not there yet."""
    shards = parallel.batch_shards(mesh)
    records = max(config.batch // (codes_file.AUGMENTATIONS[config.crops] * shards), 1) * shards
    met = sum(len(part.unreadable) for part in writer.parts)
    return pipeline.eval_batches(
        source,
        size,
        records,
        max_unreadable=max(config.data.max_unreadable - met, 0),
        views=functools.partial(codes.crops_of, crops=config.crops),
        first=writer.done,
        workers=config.data.workers,
    )


def make_encode(tokenizer: library.Tokenizer, mesh) -> Callable:
    """Jitted `encode(params, images)`: uint8[b a h w 3] -> i32[b a n], in float32."""

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def encode(params, images):
        flat = images.reshape(-1, *images.shape[2:])
        made = library.encode(params, flat, tokenizer.config)
        return made.reshape(*images.shape[:2], -1)

    return encode


def ahead(batches: pipeline.Batches, run: Callable) -> Iterator[tuple[dict, jax.Array]]:
    """Each batch with what `run` makes of its images, one batch ahead of the reader."""
    before = None
    for batch in batches:
        made = run(batch["image"])
        if before is not None:
            yield before
        before = (batch, made)
    if before is not None:
        yield before


def figures(workdir: epath.Path, made: int, seconds: float) -> dict[str, float]:
    """What `results.json` says of a finished folder, of which `made` records are new."""
    source = codes.CodesSource(workdir)
    use = metrics.codebook_use(source.counts())
    return {
        "records": source.header.records,
        "unreadable": source.header.records - len(source),
        "augmentations": source.augmentations,
        "tokenizer": source.header.tokenizer,
        "seconds": seconds,
        "images_per_second": made * source.augmentations / max(seconds, 1e-9),
        "codebook_usage": float(use.usage),
        "perplexity": float(use.perplexity),
    }
