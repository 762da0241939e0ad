"""Images of classes, as files: the task `generate`. It goes on where it was cut off.

An image is named by its id. Its class and its draws follow from the id and the settings alone, so
any part of a run can be made again. Axes: b batch, h w pixels.
"""

import dataclasses
import itertools
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from etils import epath

from gigatok_jax import files, library, sampling
from gigatok_jax.data import transforms
from gigatok_jax.errors import ConfigError
from gigatok_jax.evaluation import classes, metrics, pair
from gigatok_jax.run import metric_writer, page, pictures
from gigatok_jax.run import workdir as workdir_lib
from gigatok_jax.run.signals import Interrupts

RECORD, SAMPLES = "generation.json", "samples.npz"
EACH = 8  # images of a class, unless told
FEW = 16  # classes that are all taken when none is named
SHOWN = 16  # images of a class's grid
WRITERS = 8  # threads that encode and write


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be there in the end."""

    config: Any
    workdir: epath.Path
    prior: library.Prior
    tokenizer: library.Tokenizer
    names: classes.Names
    class_ids: Sequence[int]  # of images 0, 1, ... around
    image_ids: Sequence[int]  # ascending

    def class_of(self, image_id: int) -> int:
        return self.class_ids[image_id % len(self.class_ids)]

    def path(self, image_id: int) -> epath.Path:
        class_id = self.class_of(image_id)
        name = f"{image_id:06d}_{class_id:03d}_{_slug(self.names[class_id][0])}.png"
        return self.workdir / "images" / name

    def by_class(self) -> dict[int, list[int]]:
        """Image ids of each class, in the order of class ids."""
        found: dict[int, list[int]] = {class_id: [] for class_id in sorted(set(self.class_ids))}
        for image_id in self.image_ids:
            found[self.class_of(image_id)].append(image_id)
        return {class_id: ids for class_id, ids in found.items() if ids}


def generate(config, workdir: epath.PathLike) -> None:
    """Makes the images that a config asks for and that are not there yet.

    Leaves `images/<image id>_<class id>_<name>.png`, a grid per class under `pictures/`,
    `samples.npz` (arr_0 uint8[b h w 3], arr_1 i64[b] classes, in the order of image ids),
    `generation.json` with all settings, `results.json` and a page.

    Args:
        config: see `configs/generate.py`.
        workdir: folder of the images; one that holds images of the same settings is gone on with.

    Raises:
        GigatokError: whatever the user can change: a setting, a class, checkpoints that do not
            belong together, a folder of other images.
        SystemExit: after a signal, once the images at hand are written; status 128 + its number.
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


def check(config) -> None:
    """Refuses settings that mean nothing, before anything is loaded."""
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
    if jax.process_count() > 1:
        raise ConfigError(
            f"generate writes one folder from one process, here are {jax.process_count()}: start it"
            " on one host, which uses all of its devices"
        )


def open_job(config, workdir: epath.Path) -> Job:
    """Loads both models and says what is asked of them; writes nothing."""
    where = pair.placement(config)
    prior = library.load_prior(config.prior, weights=config.weights_kind, **where)
    tokenizer = library.load_tokenizer(config.tokenizer, **where)
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
    """A name as part of a file's name."""
    return re.sub(r"\W+", "_", name).strip("_")[:40] or "class"


def weights_of(job: Job) -> dict[str, Any]:
    """What made the images: the steps and parameters of both models, and the classes."""
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
    """Writes the record of the settings, or refuses a folder of images from other weights."""
    path, made_by = job.workdir / RECORD, weights_of(job)
    before = files.read_json(path) if path.exists() else {}
    for name in ("prior", "tokenizer", "class_ids"):
        if name in before and before[name] != made_by[name]:
            raise ConfigError(
                f"workdir {job.workdir} holds images of another {name}: {made_by[name]} here and"
                f" {before[name]} there; choose another --workdir"
            )
    record = {
        "settings": job.config.to_dict(),
        **made_by,
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
    """Image ids whose file is not there or not whole."""
    size = job.tokenizer.image_size

    def is_there(image_id):
        path = job.path(image_id)
        return path.exists() and pictures.is_whole(path.read_bytes(), size)

    with futures.ThreadPoolExecutor(WRITERS) as pool:
        there = pool.map(is_there, job.image_ids)
        return {i for i, good in zip(job.image_ids, there, strict=True) if not good}


def make(job: Job, missing: set[int], interrupts: Interrupts) -> tuple[int, float]:
    """Draws and writes the missing images.

    A batch always holds the same ids, those there already among them: an image that is made again
    is the same to the last bit.

    Returns:
        How many are left after a signal, and images per second, without the batch that compiles
        where there are others.
    """
    batches = [ids for ids in _batches(job) if not missing.isdisjoint(ids)]
    if batches:
        size = min(job.config.batch, len(job.image_ids))
        print(f"images to make: {len(missing)}; the first batch of {size} compiles", flush=True)
    writing, left, speed = [], len(missing), Speed()
    with futures.ThreadPoolExecutor(WRITERS) as pool:
        for number, ids in enumerate(batches):
            images = draw(job, ids)
            _finish_all(writing)  # those of the batch before, while this one was drawn
            new = [(job.path(i), x) for i, x in zip(ids, images, strict=True) if i in missing]
            writing = [pool.submit(write_image, *one) for one in new]
            left -= len(new)
            speed.add(len(ids))
            told = speed.line(len(missing) - left, len(missing), len(batches) - number - 1)
            print(told, flush=True)
            if interrupts.received:
                break
        _finish_all(writing)
    return left, speed.rate()


def _batches(job: Job) -> Iterator[Sequence[int]]:
    for start in range(0, len(job.image_ids), job.config.batch):
        yield job.image_ids[start : start + job.config.batch]


def _finish_all(writing: Sequence[futures.Future]) -> None:
    for one in writing:
        one.result()


class Speed:
    """Images per second of batches, of which the first compiles."""

    def __init__(self):
        self._mark = time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._images, self._seconds, self._last = 0, 0.0, 0.0

    def add(self, images: int) -> None:
        """A batch is done."""
        now = time.perf_counter()
        self._mark, self._last = now, now - self._mark
        if self._first is None:
            self._first = images, self._last
        else:
            self._images, self._seconds = self._images + images, self._seconds + self._last

    def rate(self) -> float:
        """0 when nothing was done."""
        images, seconds = self._first or (0, 1.0)
        if self._images:
            images, seconds = self._images, self._seconds
        return images / seconds

    def line(self, done: int, total: int, batches_left: int) -> str:
        left = metric_writer.duration(batches_left * self._last)
        return f"image {done}/{total} | {self.rate():.3g} images/s | {left} left"


def draw(job: Job, image_ids: Sequence[int]) -> np.ndarray:
    """uint8[b h w 3] of these images; all batches of a job have one shape."""
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
    """A PNG that is whole or not there."""
    files.write_bytes(path, pictures.encode(image))


def is_finished(job: Job) -> bool:
    """Whether the files that describe all the images are there, from these images."""
    results, samples = job.workdir / "results.json", job.workdir / SAMPLES
    if not (results.exists() and samples.exists()):
        return False
    return files.read_json(results).get("image_ids") == _described(job.image_ids)


def finish(job: Job, figures: dict[str, Any]) -> None:
    """Grids, npz and at last the results, all from the files of the images."""
    found = job.by_class()
    for class_id, ids in found.items():
        tiles = np.stack([transforms.decode(job.path(i)) for i in ids[:SHOWN]])
        name = _slug(job.names[class_id][0])
        pictures.save_class(job.workdir, class_id, name, pictures.grid(tiles))
    write_npz(job)
    config = job.config
    results = {"images": len(job.image_ids), "classes": len(found), **figures}
    results |= {f"cfg_{name}": value for name, value in config.cfg.items()}
    results |= {name: config[name] for name in ("temperature", "top_k", "top_p", "seed")}
    results |= {"prior_step": job.prior.step, "tokenizer_step": job.tokenizer.step}
    results["image_ids"] = _described(job.image_ids)
    files.write_json(job.workdir / "results.json", results)


def _described(ids: Sequence[int]) -> str:
    """Ascending ids in the form that `classes.numbers` reads: "0-63,100"."""
    ids = np.asarray(ids)
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def write_npz(job: Job) -> None:
    """`samples.npz`, image by image: never more than one in memory."""
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
