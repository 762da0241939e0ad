r"""Whether a tokenizer learns own pictures: starts of the 1D model beside the 2D one.

    python -m gigatok_jax.benchmarks.learning PICTURES --out=runs/learning
    python -m gigatok_jax.benchmarks.learning PICTURES --variants 2d last_level --updates=2000
    python -m gigatok_jax.benchmarks.learning PICTURES --size=256 --patch=16 --model=small \
        --latent_tokens=256 --rate=2e-4 --warmup=50 --dtype=bfloat16

PICTURES is a folder or a tar file of images. Every tenth is held out. The step is the run's own
with the least in the way: one linear layer per patch instead of the CNN, squared error of pixels
alone, nothing quantized. What counts is the PSNR of held-out reconstructions by the EMA copy after
the same number of updates. The mean training picture is the line that a collapsed model reaches.
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

from gigatok_jax import command_line, environment, parallel
from gigatok_jax.data import sources, transforms
from gigatok_jax.errors import ConfigError, DataError
from gigatok_jax.evaluation import metrics
from gigatok_jax.model_config import SIZES, validate
from gigatok_jax.ops.image import to_pixels
from gigatok_jax.train import networks, objective
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
COLORS = ("#888888", "#b07aa1", "#edc948", "#f28e2b", "#59a14f", "#4e79a7", "#e15759")


class Pictures(NamedTuple):
    train: np.ndarray  # uint8[n s s 3]
    held_out: np.ndarray  # uint8[m s s 3]


class Learned(NamedTuple):
    variant: str
    losses: np.ndarray  # f32[updates]
    psnr: float  # dB, mean over held-out pictures
    seconds: float  # of all updates, without compiling


def main() -> None:
    """Prints a table; with `--out` writes it and a plot of the losses too."""
    given = arguments()
    with command_line.one_line_errors():
        pictures = read(given.pictures, given.size)
        configs = {name: config(given, name) for name in given.variants}
        check_counts(given, pictures)
        rows = []
        for name in given.variants:
            rows.append(learn(name, configs[name], pictures))
            print(line(rows[-1]), flush=True)
        print("\n" + table(rows, pictures, given))
        if given.out:
            write(pathlib.Path(given.out), rows, table(rows, pictures, given))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
    add("--dtype", choices=networks.DTYPES, default="float32")
    add("--seed", type=int, default=0)
    add("--out", default="", help="folder for learning.json, learning.md and learning.svg")
    return parser.parse_args()


def read(path: str, size: int) -> Pictures:
    """Centre crops of all images of a folder or tar file, by sorted name.

    Raises:
        DataError: no such folder or file, no images in it, one that cannot be read, or too few.
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
    if len(source) < HELD_OUT:
        raise DataError(f"{len(source)} pictures, expected at least {HELD_OUT}")
    crops = [transforms.center_crop(transforms.decode(row["image"]), size) for row in source]
    held_out = np.arange(len(crops)) % HELD_OUT == HELD_OUT - 1
    crops = np.stack(crops)
    return Pictures(crops[~held_out], crops[held_out])


def check_counts(given: argparse.Namespace, pictures: Pictures) -> None:
    most = len(pictures.train)
    if not 1 <= given.batch <= most:
        raise ConfigError(f"--batch is {given.batch}, expected 1 to {most}, the training pictures")
    if given.updates < 2:
        raise ConfigError(f"--updates is {given.updates}, expected at least 2")


def config(given: argparse.Namespace, variant: str) -> ml_collections.ConfigDict:
    """Training config of a variant; ConfigError where the sizes do not fit each other."""
    try:
        from configs import common
    except ModuleNotFoundError:
        raise ConfigError("no folder configs/ here: run this in the one that has it") from None
    run = common.tokenizer(variant, "S-S" if VARIANTS[variant] else "S-S-2D")
    run.seed = given.seed
    run.model.update(image_size=given.size, patch_size=given.patch, stem="patch", align_block=0)
    run.model.update(encoder=given.model, decoder=given.model, latent_tokens=given.latent_tokens)
    run.train.update(steps=given.updates, global_batch=given.batch, dtype=given.dtype, unroll="")
    if VARIANTS[variant]:
        run.model.decoder_query_init, run.train.first_weights = VARIANTS[variant]
    run.optim.update(learning_rate=given.rate, warmup_steps=given.warmup, schedule="constant")
    run.optim.update(clip=1.0, ema=0.95)
    run.loss.update(discriminator="none", teacher="none", perceptual=0.0, shortcut_end=0)
    run.codebook.warmup_steps = given.updates  # nothing is quantized
    validate(run.model)
    return run


def learn(variant: str, config: ml_collections.ConfigDict, pictures: Pictures) -> Learned:
    """Trains a variant on random batches and reconstructs the held-out pictures."""
    mesh = parallel.make_mesh(config.mesh)
    parts = networks.build(config, 1)
    program = tokenizer_run.make_program(config, mesh, parts)
    phase = objective.phase_at(0, config.loss, config.codebook)
    rng, losses = np.random.default_rng(config.seed), []
    with jax.set_mesh(mesh):
        state, step = program.create(), program.make_step(1)
        for update in range(config.train.steps):
            rows = rng.choice(len(pictures.train), config.train.global_batch, replace=False)
            images = jax.device_put(pictures.train[rows], program.batch.sharding)
            state, scalars = step(state, images, program.frozen, phase)
            losses.append(scalars["loss"])
            if update == 0:
                start = time.perf_counter() if jax.block_until_ready(state) else None
        losses = np.array(jax.device_get(losses))
        seconds = time.perf_counter() - start
        psnr = held_out_psnr(parts.networks.tokenizer, state.ema_params, pictures.held_out)
    return Learned(variant, losses, psnr, seconds)


def held_out_psnr(module, params: Any, images: np.ndarray) -> float:
    """Mean PSNR in dB of reconstructions whose latents are not quantized."""

    @jax.jit
    def reconstruct(params, images):
        encoding = module.apply({"params": params}, to_pixels(images), method="encode")
        latents = encoding.quantized.inputs
        return module.apply({"params": params}, latents, method="decode").images

    rebuilt = metrics.to_uint8(reconstruct(params, images))
    return float(metrics.psnr(images, rebuilt).mean())


def line(row: Learned) -> str:
    """Markdown row: loss at a few updates (means of ten), PSNR and updates a second."""
    ends = marks(len(row.losses))
    shown = " / ".join(f"{row.losses[max(end - 10, 0) : end].mean():.3f}" for end in ends)
    speed = (len(row.losses) - 1) / row.seconds
    return f"| {row.variant} | {shown} | {row.psnr:.2f} | {speed:.1f} |"


def marks(updates: int) -> list[int]:
    return [max(1, updates * share // 8) for share in (1, 3, 8)]


def table(rows: list[Learned], pictures: Pictures, given: argparse.Namespace) -> str:
    """Markdown with the settings below it."""
    ends = " / ".join(map(str, marks(given.updates)))
    mean = np.broadcast_to(pictures.train.mean(0).round().astype(np.uint8), pictures.held_out.shape)
    settings = {k: v for k, v in vars(given).items() if k not in ("pictures", "variants", "out")}
    return "\n".join(
        [
            f"| start | loss after {ends} | held-out PSNR, dB | updates/s |\n|---|---|---|---|",
            *map(line, rows),
            f"| mean training picture | | {metrics.psnr(pictures.held_out, mean).mean():.2f} | |",
            f"\n{jax.devices()[0].device_kind}, commit {environment.software()['commit']}, "
            f"{len(pictures.train)} pictures to learn, {len(pictures.held_out)} held out; "
            + ", ".join(f"{key} {value}" for key, value in settings.items()),
        ]
    )


def write(folder: pathlib.Path, rows: list[Learned], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = [row._asdict() | {"losses": row.losses.tolist()} for row in rows]
    (folder / "learning.json").write_text(json.dumps(found, indent=1))
    (folder / "learning.md").write_text(text + "\n")
    (folder / "learning.svg").write_text(plot(rows))


def plot(rows: list[Learned], width: int = 720, height: int = 400) -> str:
    """SVG of the losses, means of ten updates, on a logarithmic scale."""
    curves = {r.variant: [c.mean() for c in np.array_split(r.losses, -(-len(r.losses) // 10))]
              for r in rows}  # fmt: skip
    logs = np.log(np.maximum(np.concatenate(list(curves.values())), 1e-6))
    low, high = logs.min(), max(logs.max(), logs.min() + 1e-3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="16">loss {np.exp(high):.3g} (top) to {np.exp(low):.3g} (bottom), '
        f"logarithmic; {len(rows[0].losses)} updates</text>",
    ]
    for i, (name, curve) in enumerate(curves.items()):
        x = np.linspace(8, width - 170, len(curve))
        y = 24 + (height - 32) * (high - np.log(np.maximum(curve, 1e-6))) / (high - low)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        color = COLORS[i % len(COLORS)]
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{points}"/>')
        label = f'<text x="{width - 160}" y="{40 + 18 * i}" fill="{color}">{name}'
        parts.append(f"{label}, {rows[i].psnr:.1f} dB</text>")
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    main()
