r"""Compares how well tokenizers learn own pictures: starts of the 1D model beside the 2D model.

    python -m gigatok_jax.benchmarks.learning PICTURES --out=runs/learning
    python -m gigatok_jax.benchmarks.learning PICTURES --variants 2d last_level --updates=2000
    python -m gigatok_jax.benchmarks.learning PICTURES --size=256 --patch=16 --model=small \
        --latent_tokens=256 --rate=2e-4 --warmup=50 --dtype=bfloat16

PICTURES is a folder or a tar file of images. Every tenth image is held out. The training step is
that of a run, simplified: one linear layer per patch instead of the CNN, squared error of pixels
alone, nothing quantized. What counts is the PSNR of held-out reconstructions by the EMA copy after
the same number of updates. A collapsed model reaches the PSNR of the mean training picture.
Run it in the folder that has configs/.
"""

import argparse
import json
import pathlib
import tarfile
import tempfile
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from gigatok_jax import parallel
from gigatok_jax.benchmarks import markdown
from gigatok_jax.data import sources, transforms
from gigatok_jax.errors import ConfigError, DataError
from gigatok_jax.evaluation import metrics
from gigatok_jax.model_config import SIZES
from gigatok_jax.models import tokenizer
from gigatok_jax.ops.image import to_pixels
from gigatok_jax.run import charts, command_line
from gigatok_jax.run import workdir as workdir_lib
from gigatok_jax.train import networks, objective, settings
from gigatok_jax.train import tokenizer as tokenizer_run

HELD_OUT = 10  # one picture in so many
VARIANTS = {  # decoder queries and first weights; None is the 2D tokenizer
    "first": ("first", "published"),  # as published
    "learnable": ("learnable", "published"),
    "multi_level": ("multi_level", "published"),
    "last_level": ("last_level", "published"),
    "first_geometry": ("first", "geometry"),
    "last_level_geometry": ("last_level", "geometry"),
    "2d": None,
}


class Pictures(NamedTuple):
    """Record of two sets of pictures: pictures to learn, and pictures that are held out."""

    train: np.ndarray  # uint8[n s s 3]
    held_out: np.ndarray  # uint8[m s s 3]


class Learned(NamedTuple):
    """Record of a variant's training: its losses, the PSNR of held-out pictures, and the time."""

    variant: str
    losses: np.ndarray  # f32[updates]
    psnr: float  # dB, mean over held-out pictures
    seconds: float  # of all updates, without compiling


def main() -> None:
    """Trains each variant and prints a table; with `--out` writes it, its figures and a plot."""
    options = arguments()
    with command_line.one_line_errors():
        pictures = read(options.pictures, options.size)
        configs = {name: config_of(options, name) for name in options.variants}
        check_counts(options, pictures)
        rows = []
        for name in options.variants:
            rows.append(learn(name, configs[name], pictures))
            print(" | ".join(cells(rows[-1])), flush=True)
        text = table(rows, pictures, options)
        print("\n" + text)
        if options.out:
            write(pathlib.Path(options.out), rows, text)


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = command_line.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pictures", help="folder or tar file of images")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--updates", type=int, default=400)
    add("--size", type=int, default=64, help="side of a picture in pixels")
    add("--patch", type=int, default=8, help="pixels per cell of the grid")
    add("--latent_tokens", type=int, default=64)
    add("--model", choices=SIZES, default="pico", help="size of encoder and decoder")
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=1e-3, help="constant learning rate")
    add("--warmup", type=int, default=0, help="updates until the rate is reached")
    add("--dtype", choices=settings.CHOICES["train.dtype"], default="float32")
    add("--seed", type=int, default=0)
    add("--out", default="", help="folder for learning.json, learning.md and learning.svg")
    return parser.parse_args()


def read(path: str, size: int) -> Pictures:
    """Reads all images of a folder or tar file, by sorted name, and crops each to its centre.

    Raises:
        DataError: no such folder or file, no images in it, an unreadable image, or too few images.
    """
    if not pathlib.Path(path).is_file():
        return split(sources.FolderSource(path), size)
    if not tarfile.is_tarfile(path):
        raise DataError(f"{path} is neither a folder nor a tar file of images")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return split(sources.FolderSource(folder), size)


def split(source: sources.FolderSource, size: int) -> Pictures:
    """Crops all pictures of a source to `size` pixels at their centre; holds out every tenth."""
    if len(source) < HELD_OUT:
        raise DataError(f"{len(source)} pictures, expected at least {HELD_OUT}")
    crops = [transforms.center_crop(transforms.decode(row["image"]), size) for row in source]
    held_out = np.arange(len(crops)) % HELD_OUT == HELD_OUT - 1
    crops = np.stack(crops)
    return Pictures(crops[~held_out], crops[held_out])


def check_counts(options: argparse.Namespace, pictures: Pictures) -> None:
    """Raises ConfigError if the batch exceeds the training pictures or updates are under 2."""
    most = len(pictures.train)
    if not 1 <= options.batch <= most:
        raise ConfigError(
            f"--batch is {options.batch}, expected 1 to {most}, the training pictures"
        )
    if options.updates < 2:
        raise ConfigError(f"--updates is {options.updates}, expected at least 2")


def config_of(options: argparse.Namespace, variant: str) -> ml_collections.ConfigDict:
    """Builds the training config of a variant.

    Raises:
        ConfigError: the sizes do not fit each other, or the folder configs/ is not here.
    """
    try:
        from configs import common
    except ModuleNotFoundError:
        raise ConfigError("no folder configs/ here: run this in the one that has it") from None
    run = common.tokenizer(variant, "S-S" if VARIANTS[variant] else "S-S-2D")
    run.seed = options.seed
    run.model.update(image_size=options.size, patch_size=options.patch, stem="patch", align_block=0)
    run.model.update(
        encoder=options.model, decoder=options.model, latent_tokens=options.latent_tokens
    )
    run.train.update(
        steps=options.updates, global_batch=options.batch, dtype=options.dtype, unroll=""
    )
    if VARIANTS[variant]:
        run.model.decoder_query_init, run.train.first_weights = VARIANTS[variant]
    run.optim.update(learning_rate=options.rate, warmup_steps=options.warmup, schedule="constant")
    run.optim.update(clip=1.0, ema=0.95)
    run.loss.update(discriminator="none", teacher="none", perceptual=0.0, shortcut_end=0)
    run.codebook.warmup_steps = options.updates  # nothing is quantized
    settings.check(run)
    return run


def learn(variant: str, config: ml_collections.ConfigDict, pictures: Pictures) -> Learned:
    """Trains a variant on random batches, reconstructs held-out pictures, returns the outcome."""
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(mesh, config.train.global_batch, config.train.micro_batches)
    parts = networks.build(config, 1)
    program = tokenizer_run.make_program(config, mesh, parts)
    phase = objective.phase_at(0, config.loss, config.codebook)
    rng, losses = np.random.default_rng(config.seed), []
    state = program.create()
    for update in range(config.train.steps):
        rows = rng.choice(len(pictures.train), config.train.global_batch, replace=False)
        images = jax.device_put(pictures.train[rows], program.batch.sharding)
        state, scalars = program(state, images, phase)
        losses.append(scalars["loss"])
        if update == 0:  # which also compiles
            jax.block_until_ready(state)
            start = time.perf_counter()
    losses = np.array(jax.device_get(losses))
    seconds = time.perf_counter() - start
    psnr = held_out_psnr(parts.networks.tokenizer, state.ema_params, pictures.held_out)
    return Learned(variant, losses, psnr, seconds)


def held_out_psnr(module: tokenizer.Tokenizer, params: Any, images: np.ndarray) -> float:
    """Reconstructs images without quantizing their latents; returns the mean PSNR in dB."""

    @jax.jit
    def reconstruct(params, images):
        encoding = module.apply({"params": params}, to_pixels(images), method="encode")
        latents = encoding.quantized.inputs
        return module.apply({"params": params}, latents, method="decode").images

    rebuilt = metrics.to_uint8(reconstruct(params, images))
    return float(metrics.psnr(images, rebuilt).mean())


def cells(row: Learned) -> list[str]:
    """Returns a variant's table row: losses (means of ten updates), PSNR and updates a second."""
    ends = marks(len(row.losses))
    shown = " / ".join(f"{row.losses[max(end - 10, 0) : end].mean():.3f}" for end in ends)
    speed = (len(row.losses) - 1) / row.seconds
    return [row.variant, shown, f"{row.psnr:.2f}", f"{speed:.1f}"]


def marks(updates: int) -> list[int]:
    """Lists the updates at which the table shows the loss."""
    return [max(1, updates * share // 8) for share in (1, 3, 8)]


def table(rows: list[Learned], pictures: Pictures, options: argparse.Namespace) -> str:
    """Returns the results of all variants as a Markdown table, with the settings below it."""
    head = ["start", f"loss after {' / '.join(map(str, marks(options.updates)))}"]
    mean = np.broadcast_to(pictures.train.mean(0).round().astype(np.uint8), pictures.held_out.shape)
    line = f"{metrics.psnr(pictures.held_out, mean).mean():.2f}"
    body = [*map(cells, rows), ["mean training picture", "", line, ""]]
    shown = {k: v for k, v in vars(options).items() if k not in ("pictures", "variants", "out")}
    return (
        markdown.table([*head, "held-out PSNR, dB", "updates/s"], body)
        + f"\n\n{jax.devices()[0].device_kind}, commit {workdir_lib.commit() or 'unknown'}, "
        f"{len(pictures.train)} pictures to learn, {len(pictures.held_out)} held out; "
        + ", ".join(f"{key} {value}" for key, value in shown.items())
    )


def write(folder: pathlib.Path, rows: list[Learned], text: str) -> None:
    """Writes the table, a plot of the losses, and all figures as JSON into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [row._asdict() | {"losses": row.losses.tolist()} for row in rows]
    (folder / "learning.json").write_text(json.dumps(figures, indent=1))
    (folder / "learning.md").write_text(text + "\n")
    (folder / "learning.svg").write_text(plot(rows))


def plot(rows: list[Learned]) -> str:
    """Draws the losses of all variants as the text of an SVG file."""
    label = "{0.variant}, {0.psnr:.1f} dB".format
    return charts.svg_file({label(row): list(enumerate(row.losses.tolist(), 1)) for row in rows})


if __name__ == "__main__":
    main()
