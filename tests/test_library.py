"""Tokenizer and Prior as objects, and their pure forms."""

import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import gigatok_jax
from gigatok_jax import checkpoint, library
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.models import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 16


@pytest.fixture(scope="module")
def made():
    """A tokenizer with the real modules: 16 px to 4 codes of 32."""
    fields = tiny.model(image_size=SIZE, patch_size=8, encoder="pico", decoder="pico")
    model = gigatok_jax.model_config("S-S", **fields | {"query_init": "mean"})
    images = jnp.zeros((1, SIZE, SIZE, 3))
    shapes = jax.eval_shape(tokenizer_lib.make(model).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, shapes)
    return gigatok_jax.Tokenizer(params, model)


def pictures(count):
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def test_padding_and_cutting_change_nothing(made, monkeypatch):
    images = pictures(7)
    codes = np.asarray(made.encode(images))
    assert codes.shape == (7, made.num_tokens) == (7, 4)
    one_by_one = np.concatenate([made.encode(images[i : i + 1]) for i in range(7)])
    np.testing.assert_array_equal(codes, one_by_one)
    decoded = np.asarray(made.decode(codes))
    assert decoded.dtype == np.float32 and decoded.shape == images.shape
    np.testing.assert_allclose(np.asarray(made.decode(codes[2:3])), decoded[2:3], atol=1e-5)
    monkeypatch.setattr(library, "MOST_IMAGES", 4)
    np.testing.assert_array_equal(made.encode(images), codes)
    assert made.encode(images[:0]).shape == (0, 4)


def test_objects_are_their_pure_forms(made):
    images = pictures(2)
    params, config = made.params, made.config
    encode = jax.jit(lambda params, images: gigatok_jax.encode(params, images, config))
    codes = encode(params, images)
    np.testing.assert_array_equal(codes, made.encode(images))
    floats = images.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(made.encode(floats), codes)
    decode = jax.jit(lambda params, codes: gigatok_jax.decode(params, codes, config))
    np.testing.assert_allclose(decode(params, codes), made.decode(codes), atol=1e-5)


def test_eight_threads_get_what_one_gets(made):
    batches = [pictures(count) for count in (1, 2, 3, 4, 5, 6, 7, 8)]
    expected, found = [np.asarray(made.encode(x)) for x in batches], [None] * 8

    def work(i):
        found[i] = np.asarray(made.encode(batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_half_precision_keeps_codebook_and_fingerprint(made):
    half = gigatok_jax.Tokenizer(made.params, made.config, jnp.bfloat16)
    assert half.params["pre_quant"]["kernel"].dtype == jnp.bfloat16
    assert half.codebook.dtype == jnp.float32
    assert half.fingerprint == made.fingerprint
    assert half.decode(made.encode(pictures(1))).dtype == jnp.float32


def test_fingerprint_is_of_what_decides_codes(made):
    def changed(part):
        params = dict(made.params, **{part: jax.tree.map(lambda x: x + 1, made.params[part])})
        return gigatok_jax.Tokenizer(params, made.config).fingerprint

    assert changed("encoder") != made.fingerprint
    assert changed("quantizer") != made.fingerprint
    assert changed("decoder") == made.fingerprint


@pytest.mark.parametrize("axes", [("data", "fsdp", "tensor"), ("x",)])
def test_parameters_may_lie_on_any_mesh(made, axes):
    """Also on one with explicit axes, jax's default."""
    mesh = jax.make_mesh((1,) * len(axes), axes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = gigatok_jax.Tokenizer(jax.device_put(made.params, everywhere), made.config)
    images = pictures(3)
    np.testing.assert_array_equal(spread.encode(images), made.encode(images))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"images are \(2, 8, 8, 3\), expected \[b, 16, 16, 3\]"),
        (np.zeros((16, 16, 3), np.uint8), "expected"),
        (np.zeros((1, 16, 16, 1), np.uint8), "expected"),
    ],
)
def test_images_of_another_size_are_refused(made, images, words):
    with pytest.raises(DataError, match=words):
        made.encode(images)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (np.zeros((1, 5), np.int32), r"codes are \(1, 5\), expected \[b, 4\]"),
        (np.full((1, 4), 32), "codes go from 32 to 32, expected 0 to 31"),
        (np.full((1, 4), -1), "codes go from -1"),
        (np.zeros((1, 4)), "codes are float64, expected integers"),
    ],
)
def test_codes_that_cannot_be_are_refused(made, codes, words):
    with pytest.raises(DataError, match=words):
        made.decode(codes)


def save(folder, made, **extras):
    """A checkpoint of the tokenizer whose EMA copy is twice the trained one."""
    made_tree = jax.tree.map(np.asarray, made.params)
    state = {"params": made_tree, "ema_params": jax.tree.map(lambda x: 2 * x, made_tree)}
    saver = checkpoint.Checkpoints(folder)
    saver.save(3, state, {"config": {"model": made.config.to_dict()}, **extras})
    saver.close()


def test_a_tokenizer_comes_back_from_its_checkpoint(made, tmp_path):
    save(tmp_path, made)
    raw = gigatok_jax.load_tokenizer(tmp_path, weights="raw")
    assert raw.step == 3 and raw.fingerprint == made.fingerprint
    ema = gigatok_jax.load_tokenizer(tmp_path / "checkpoints" / "3")
    np.testing.assert_array_equal(ema.codebook, 2 * made.codebook)
    with pytest.raises(CheckpointError, match="holds a tokenizer, expected a prior"):
        gigatok_jax.load_prior(tmp_path)
    with pytest.raises(ConfigError, match="weights are 'best', expected one of auto, ema, raw"):
        gigatok_jax.load_tokenizer(tmp_path, weights="best")
    with pytest.raises(ConfigError, match="no checkpoint is named"):
        gigatok_jax.load_tokenizer("")


def test_import_is_light():
    """The package itself imports neither jax nor flax; the first use of a model does."""
    code = (
        "import sys, gigatok_jax; assert 'jax' not in sys.modules and 'Prior' in dir(gigatok_jax)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
