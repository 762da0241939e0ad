"""The task `demo`: the whole method on embedded data, from tokenizer and codes to pictures.

The tokenizer's run is the workdir itself; `codes/`, `prior/` and `samples/` in it are the others.
Each stage goes on where it was cut off and is passed over once it is finished.
"""

import time

import ml_collections
import numpy as np
from etils import epath
from sklearn import linear_model

from gigatok_jax import files
from gigatok_jax.data import sources, transforms
from gigatok_jax.evaluation import generation
from gigatok_jax.run import page, processes
from gigatok_jax.train import ar, extract_codes, tokenizer

STAGES = ("codes", "prior", "samples")


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Runs all stages, then lets a classifier of real digits read the generated ones.

    Args:
        config: a tokenizer run whose `stages` hold the configs of the others.
        workdir: folder of the run.

    Raises:
        GigatokError, SystemExit: as the stages do; the same command then goes on.
    """
    processes.alone(
        "demo", "start one, or train the tokenizer alone with --config.task=train_tokenizer"
    )
    workdir, start = epath.Path(workdir), time.perf_counter()
    stages = connect(config, workdir)
    say_stage("1 of 4: training the tokenizer")
    tokenizer.train(config, workdir)
    say_stage("2 of 4: extracting codes")
    extract_codes.extract(stages.codes, workdir / "codes")
    say_stage("3 of 4: training the prior")
    ar.train(stages.prior, workdir / "prior")
    say_stage("4 of 4: generating")
    generation.generate(stages.samples, workdir / "samples")
    summarise(config, workdir, time.perf_counter() - start)


def connect(config: ml_collections.ConfigDict, workdir: epath.Path) -> ml_collections.ConfigDict:
    """Configs of the later stages, which read the folders of the earlier ones."""
    stages = config.stages.copy_and_resolve_references()
    stages.codes.checkpoint = stages.prior.tokenizer = stages.samples.tokenizer = str(workdir)
    stages.prior.codes = str(workdir / "codes")
    stages.samples.prior = str(workdir / "prior")
    return stages


def say_stage(line: str) -> None:
    """Prints the heading of a stage."""
    print(f"\n== {line}", flush=True)


def summarise(config: ml_collections.ConfigDict, workdir: epath.Path, seconds: float) -> None:
    """Figures of all stages in one `results.json`, and the page of all of them."""
    results = files.read_json(workdir / "results.json")
    for stage in STAGES:
        own = files.read_json(workdir / stage / "results.json")
        results |= {f"{stage}/{name}": value for name, value in own.items()}
    results |= recognition(config, workdir / "samples")
    results.setdefault("all_stages_seconds", seconds)  # a repeated command does nothing
    files.write_json(workdir / "results.json", results)
    real, generated = results["recognised_real"], results["recognised_generated"]
    print(
        f"a classifier of real digits recognises {generated:.1%} of the generated ones, and"
        f" {real:.1%} of real ones that nothing was trained on; page: {page.write(workdir)}",
        flush=True,
    )


def recognition(config: ml_collections.ConfigDict, samples: epath.Path) -> dict[str, float]:
    """Shares of digits that a logistic regression reads as the class that they should be.

    It learns the same real images as the tokenizer and the prior, reduced to 8 x 8 pixels.

    Returns:
        Shares in [0, 1] of the generated images, and of real ones held out from everything.
    """
    images, labels = digits(config, "train")
    reader = linear_model.LogisticRegression(max_iter=2000).fit(grey(images), labels)
    paths = sorted((samples / "images").glob("*.png"))
    class_ids = [int(path.name.split("_")[1]) for path in paths]  # <image>_<class id>_<name>.png
    generated = np.stack([transforms.decode(path) for path in paths])
    held_out, truth = digits(config, "held_out")
    return {
        "recognised_generated": float(reader.score(grey(generated), class_ids)),
        "recognised_real": float(reader.score(grey(held_out), truth)),
    }


def digits(config: ml_collections.ConfigDict, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8[b h w 3] and labels i32[b] of a split."""
    source = sources.make_source(config.data, split, config.model.image_size)
    return np.stack([source[i]["image"] for i in range(len(source))]), source.labels


def grey(images: np.ndarray) -> np.ndarray:
    """uint8[b h w 3] -> f[b 64] in [0, 1], means over an 8 x 8 grid."""
    side = images.shape[1] // 8
    cells = images[..., 0].reshape(len(images), 8, side, 8, side)
    return cells.mean((2, 4)).reshape(len(images), -1) / 255
