"""Sources of images."""

import os

import ml_collections
import numpy as np
import pytest
from PIL import Image

from gigatok_jax.data import pipeline, sources, transforms
from gigatok_jax.errors import ConfigError, DataError


def write(folder, names, size=12):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (size, size + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def data_config(folder="", **changes):
    base = {"source": "folder", "folder": str(folder), "eval_folder": "", "eval_images": 0}
    return ml_collections.ConfigDict(base | {"min_size": 0} | changes)


def test_sub_folders_are_classes_and_the_order_is_sorted(tmp_path):
    names = ["dog/b.JPG", "cat/deep/a.png", "cat/z.webp", "dog/a.jpeg"]
    source = sources.FolderSource(write(tmp_path, names))
    assert source.names == ["cat/deep/a.png", "cat/z.webp", "dog/a.jpeg", "dog/b.JPG"]
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1, 1]
    record = source[2]
    assert record["image"] == (tmp_path / "dog/a.jpeg").read_bytes()
    assert (record["label"], record["name"]) == (1, "dog/a.jpeg")


def test_a_flat_folder_has_no_classes(tmp_path):
    source = sources.FolderSource(write(tmp_path, ["b.png", "a.png"]))
    assert source.class_names == () and source.labels.tolist() == [-1, -1]


def test_other_files_hidden_files_and_empty_folders_are_passed_over(tmp_path):
    write(tmp_path, ["cat/a.png", ".hidden/b.png", "__MACOSX/c.png", "cat/._a.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    source = sources.FolderSource(tmp_path)
    assert source.names == ["cat/a.png"] and source.class_names == ("cat",)


def test_linked_class_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere", ["a.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    assert sources.FolderSource(tmp_path / "data").names == ["cat/a.png"]


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"no images in .*\.jpg.*\.webp"):
        sources.FolderSource(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        sources.FolderSource(tmp_path / "nowhere")


@pytest.mark.parametrize("count, held_out", [(2, 1), (8, 1), (60, 3)])
def test_held_out_images_are_a_fixed_share_and_never_trained_on(tmp_path, count, held_out):
    write(tmp_path, [f"{i:03d}.png" for i in range(count)], size=2)
    train = sources.make_source(data_config(tmp_path), "train", 16)
    rest = sources.make_source(data_config(tmp_path), "held_out", 16)
    assert len(rest) == held_out and len(train) == count - held_out
    assert sorted(train.names + rest.names) == sources.FolderSource(tmp_path).names
    # A new file moves nothing from one side to the other.
    write(tmp_path, ["new.png"], size=2)
    again = sources.make_source(data_config(tmp_path, eval_images=held_out), "train", 16)
    moved = set(train.names) ^ (set(again.names) - {"new.png"})
    assert len(moved) <= 1


def test_held_out_images_can_be_numbered_or_lie_elsewhere(tmp_path):
    write(tmp_path / "a", [f"{i}.png" for i in range(8)])
    write(tmp_path / "b", [f"{i}.png" for i in range(5)])
    config = data_config(tmp_path / "a", eval_images=3)
    assert len(sources.make_source(config, "held_out", 16)) == 3
    assert len(sources.make_source(config, "train", 16)) == 5
    config.eval_folder = str(tmp_path / "b")
    assert len(sources.make_source(config, "train", 16)) == 8
    assert len(sources.make_source(config, "held_out", 16)) == 3
    config.eval_images = 0
    assert len(sources.make_source(config, "held_out", 16)) == 5
    with pytest.raises(DataError, match="eval_images=8"):
        sources.make_source(data_config(tmp_path / "a", eval_images=8), "train", 16)


def test_one_image_is_both_trained_and_evaluated_on(tmp_path):
    write(tmp_path, ["only.png"])
    for split in ("train", "held_out"):
        assert sources.make_source(data_config(tmp_path), split, 16).names == ["only.png"]


def test_bad_settings_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.folder is empty"):
        sources.make_source(data_config(""), "train", 16)
    with pytest.raises(ConfigError, match=r"data\.source is 'imagenet'"):
        sources.make_source(data_config(tmp_path, source="imagenet"), "train", 16)
    with pytest.raises(ConfigError, match="split is 'val'"):
        sources.make_source(data_config(tmp_path), "val", 16)


def test_min_size_names_the_small_image(tmp_path):
    write(tmp_path, [f"{i}.png" for i in range(20)], size=12)
    (tmp_path / "damaged.png").write_bytes(b"nothing")  # counted when read, not here
    assert len(sources.make_source(data_config(tmp_path, min_size=12), "train", 16)) == 20
    Image.new("RGB", (40, 9)).save(tmp_path / "small.png")
    Image.new("RGB", (40, 9)).save(tmp_path / "small_too.png")
    with pytest.raises(DataError, match=r"small\w*.png is 40x9 pixels, data.min_size asks for 12"):
        sources.make_source(data_config(tmp_path, min_size=12), "train", 16)


def test_digits_split_by_class_and_keep_every_image_once():
    parts = [
        sources.make_source(data_config(source="digits"), s, 16) for s in ("train", "held_out")
    ]
    train, held_out = parts
    assert len(train) + len(held_out) == 1797
    assert not {n.split("/")[1] for n in train.names} & {n.split("/")[1] for n in held_out.names}
    share = np.bincount(held_out.labels) / np.bincount(np.concatenate([p.labels for p in parts]))
    assert np.abs(share - 0.1).max() < 0.01
    assert train.class_names == tuple("0123456789")
    few = sources.make_source(data_config(source="digits", eval_images=4), "held_out", 16)
    assert few.names == held_out.names[:4] and len(few) == 4
    np.testing.assert_array_equal(few[3]["image"], held_out[3]["image"])
    assert few[3]["label"] == held_out.labels[3]


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits_are_the_real_ones_enlarged(size):
    from sklearn.datasets import load_digits

    source, digits = sources.DigitsSource("held_out", size), load_digits()
    record = source[7]
    original = int(record["name"].split("/")[1])
    assert record["label"] == digits.target[original]
    image = record["image"]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    block = size // 8  # mean of the pixels that one original pixel became
    small = image[..., 0].reshape(8, block, 8, block).mean((1, 3))
    expected = digits.images[original] * 255 / 16
    assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.97


def test_fingerprint_follows_the_names_and_not_the_place(tmp_path):
    write(tmp_path / "a", ["x/1.png", "y/2.png"])
    write(tmp_path / "b", ["x/1.png", "y/2.png"])
    first = sources.fingerprint(sources.FolderSource(tmp_path / "a"))
    assert first == sources.fingerprint(sources.FolderSource(tmp_path / "b")) and len(first) == 16
    write(tmp_path / "b", ["y/3.png"])
    assert first != sources.fingerprint(sources.FolderSource(tmp_path / "b"))
    digits = [sources.fingerprint(sources.DigitsSource(s, 16)) for s in ("train", "held_out")]
    assert digits[0] != digits[1]


def test_names_that_are_no_text_are_names_too(tmp_path):
    write(tmp_path, ["1.png", "2.png", "3.png"])
    try:
        os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes text alone")
    source = sources.make_source(data_config(tmp_path), "train", 8)
    assert len(source) == 2 and len(sources.fingerprint(source)) == 16


def test_images_at_a_path_are_those_of_a_folder_or_one_file(tmp_path, caplog):
    write(tmp_path, ["b/1.png", "a.png"])
    (tmp_path / "bad.png").write_bytes(b"nothing")
    source = sources.images_at(tmp_path)
    with pipeline.eval_batches(source, 12, 3) as batches:
        (batch,) = batches
    kept = batch["index"][batch["mask"]]
    assert [source.names[i] for i in kept] == ["a.png", "b/1.png"]
    assert batch["image"].shape == (3, 12, 12, 3)
    assert [r.getMessage() for r in caplog.records] == [
        "unreadable image 1: bad.png (not an image)"
    ]
    source = sources.images_at(tmp_path / "a.png")
    assert source.names == ["a.png"] and transforms.decode(source[0]["image"]).shape == (12, 13, 3)
    with (
        pytest.raises(DataError, match=r"none of the 1 images can be read, first bad\.png"),
        pipeline.eval_batches(sources.images_at(tmp_path / "bad.png"), 12, 1) as batches,
    ):
        list(batches)
    with pytest.raises(DataError, match="does not exist"):
        sources.images_at(tmp_path / "nowhere")
