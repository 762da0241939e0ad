"""Metrics of a tokenizer's reconstructions of images, and the task `reconstruct`.

Axes: b batch, h w pixels, n codes.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from gigatok_jax import files, library
from gigatok_jax.data import pipeline, sources
from gigatok_jax.errors import ConfigError
from gigatok_jax.evaluation import metrics
from gigatok_jax.models import perceptual, tokenizer
from gigatok_jax.ops.image import to_pixels
from gigatok_jax.run import pictures, processes
from gigatok_jax.weights.frozen import available, load_frozen

SHOWN = 16  # images in a comparison picture


class Reconstructed(NamedTuple):
    """Record of a batch's reconstructed images, codes, and LPIPS distances to the originals."""

    images: jax.Array  # f32[b h w 3], not clamped
    codes: jax.Array  # i32[b n]
    lpips: jax.Array | None  # f32[b]; None without LPIPS weights


class Score(NamedTuple):
    """Record of PSNR, SSIM and LPIPS of each reconstructed image, f64[b]."""

    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray | None


def make_reconstruct(
    module: tokenizer.Tokenizer,
    lpips: perceptual.LPIPS | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., Reconstructed]:
    """Makes a jitted function that encodes images and decodes their codes again.

    The function takes parameters, images uint8[b h w 3] and LPIPS parameters. The decoder gets the
    exact codebook rows, as in the generation of images.

    Args:
        module: tokenizer, from `models.tokenizer.make`.
        lpips: LPIPS module; None leaves the LPIPS distance out.
        sharding: sharding of the results; None leaves it to the compiler.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def reconstruct(params, images, lpips_params=None) -> Reconstructed:
        pixels = to_pixels(images)
        encoding = module.apply({"params": params}, pixels, method="encode")
        codes = encoding.quantized.codes
        images = module.apply({"params": params}, codes, method="decode_codes").images
        distance = None
        if lpips is not None:
            distance = lpips.apply({"params": lpips_params}, pixels, images)
        return Reconstructed(images, codes, distance)

    return reconstruct


def score(images: np.ndarray, reconstructed: Reconstructed) -> Score:
    """Computes PSNR, SSIM and LPIPS of each reconstructed image of a batch.

    Args:
        images: originals, uint8[b h w 3].
        reconstructed: reconstructions; PSNR and SSIM compare pixels rounded to uint8, LPIPS
            compares unclamped pixels.
    """
    rounded = metrics.to_uint8(reconstructed.images)
    lpips = reconstructed.lpips
    lpips = None if lpips is None else np.asarray(lpips, np.float64)
    return Score(metrics.psnr(images, rounded), metrics.ssim(images, rounded), lpips)


def evaluate(
    reconstruct: Callable, batches: Iterable[dict], codebook_size: int
) -> dict[str, float]:
    """Computes mean metrics of a tokenizer's reconstructions over the batches of all processes.

    Args:
        reconstruct: function from this process's images uint8[b h w 3] to `Reconstructed`.
        batches: dicts with "image" uint8[b h w 3] and "mask" bool[b], False for padding.
        codebook_size: number of rows of the codebook.

    Returns:
        Over all images: "psnr" (dB), "ssim", "lpips" (if it was computed), "images" (their number),
        "codebook_usage" and "perplexity".
    """
    counts, scores = np.zeros(codebook_size, np.int64), []
    for batch in batches:
        reconstructed = jax.device_get(reconstruct(batch["image"]))
        keep = batch["mask"]
        counts += np.bincount(reconstructed.codes[keep].reshape(-1), minlength=codebook_size)
        every = score(batch["image"], reconstructed)
        scores.append(jax.tree.map(lambda x, keep=keep: x[keep], every))
    return _means(scores, counts)


def _means(scores: list[Score], counts: np.ndarray) -> dict[str, float]:
    """Averages metrics, and computes the use of the codebook, over the images of all processes.

    Args:
        scores: metrics of the batches of this process.
        counts: int[k], number of times that each code occurs in the batches of this process.
    """
    merged = jax.tree.map(lambda *x: processes.gather_rows(np.concatenate(x)), *scores)
    use = metrics.codebook_use(processes.gather_rows(counts[None]).sum(0))
    means = {name: float(x.mean()) for name, x in merged._asdict().items() if x is not None}
    means["images"] = len(merged.psnr)
    return means | {"codebook_usage": use.usage, "perplexity": use.perplexity}


def compare(images: np.ndarray, reconstructed: Reconstructed) -> np.ndarray:
    """Draws a picture uint8[H W 3] of original images above their reconstructions."""
    return pictures.comparison(images, metrics.to_uint8(reconstructed.images))


def reconstruct(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs the task `reconstruct` on an image or a folder of images.

    Writes every reconstruction to `reconstructions/<name>.png`, a comparison under `pictures/`,
    `figures.json` with PSNR, SSIM and LPIPS of each image, and `results.json` with their means.

    Args:
        config: see `configs/reconstruct.py`.
        workdir: folder of the results, created if it does not exist.

    Raises:
        ConfigError: the config names no checkpoint or input, or a setting is outside its range.
        CheckpointError: the checkpoint is missing, damaged, or not of a tokenizer.
        DataError: no image at the input is readable.
    """
    if not config.checkpoint:
        raise ConfigError("checkpoint is empty: name a workdir with --config.checkpoint=DIR")
    if not config.input:
        raise ConfigError("input is empty: name an image or a folder with --config.input=PATH")
    if config.eval.batch < 1:
        raise ConfigError(f"eval.batch is {config.eval.batch}, expected at least 1")
    processes.alone("reconstruct", "start it on one host")
    workdir = epath.Path(workdir)
    model = library.load_tokenizer(config.checkpoint, weights=config.weights_kind)
    run = _runner(model, config.weights.folder)
    source = sources.images_at(config.input)
    figures, scores, counts = {}, [], np.zeros(model.config.codebook_size, np.int64)
    size, count = model.image_size, len(source)
    with pipeline.eval_batches(source, size, config.eval.batch, max_unreadable=count) as batches:
        for batch in batches:
            keep = batch["mask"]
            if not keep.any():  # all are damaged
                continue
            images, every = batch["image"][keep], jax.device_get(run(batch["image"]))
            reconstructed = jax.tree.map(lambda x, keep=keep: x[keep], every)
            if not figures:
                shown = compare(images[:SHOWN], jax.tree.map(lambda x: x[:SHOWN], reconstructed))
                pictures.save(workdir, "reconstruction", model.step or 0, shown)
            scores.append(score(images, reconstructed))
            counts += np.bincount(reconstructed.codes.reshape(-1), minlength=len(counts))
            names = [source.names[i] for i in batch["index"][keep]]
            figures |= _write(workdir, names, reconstructed, scores[-1])
    files.write_json(workdir / "figures.json", figures)
    files.write_json(workdir / "results.json", _means(scores, counts) | {"step": model.step})


def _runner(model: library.Tokenizer, folder: str) -> Callable:
    """Makes a function from images uint8[b h w 3] to `Reconstructed`; LPIPS needs its weights."""
    lpips, lpips_params = None, None
    if available("lpips-vgg16", folder):
        lpips, lpips_params = perceptual.LPIPS(), load_frozen("lpips-vgg16", folder)
    else:
        logging.warning("weights of lpips-vgg16 are not on this machine: LPIPS is left out")
    step = make_reconstruct(tokenizer.make(model.config), lpips)
    params, lpips_params = jax.device_put((model.params, lpips_params))
    return lambda images: step(params, images, lpips_params)


def _write(
    workdir: epath.Path, names: list[str], reconstructed: Reconstructed, scores: Score
) -> dict[str, dict[str, float]]:
    """Writes a PNG of every reconstruction, prints its metrics, and returns the metrics by name."""
    figures = {}
    for i, name in enumerate(names):
        path = workdir / "reconstructions" / f"{name}.png"  # in sub-folders, as the originals
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, pictures.encode(metrics.to_uint8(reconstructed.images[i])))
        values = {key: float(x[i]) for key, x in scores._asdict().items() if x is not None}
        figures[name] = values
        print(name, " ".join(f"{key} {value:.4f}" for key, value in values.items()), flush=True)
    return figures
