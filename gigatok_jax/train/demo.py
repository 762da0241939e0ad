"""The task `demo`: the whole method on embedded data, from tokenizer and codes to pictures.

The workdir is also the workdir of the tokenizer's run; its folders `codes/`, `prior/` and
`samples/` are the workdirs of the later stages. A stage that was cut off goes on, and a finished
stage is skipped.
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
    """Runs all stages of the demo, then measures how well a classifier reads generated digits.

    Args:
        config: a tokenizer run whose `stages` hold the configs of the others.
        workdir: folder of the run.

    Raises:
        GigatokError, SystemExit: from a stage; the same command then goes on.
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
    """Returns configs of the stages after the tokenizer, set to read earlier stages' folders."""
    stages = config.stages.copy_and_resolve_references()
    stages.codes.checkpoint = stages.prior.tokenizer = stages.samples.tokenizer = str(workdir)
    stages.prior.codes = str(workdir / "codes")
    stages.samples.prior = str(workdir / "prior")
    return stages


def say_stage(line: str) -> None:
    """Prints the heading of a stage of the demo."""
    print(f"\n== {line}", flush=True)


def summarise(config: ml_collections.ConfigDict, workdir: epath.Path, seconds: float) -> None:
    """Writes the results of all stages to one `results.json` and a page, and prints a summary."""
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
    """Measures which shares of generated and of real digits a logistic regression recognises.

    The regression is trained on the same real images as the tokenizer and the prior, reduced to
    8 x 8 pixels. An image is recognised if the regression predicts the class of the image.

    Returns:
        Shares in [0, 1] of the generated images, and of held-out real images.
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
    """Loads all images uint8[b h w 3] and labels i32[b] of a split."""
    source = sources.make_source(config.data, split, config.model.image_size)
    return np.stack([source[i]["image"] for i in range(len(source))]), source.labels


def grey(images: np.ndarray) -> np.ndarray:
    """Reduces images uint8[b h w 3] to means f[b 64] of their first channel over an 8 x 8 grid."""
    side = images.shape[1] // 8
    cells = images[..., 0].reshape(len(images), 8, side, 8, side)
    return cells.mean((2, 4)).reshape(len(images), -1) / 255
