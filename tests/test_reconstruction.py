"""Reconstruction of files and folders under a checkpoint, by the functions that runs use."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from configs import reconstruct as reconstruct_config
from gigatok_jax import library
from gigatok_jax.data import pipeline, sources
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.evaluation import metrics, reconstruction
from gigatok_jax.run import checkpoint


@pytest.fixture(autouse=True, scope="module")
def programs():
    with tiny.small_programs(tiny.session() / "cache"):
        yield


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """LPIPS may or may not be on this machine; these tests do not depend on it."""
    monkeypatch.setattr(reconstruction, "available", lambda name, folder: False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The held-out digits of the run as PNG files, in a sub-folder per class."""
    folder = tmp_path_factory.mktemp("digits")
    source = sources.DigitsSource("held_out", tiny.SIZE)
    for name, record in zip(source.names, source, strict=True):
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(record["image"]).save(path)
    return folder


def run(workdir, source, **values):
    """Results and figures by image of the task."""
    config = reconstruct_config.get_config()
    config.update(checkpoint=str(tiny.finished_run()), input=str(source), **values)
    config.eval.batch = 60
    reconstruction.reconstruct(config, workdir)
    read = lambda name: json.loads((workdir / name).read_text())  # noqa: E731
    return read("results.json"), read("figures.json")


@pytest.fixture(scope="module")
def folder_run(digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reconstructed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "available", lambda name, folder: False)
        return workdir, *run(workdir, digits)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_figures_are_those_of_the_runs_own_evaluation(folder_run):
    _, results, _ = folder_run
    expected = json.loads((tiny.finished_run() / "results.json").read_text())
    for name in ("psnr", "ssim", "codebook_usage", "perplexity"):
        assert results[name] == pytest.approx(expected[name], rel=1e-6), name
    assert (results["images"], results["step"]) == (expected["images"], 8)
    assert "lpips" not in results


def test_every_image_has_its_figures_and_its_picture(folder_run, digits):
    workdir, results, figures = folder_run
    names = sorted(str(path.relative_to(digits)) for path in digits.rglob("*.png"))
    assert sorted(figures) == names
    for name in ("psnr", "ssim"):
        mean = np.mean([image[name] for image in figures.values()])
        assert results[name] == pytest.approx(mean)
    written = workdir / "reconstructions"
    assert sorted(str(p.relative_to(written)) for p in written.rglob("*.png")) == [
        f"{name}.png" for name in names
    ]
    for name in names[:: len(names) // 5]:
        made = pixels(written / f"{name}.png")
        assert made.shape == (tiny.SIZE, tiny.SIZE, 3)
        error = np.square((made.astype(float) - pixels(digits / name)) / 255).mean()
        assert figures[name]["psnr"] == pytest.approx(10 * np.log10(1 / error), rel=1e-3)
    assert len(list((workdir / "pictures").glob("*.png"))) == 1


def test_a_file_alone_is_reconstructed_as_in_its_folder(folder_run, digits, tmp_path):
    _, _, figures = folder_run
    name = sorted(figures)[7]
    results, alone = run(tmp_path, digits / name)
    assert list(alone) == [pathlib.Path(name).name]
    assert results["images"] == 1
    for key, value in figures[name].items():
        assert results[key] == pytest.approx(value, rel=1e-5)


def test_raw_and_averaged_weights_differ(folder_run, digits, tmp_path):
    _, _, figures = folder_run
    name = sorted(figures)[0]
    _, raw = run(tmp_path / "raw", digits / name, weights_kind="raw")
    _, averaged = run(tmp_path / "ema", digits / name, weights_kind="ema")
    (raw,), (averaged,) = raw.values(), averaged.values()
    assert averaged["psnr"] == pytest.approx(figures[name]["psnr"], rel=1e-5)
    assert raw["psnr"] != pytest.approx(averaged["psnr"], rel=1e-4)


def test_other_sizes_are_cropped_and_damaged_files_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    wide = np.random.default_rng(0).integers(0, 256, (50, 90), dtype=np.uint8)
    Image.fromarray(wide).save(folder / "wide.jpg")
    (folder / "bad.png").write_bytes(b"this is no picture")
    told = []
    monkeypatch.setattr(pipeline.logging, "warning", lambda text, *a: told.append(text % a))
    results, figures = run(tmp_path / "run", folder)
    assert list(figures) == ["wide.jpg"] and results["images"] == 1
    assert any(line.startswith("unreadable image 1: bad.png") for line in told)


def test_lpips_is_taken_where_its_weights_are(digits, tmp_path, monkeypatch):
    class Difference:
        def apply(self, variables, images, made):
            return variables["params"] * jnp.abs(images - made).mean((1, 2, 3))

    monkeypatch.setattr(reconstruction, "available", lambda name, folder: name == "lpips-vgg16")
    monkeypatch.setattr(reconstruction, "load_frozen", lambda name, folder: np.float32(2))
    monkeypatch.setattr(reconstruction.perceptual, "LPIPS", Difference)
    one = next(digits.rglob("*.png"))
    results, figures = run(tmp_path, one)
    assert results["lpips"] == figures[one.name]["lpips"] > 0


def test_padding_and_unreadable_images_do_not_count():
    """Two batches of which three images are real: means and codes are of those three."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    made = np.float32(images) / 127.5 - 1 + rng.normal(size=(4, 1, 1, 1)).astype(np.float32) / 9

    def reconstruct(batch):
        which = [int(np.flatnonzero((images == x).all((1, 2, 3)))[0]) for x in batch]
        codes = np.array([[i, i] for i in which], np.int32)
        return reconstruction.Reconstructed(made[which], codes, np.float32(which))

    batches = [
        {"image": images[:2], "mask": np.array([True, True])},
        {"image": images[2:], "mask": np.array([True, False])},
    ]
    figures = reconstruction.evaluate(reconstruct, batches, codebook_size=6)
    rounded = metrics.to_uint8(made[:3])
    assert figures["images"] == 3
    assert figures["lpips"] == pytest.approx(np.mean([0, 1, 2]))
    assert figures["psnr"] == pytest.approx(np.mean(metrics.psnr(images[:3], rounded)))
    assert figures["ssim"] == pytest.approx(np.mean(metrics.ssim(images[:3], rounded)))
    assert figures["codebook_usage"] == pytest.approx(3 / 6)
    assert figures["perplexity"] == pytest.approx(3)


def test_the_exact_rows_are_decoded():
    """Not the rotated latents, which differ from them by rounding."""
    module = tiny.linear_tokenizer()
    params = tiny.first_state(tiny.networks(), tiny.config()).params
    images = tiny.images(3)
    out = reconstruction.make_reconstruct(module)(params, images)
    again = module.apply({"params": params}, out.codes, method="decode_codes").images
    np.testing.assert_allclose(out.images, again, rtol=0, atol=1e-5)
    assert out.lpips is None and out.images.dtype == jnp.float32


def test_evaluation_sees_each_held_out_image_once():
    source = sources.DigitsSource("held_out", tiny.SIZE)
    seen = []

    def reconstruct(batch):
        seen.append(len(batch))
        codes = np.zeros((len(batch), 1), np.int32)
        return reconstruction.Reconstructed(np.zeros(batch.shape, np.float32), codes, None)

    with pipeline.eval_batches(source, tiny.SIZE, 60) as batches:
        figures = reconstruction.evaluate(reconstruct, batches, 4)
    assert figures["images"] == len(source)
    assert set(seen) == {60}  # one shape, one program


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"input": ""}, ConfigError, "input is empty"),
        ({"checkpoint": ""}, ConfigError, "checkpoint is empty"),
        ({"checkpoint": "/no/such/run"}, CheckpointError, "/no/such/run does not exist"),
        ({"weights_kind": "best"}, ConfigError, "'best', expected one of auto"),
        ({"input": "/no/such/file.png"}, DataError, "/no/such/file.png does not exist"),
        ({"eval": {"batch": 0}}, ConfigError, "eval.batch is 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, values, error, message):
    config = reconstruct_config.get_config()
    config.update({"checkpoint": str(tiny.finished_run()), "input": "x.png"} | values)
    with pytest.raises(error, match=message) as refused:
        reconstruction.reconstruct(config, tmp_path / "run")
    assert "\n" not in str(refused.value)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"this is no picture")
    with pytest.raises(DataError, match=r"none of the 1 images can be read, first bad\.png"):
        run(tmp_path / "run", tmp_path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, {"weights": jnp.ones(2)}, {})
    checkpoints.close()
    with pytest.raises(CheckpointError, match="has no entry"):
        library.load_tokenizer(tmp_path)


def test_one_step_of_a_run_can_be_named():
    path = tiny.finished_run() / "checkpoints"
    early, late = (library.load_tokenizer(path / step) for step in ("2", "8"))
    newest = library.load_tokenizer(path)
    assert (early.step, late.step, newest.step) == (2, 8, 8)
    assert all(
        np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, (late.params, newest.params)), strict=True)
    )
