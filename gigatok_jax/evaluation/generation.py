"""The task `generate`: writes images of classes as files. A run that was cut off goes on.

An image is named by its id. Its class and its draws follow from the id and the settings alone, so
any image can be generated again. Axes: b batch, h w pixels.
"""

import dataclasses
import itertools
import re
import time
import zipfile
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from gigatok_jax import files, library, sampling
from gigatok_jax.data import transforms
from gigatok_jax.errors import ConfigError
from gigatok_jax.evaluation import classes, metrics, pair
from gigatok_jax.run import metric_writer, page, pictures, processes
from gigatok_jax.run import workdir as workdir_lib
from gigatok_jax.run.signals import Interrupts

RECORD, SAMPLES = "generation.json", "samples.npz"
EACH = 8  # images of a class if the config does not say
FEW = 16  # number of classes up to which all are taken if the config names none
SHOWN = 16  # images in the grid of a class
WRITERS = 8  # threads that encode and write


@dataclasses.dataclass(frozen=True)
class Job:
    """Record of the images to generate, and of models and settings that determine the images."""

    config: ConfigDict
    workdir: epath.Path
    prior: library.Prior
    tokenizer: library.Tokenizer
    names: classes.Names
    class_ids: Sequence[int]  # classes of images 0, 1, ..., repeated for further images
    image_ids: Sequence[int]  # ascending

    def class_of(self, image_id: int) -> int:
        """Returns the class id of an image."""
        return self.class_ids[image_id % len(self.class_ids)]

    def path(self, image_id: int) -> epath.Path:
        """Returns the path of a generated image's PNG file."""
        class_id = self.class_of(image_id)
        name = f"{image_id:06d}_{class_id:03d}_{_slug(self.names[class_id][0])}.png"
        return self.workdir / "images" / name

    def by_class(self) -> dict[int, list[int]]:
        """Groups the image ids by class id, in the order of class ids."""
        ids: dict[int, list[int]] = {}
        for image_id in self.image_ids:
            ids.setdefault(self.class_of(image_id), []).append(image_id)
        return dict(sorted(ids.items()))


def generate(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs the task `generate`: generates the images of a config that its workdir lacks.

    Writes `images/<image id>_<class id>_<name>.png`, a grid per class under `pictures/`,
    `samples.npz` (arr_0 uint8[b h w 3], arr_1 i64[b] classes, in the order of image ids),
    `generation.json` with all settings, `results.json` and a page.

    Args:
        config: see `configs/generate.py`.
        workdir: folder of the images; if it holds images of the same settings, the run goes on.

    Raises:
        ConfigError: a setting or class does not exist, the checkpoints do not belong together, or
            the workdir holds images of other settings.
        CheckpointError: a checkpoint is missing, damaged, or of another kind.
        SystemExit: a signal came; the images of the current batch are written, and the exit status
            is 128 + the signal's number.
    """
    check(config)
    job = open_job(config, epath.Path(workdir))
    workdir_lib.check_workdir(job.workdir, config)
    claim(job)
    workdir_lib.write_environment(job.workdir)
    (job.workdir / "images").mkdir(exist_ok=True)
    start, missing = time.perf_counter(), find_missing(job)
    with Interrupts() as interrupts:
        left, speed = make(job, missing, interrupts)
    if left:
        page.write(job.workdir)
        total = len(job.image_ids)
        print(f"stopped with {total - left} of {total} images; the same command goes on")
        raise SystemExit(128 + interrupts.received)
    if missing or not is_finished(job):
        seconds = time.perf_counter() - start
        finish(job, {"made": len(missing), "seconds": seconds, "images_per_second": speed})
    print(f"images: {len(job.image_ids)}; page: {page.write(job.workdir)}", flush=True)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a wrong setting of image generation, or for more than one process."""
    for name in ("prior", "tokenizer"):
        if not config[name]:
            raise ConfigError(f"{name} is empty: name its workdir with --config.{name}=DIR")
    cfg = config.cfg
    sampling.check_guidance(cfg.scale, cfg.schedule, cfg.start, cfg.end)
    sampling.make_draw(config.temperature, config.top_k, config.top_p)
    lowest = {"batch": 1, "num_images": 0, "seed": 0, "cfg.interval": -1}
    for name, low in lowest.items():
        value = cfg.interval if name == "cfg.interval" else config[name]
        if value < low:
            raise ConfigError(f"{name} is {value}, expected {low} or more")
    pair.compute_type(config.dtype)
    processes.alone("generate", "start it on one host, which uses all of its devices")


def open_job(config: ConfigDict, workdir: epath.Path) -> Job:
    """Makes a generation job: loads prior and tokenizer, and resolves class and image ids."""
    placement = pair.placement(config)
    prior = library.load_prior(config.prior, weights=config.weights_kind, **placement)
    tokenizer = library.load_tokenizer(config.tokenizer, **placement)
    pair.check_tokenizer(prior, tokenizer)
    names = classes.names_of(prior.config.classes, prior.class_names)
    class_ids = _class_ids(config.class_ids, names)
    image_ids = _image_ids(config, EACH * len(class_ids))
    return Job(config, workdir, prior, tokenizer, names, class_ids, image_ids)


def _class_ids(text: str, names: classes.Names) -> list[int]:
    if text.strip():
        return classes.parse(text, names)
    if len(names) > FEW:
        raise ConfigError(
            f"class_ids is empty: name some of the {len(names)} classes, as in"
            " --config.class_ids=207,0-9 or by name, or all"
        )
    return list(range(len(names)))


def _image_ids(config, default: int) -> Sequence[int]:
    if not config.image_ids.strip():
        return range(config.num_images or default)
    if config.num_images:
        raise ConfigError("image_ids and num_images are both given: leave one of them out")
    ids = sorted(classes.numbers(config.image_ids))
    for before, after in itertools.pairwise(ids):
        if before == after:
            raise ConfigError(f"image_ids names {before} twice: an id is one image")
    if not ids:
        raise ConfigError(f"image_ids is {config.image_ids!r}, expected ids like 0-63, 100")
    return ids


def _slug(name: str) -> str:
    """Returns a class's name cut to 40 characters and to letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_")[:40] or "class"


def weights_of(job: Job) -> dict[str, Any]:
    """Returns step and fingerprints of prior and tokenizer, and the class ids, for the record."""
    prior, tokenizer = job.prior, job.tokenizer
    return {
        "prior": {
            "step": prior.step,
            "weights": library.fingerprint(prior.params),
            "trained_on": prior.trained_on,
        },
        "tokenizer": {
            "step": tokenizer.step,
            "weights": library.fingerprint(tokenizer.params),
            "codes": tokenizer.fingerprint,
        },
        "class_ids": list(job.class_ids),
    }


def claim(job: Job) -> None:
    """Writes `generation.json`, the record of a job's settings and models.

    Raises:
        ConfigError: the workdir holds images of another prior, tokenizer or list of classes.
    """
    path, weights = job.workdir / RECORD, weights_of(job)
    before = files.read_json(path) if path.exists() else {}
    for name in ("prior", "tokenizer", "class_ids"):
        if name in before and before[name] != weights[name]:
            raise ConfigError(
                f"workdir {job.workdir} holds images of another {name}: {weights[name]} here and"
                f" {before[name]} there; choose another --workdir"
            )
    record = {
        "settings": job.config.to_dict(),
        **weights,
        "images": len(job.image_ids),
        "images_by_class": {
            str(i): {"name": job.names[i][0], "images": len(ids)}
            for i, ids in job.by_class().items()
        },
        "draws": "keyed by seed, image id and position; the first code has the whole cfg.scale",
        "environment": workdir_lib.describe(),
    }
    files.write_json(path, record)


def find_missing(job: Job) -> set[int]:
    """Returns the ids of a job's images whose file does not exist or is damaged."""
    size = job.tokenizer.image_size

    def is_whole(image_id):
        path = job.path(image_id)
        return path.exists() and pictures.is_whole(path.read_bytes(), size)

    with futures.ThreadPoolExecutor(WRITERS) as pool:
        whole = pool.map(is_whole, job.image_ids)
        return {i for i, good in zip(job.image_ids, whole, strict=True) if not good}


def make(job: Job, missing: set[int], interrupts: Interrupts) -> tuple[int, float]:
    """Generates and writes the missing images of a job.

    A batch always holds the same ids, including images that exist already, so that an image that
    is generated again is the same to the last bit.

    Returns:
        Number of images that are left after a signal, and images per second; with several batches
        the rate leaves out the first batch, which compiles.
    """
    size = min(job.config.batch, len(job.image_ids))
    starts = range(0, len(job.image_ids), job.config.batch)
    batches = [job.image_ids[start : start + job.config.batch] for start in starts]
    batches = [ids for ids in batches if not missing.isdisjoint(ids)]
    if batches:
        print(f"images to make: {len(missing)}; the first batch of {size} compiles", flush=True)
    writing, left = [], len(missing)
    progress = metric_writer.Progress("generated", left, "images")
    with futures.ThreadPoolExecutor(WRITERS) as pool:
        for ids in batches:
            images = draw(job, ids)
            _wait(writing)  # the batch before was written while this one was generated
            new = [(i, x) for i, x in zip(ids, images, strict=True) if i in missing]
            writing = [pool.submit(write_image, job.path(i), x) for i, x in new]
            left -= len(new)
            progress.add(len(new))
            if interrupts.received:
                break
        _wait(writing)
    return left, progress.rate


def _wait(writing: Sequence[futures.Future]) -> None:
    for future in writing:
        future.result()


def draw(job: Job, image_ids: Sequence[int]) -> np.ndarray:
    """Generates images uint8[b h w 3] by id; all batches of a job are computed in one shape."""
    config, count = job.config, len(image_ids)
    if len(job.image_ids) > config.batch:
        image_ids = [*image_ids, *[image_ids[-1]] * (config.batch - count)]
    codes = job.prior.generate(
        [job.class_of(i) for i in image_ids],
        seed=config.seed,
        image_ids=list(image_ids),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        **{f"cfg_{name}": value for name, value in config.cfg.items()},
    )
    return metrics.to_uint8(np.asarray(job.tokenizer.decode(codes)[:count]))


def write_image(path: epath.Path, image: np.ndarray) -> None:
    """Writes an image uint8[h w 3] as a PNG; after a crash the file is whole or does not exist."""
    files.write_bytes(path, pictures.encode(image))


def is_finished(job: Job) -> bool:
    """Whether a job's `results.json` and `samples.npz` exist and name exactly the job's images."""
    results, samples = job.workdir / "results.json", job.workdir / SAMPLES
    if not (results.exists() and samples.exists()):
        return False
    return files.read_json(results).get("image_ids") == _described(job.image_ids)


def finish(job: Job, figures: dict[str, Any]) -> None:
    """Writes a grid per class, `samples.npz` and last `results.json` from the images' files."""
    by_class = job.by_class()
    for class_id, ids in by_class.items():
        tiles = np.stack([transforms.decode(job.path(i)) for i in ids[:SHOWN]])
        name = _slug(job.names[class_id][0])
        pictures.save_class(job.workdir, class_id, name, pictures.grid(tiles))
    write_npz(job)
    config = job.config
    results = {"images": len(job.image_ids), "classes": len(by_class), **figures}
    results |= {f"cfg_{name}": value for name, value in config.cfg.items()}
    results |= {name: config[name] for name in ("temperature", "top_k", "top_p", "seed")}
    results |= {"prior_step": job.prior.step, "tokenizer_step": job.tokenizer.step}
    results["image_ids"] = _described(job.image_ids)
    files.write_json(job.workdir / "results.json", results)


def _described(ids: Sequence[int]) -> str:
    """Formats ascending ids as a text like "0-63,100", which `classes.numbers` reads."""
    ids = np.asarray(ids)
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def write_npz(job: Job) -> None:
    """Writes all images and classes of a job to `samples.npz`, one image at a time in memory."""
    size = job.tokenizer.image_size
    shape = (len(job.image_ids), size, size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    labels = np.array([job.class_of(i) for i in job.image_ids], np.int64)
    with files.draft(job.workdir / SAMPLES) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as into:
            np.lib.format.write_array_header_1_0(into, header)
            for image_id in job.image_ids:
                into.write(transforms.decode(job.path(image_id)).tobytes())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as into:
            np.lib.format.write_array(into, labels)
