"""How well a tokenizer reconstructs: figures over held-out images, and the task of that name.

Axes: b batch, h w pixels, n codes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from gigatok_jax import files, library
from gigatok_jax.data import sources, transforms
from gigatok_jax.errors import ConfigError, DataError
from gigatok_jax.evaluation import metrics
from gigatok_jax.models import perceptual, tokenizer
from gigatok_jax.ops.image import to_pixels
from gigatok_jax.run import pictures, processes
from gigatok_jax.weights.load import available, load_frozen

SHOWN = 16  # images of a comparison picture


class Reconstructed(NamedTuple):
    images: jax.Array  # f32[b h w 3], not clamped
    codes: jax.Array  # i32[b n]
    lpips: jax.Array | None  # f32[b]


class Score(NamedTuple):
    """Of each image, f64[b]; pixels as the original scores them."""

    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray | None


def make_reconstruct(module, lpips=None, sharding=None) -> Callable[..., Reconstructed]:
    """Jitted `reconstruct(params, images, lpips_params)` of uint8 images [b h w 3].

    The decoder gets the exact codebook rows, as it does when images are generated. The results come
    in a sharding, or as the compiler likes.
    """

    @functools.partial(jax.jit, out_shardings=sharding)
    def reconstruct(params, images, lpips_params=None) -> Reconstructed:
        pixels = to_pixels(images)
        encoding = module.apply({"params": params}, pixels, method="encode")
        codes = encoding.quantized.codes
        made = module.apply({"params": params}, codes, method="decode_codes").images
        distance = None
        if lpips is not None:
            distance = lpips.apply({"params": lpips_params}, pixels, made)
        return Reconstructed(made, codes, distance)

    return reconstruct


def score(images: np.ndarray, made: Reconstructed) -> Score:
    """PSNR, SSIM and LPIPS of a batch.

    Args:
        images: uint8[b h w 3].
        made: their reconstructions; LPIPS was taken of the unclamped pixels.
    """
    rounded = metrics.to_uint8(np.asarray(made.images))
    lpips = None if made.lpips is None else np.asarray(made.lpips, np.float64)
    return Score(metrics.psnr(images, rounded), metrics.ssim(images, rounded), lpips)


def evaluate(
    reconstruct: Callable, batches: Iterable[dict], codebook_size: int
) -> dict[str, float]:
    """Mean figures over batches of `data.pipeline.eval_batches`, of all processes.

    Args:
        reconstruct: uint8 images [b h w 3] of this process to `Reconstructed`.
        batches: "image" uint8[b h w 3] and "mask" bool[b], False for padding.
        codebook_size: rows of the codebook.

    Returns:
        psnr (dB), ssim, lpips (when it was made), codebook_usage and perplexity over all images,
        images (how many).
    """
    counts, scores = np.zeros(codebook_size, np.int64), []
    for batch in batches:
        made = jax.device_get(reconstruct(batch["image"]))
        keep = batch["mask"]
        counts += np.bincount(made.codes[keep].reshape(-1), minlength=codebook_size)
        whole = score(batch["image"], made)
        scores.append(jax.tree.map(lambda x, keep=keep: x[keep], whole))
    merged = jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
    merged = jax.tree.map(processes.gather_rows, merged)
    return summary(merged) | _codebook(processes.gather_rows(counts[None]).sum(0))


def summary(merged: Score) -> dict[str, float]:
    """Mean of each figure, and the number of images."""
    figures = {name: float(x.mean()) for name, x in merged._asdict().items() if x is not None}
    return figures | {"images": len(merged.psnr)}


def _codebook(counts: np.ndarray) -> dict[str, float]:
    use = metrics.codebook_use(counts)
    return {"codebook_usage": float(use.usage), "perplexity": float(use.perplexity)}


def compare(images: np.ndarray, made: Reconstructed) -> np.ndarray:
    """Picture uint8[H W 3] of originals over their reconstructions."""
    return pictures.comparison(images, metrics.to_uint8(np.asarray(made.images)))


def load(path: epath.PathLike, kind: str = "auto") -> library.Tokenizer:
    """Tokenizer of a checkpoint of any format, see `library.load_tokenizer`.

    Args:
        path: where it is.
        kind: "ema" or "raw" parameters; "auto" is the EMA copy if there is one.

    Raises:
        ConfigError: no path or an unknown kind.
        CheckpointError: nothing there, damaged, or not of a tokenizer.
    """
    if not path:
        raise ConfigError("checkpoint is empty: name a workdir with --config.checkpoint=DIR")
    kinds = ("auto", "ema", "raw")
    if kind not in kinds:
        raise ConfigError(f"weights_kind is {kind!r}, expected one of {', '.join(kinds)}")
    return library.load_tokenizer(path, weights=kind)


def reconstruct(config, workdir: epath.PathLike) -> None:
    """The task: pictures and figures of a file or folder under a checkpoint.

    Writes every reconstruction to `reconstructions/<name>.png`, a comparison under `pictures/`,
    `figures.json` with PSNR, SSIM and LPIPS by image, and `results.json` with their means.

    Raises:
        ConfigError: no checkpoint or input named, or a batch of none.
        DataError: nothing readable at the input.
    """
    if not config.input:
        raise ConfigError("input is empty: name an image or a folder with --config.input=PATH")
    if config.eval.batch < 1:
        raise ConfigError(f"eval.batch is {config.eval.batch}, expected at least 1")
    if jax.process_count() > 1:
        raise ConfigError(
            f"reconstruct writes one folder from one process, here are {jax.process_count()}: start"
            " it on one host"
        )
    workdir = epath.Path(workdir)
    model = load(config.checkpoint, config.weights_kind)
    run = _runner(model, config.weights.folder)
    figures, scores, counts = {}, [], np.zeros(model.config.codebook_size, np.int64)
    for i, (names, images) in enumerate(_batches(config, model.config.image_size)):
        made = _take(jax.device_get(run(_padded(images, config.eval.batch))), len(images))
        if i == 0:
            shown = compare(images[:SHOWN], _take(made, SHOWN))
            pictures.save(workdir, "reconstruction", model.step or 0, shown)
        scores.append(score(images, made))
        counts += np.bincount(made.codes.reshape(-1), minlength=len(counts))
        figures |= _write(workdir, names, made, scores[-1])
    if not scores:
        raise DataError(f"no readable image at {config.input}")
    merged = jax.tree.map(lambda *parts: np.concatenate(parts), *scores)
    results = summary(merged) | _codebook(counts) | {"step": model.step}
    files.write_json(workdir / "figures.json", figures)
    files.write_json(workdir / "results.json", results)


def _runner(model: library.Tokenizer, folder: str) -> Callable:
    """uint8[b h w 3] -> Reconstructed, with LPIPS where its weights are here."""
    lpips, lpips_params = None, None
    if available("lpips-vgg16", folder):
        lpips, lpips_params = perceptual.LPIPS(), load_frozen("lpips-vgg16", folder)
    else:
        logging.warning("weights of lpips-vgg16 are not here: LPIPS is left out")
    step = make_reconstruct(tokenizer.make(model.config), lpips)
    params, lpips_params = jax.device_put((model.params, lpips_params))
    return lambda images: step(params, images, lpips_params)


def _batches(config, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """(names, uint8[b h w 3]) of the input's images, centre-cropped."""
    names, images = [], []
    for name, image in sources.load_images(config.input):
        names.append(name)
        images.append(transforms.center_crop(image, size))
        if len(names) == config.eval.batch:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)


def _padded(images: np.ndarray, batch: int) -> np.ndarray:
    """The last batch filled up, so that one shape is compiled."""
    return np.concatenate([images, np.zeros((batch - len(images), *images.shape[1:]), np.uint8)])


def _take(made: Reconstructed, count: int) -> Reconstructed:
    return jax.tree.map(lambda x: x[:count], made)


def _write(workdir, names: list[str], made: Reconstructed, scores: Score) -> dict[str, dict]:
    """PNG of every image; its figures by name."""
    figures = {}
    for i, name in enumerate(names):
        path = workdir / "reconstructions" / f"{name}.png"  # in sub-folders, as the originals
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, pictures.encode(metrics.to_uint8(made.images[i])))
        values = {key: float(x[i]) for key, x in scores._asdict().items() if x is not None}
        figures[name] = values
        print(name, " ".join(f"{key} {value:.4f}" for key, value in values.items()), flush=True)
    return figures
