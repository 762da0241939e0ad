"""Tokenizer and Prior as objects, and their pure forms."""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_pair
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gigatok_jax
from gigatok_jax import library
from gigatok_jax.conversion import tokenizer as convert
from gigatok_jax.errors import CheckpointError, ConfigError, DataError, ImmutableError
from gigatok_jax.models import tokenizer as tokenizer_lib
from gigatok_jax.run import checkpoint
from gigatok_jax.weights import write

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def plain_programs():
    """Compiling is most of the time here; what it optimises is not looked at."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def made():
    """A tokenizer with the real modules: 16 px to 4 codes of 32."""
    model = gigatok_jax.model_config("S-S", **tiny.model(image_size=SIZE, patch_size=8))
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


def test_pure_forms_inside_shard_map_and_grad(made):
    """The real modules; on one device the program is checked as on many."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    params, config = made.params, made.config
    images = pictures(2)
    codes = np.asarray(made.encode(images))

    def spread(run, **options):
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec("x")}
        return jax.shard_map(lambda p, x: run(p, x, config), mesh=mesh, **specs, **options)

    def loss(decode, params):
        return jnp.square(decode(params, codes)).mean()

    @jax.jit
    def everything(params, images):
        # jax 0.12 cannot check the axes of erf's gradient, so that check is off.
        sharded = jax.grad(lambda p: loss(spread(gigatok_jax.decode, check_vma=False), p))(params)
        plain = jax.grad(lambda p: loss(lambda p, x: gigatok_jax.decode(p, x, config), p))(params)
        found = spread(gigatok_jax.encode)(params, images)
        return found, spread(gigatok_jax.decode)(params, codes), sharded, plain

    found, decoded, sharded, plain = everything(params, images)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(decoded, made.decode(codes), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sharded, plain)
    used = {name for name in plain if any(np.any(x) for x in jax.tree.leaves(plain[name]))}
    assert used == {"quantizer", "post_quant", "decoder", "cnn_decoder"}


MANY_DEVICES = """
import jax, numpy as np, tiny, tiny_pair, gigatok_jax
from gigatok_jax.models import tokenizer
from jax.sharding import NamedSharding, PartitionSpec as P
tokenizer.make = lambda model, dtype=None, loop=None: tiny.linear_tokenizer()
model, params = tiny_pair.tokenizer()
made = gigatok_jax.Tokenizer(params, model)
images = tiny.images(12)
codes = np.asarray(made.encode(images))
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def spread(run):
    specs = {"in_specs": (P(), P("x")), "out_specs": P("x")}
    return jax.jit(jax.shard_map(lambda p, x: run(p, x, model), mesh=mesh, **specs))
np.testing.assert_array_equal(spread(gigatok_jax.encode)(params, images), codes)
ours = jax.jit(jax.grad(lambda p: (spread(gigatok_jax.decode)(p, codes) ** 2).mean()))(params)
alone = jax.jit(jax.grad(lambda p: (gigatok_jax.decode(p, codes, model) ** 2).mean()))(params)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, alone)
mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
wide = gigatok_jax.Tokenizer(jax.device_put(params, NamedSharding(mesh, P())), model)
np.testing.assert_array_equal(wide.encode(images[:5]), codes[:5])
np.testing.assert_allclose(wide.decode(codes[:5]), made.decode(codes[:5]), atol=1e-5)
"""


def test_many_devices_give_what_one_gives():
    """Inside shard_map, and as an object on a mesh with batches that it does not divide."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers"}
    subprocess.run([sys.executable, "-c", MANY_DEVICES], check=True, cwd=ROOT, env=environment)


def test_eight_threads_get_what_one_gets(made):
    batches = [pictures(count) for count in (1, 2, 3, 4, 5, 6, 7, 8)]
    expected, found = [np.asarray(made.encode(x)) for x in batches], [None] * 8
    assert len({codes.tobytes() for codes in expected}) == 8

    def work(i):
        found[i] = [np.asarray(made.encode(batches[(i + j) % 8])) for j in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, codes in enumerate(found):
        for j, ours in enumerate(codes):
            np.testing.assert_array_equal(ours, expected[(i + j) % 8])


@pytest.fixture
def linear(monkeypatch):
    """A tokenizer of two linear layers, whose programs compile fast."""
    monkeypatch.setattr(
        tokenizer_lib, "make", lambda model, dtype=jnp.float32: tiny.linear_tokenizer(dtype)
    )
    model, params = tiny_pair.tokenizer()
    return gigatok_jax.Tokenizer(params, model)


COMPILED = []  # seconds of every compilation, once a test has asked for them


@contextlib.contextmanager
def compilations():
    """A list that holds what was compiled inside, once it is over."""
    if not COMPILED:
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, seconds, **_: COMPILED.append(seconds) if "backend_compile" in name else 0
        )
        jax.jit(lambda x: x + 1)(np.zeros(3))  # proves that they are heard
        assert COMPILED
    before, found = len(COMPILED), []
    yield found
    found += COMPILED[before:]


def test_fifty_batch_sizes_are_seven_programs(linear):
    images, codes = tiny.images(50), []
    with compilations() as compiled:
        for size in range(1, 51):
            codes.append(np.asarray(linear.encode(images[:size])))
    assert 1 <= len(compiled) <= 7
    for size in range(1, 51):
        np.testing.assert_array_equal(codes[size - 1], codes[-1][:size])


def test_after_warmup_nothing_compiles(linear, monkeypatch):
    monkeypatch.setattr(library, "MOST_IMAGES", 4)
    jax.clear_caches()
    linear.warmup()
    with compilations() as compiled:
        for size in range(7):
            codes = linear.encode(tiny.images(7)[:size])
            assert codes.shape == (size, linear.num_tokens)
        linear.decode(np.asarray(codes)[:4])
    assert not compiled
    model, params = tiny_pair.prior()
    prior = gigatok_jax.Prior(params, model)
    prior.warmup([2], cfg_scale=1.0)
    with compilations() as compiled:
        prior.generate([0, 1], seed=5, cfg_scale=1.0, temperature=0.5)
    assert not compiled


def test_objects_are_immutable(made):
    for name in ("params", "config", "step", "anything"):
        with pytest.raises(ImmutableError, match=f"Tokenizer.{name} cannot be set: make another"):
            setattr(made, name, None)
    with pytest.raises(ImmutableError, match="cannot be deleted"):
        del made.config
    with pytest.raises(AttributeError):
        made.config.rotation = False
    images = pictures(2)
    codes = np.asarray(made.encode(images))
    made.params["pre_quant"]["kernel"] = None
    made.params.clear()
    made.training["weights"] = "none"
    np.testing.assert_array_equal(made.encode(images), codes)
    assert made.training == {}


def test_parameters_of_numpy_are_copied(made):
    params = jax.tree.map(np.array, made.params)
    other = gigatok_jax.Tokenizer(params, made.config)
    for leaf in jax.tree.leaves(params):
        leaf[...] = 0
    assert other.fingerprint == made.fingerprint


def test_config_equals_the_one_it_was_made_of(made):
    model = gigatok_jax.model_config("S-S", **tiny.model(image_size=SIZE, patch_size=8))
    assert made.config == model and model == made.config
    model.rotation = False
    assert made.config != model and model != made.config


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
        (np.zeros((1, 16, 16, 3), int), "images are int64, expected uint8, or floats"),
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


def test_objects_inside_jit_name_the_pure_forms(made):
    with pytest.raises(DataError, match=r"call gigatok_jax\.encode\(params"):
        jax.jit(made.encode)(pictures(1))
    with pytest.raises(DataError, match=r"call gigatok_jax\.decode\(params"):
        jax.jit(made.decode)(np.zeros((1, 4), np.int32))


# Checkpoints


def save(folder, made, ema=True, **extras):
    """A checkpoint of the tokenizer whose EMA copy is twice the trained one."""
    made_tree = jax.tree.map(np.asarray, made.params)
    state = {"params": made_tree}
    if ema:
        state["ema_params"] = jax.tree.map(lambda x: 2 * x, made_tree)
    saver = checkpoint.Checkpoints(folder)
    run = {"name": "ss", "data": {"source": "digits", "folder": "/home/me/data"}}
    saver.save(3, state, {"config": run | {"model": made.config.to_dict()}, **extras})
    saver.close()


def same(ours, theirs):
    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    drop = lambda tree: {k: v for k, v in tree.items() if k != "buffers"}  # noqa: E731
    jax.tree.map(equal, drop(ours), drop(theirs))


def test_a_tokenizer_comes_back_from_its_checkpoint(made, tmp_path):
    save(tmp_path, made)
    raw = gigatok_jax.load_tokenizer(tmp_path, weights="raw")
    assert raw.step == 3 and raw.fingerprint == made.fingerprint
    ema = gigatok_jax.load_tokenizer(tmp_path / "checkpoints" / "3")
    np.testing.assert_array_equal(ema.codebook, 2 * made.codebook)
    run = {"name": "ss", "data": {"source": "digits"}}  # places mean nothing elsewhere
    assert ema.training == {"weights": "ema", "config": run}
    with pytest.raises(CheckpointError, match="holds a tokenizer, expected a prior"):
        gigatok_jax.load_prior(tmp_path)
    with pytest.raises(ConfigError, match="weights is 'best', expected one of auto, ema, raw"):
        gigatok_jax.load_tokenizer(tmp_path, weights="best")
    with pytest.raises(ConfigError, match="no checkpoint is named"):
        gigatok_jax.load_tokenizer("")


def test_without_an_average_the_trained_copy_is_taken(made, tmp_path):
    save(tmp_path, made, ema=False)
    same(gigatok_jax.load_tokenizer(tmp_path).params, made.params)
    with pytest.raises(CheckpointError, match="no entry"):
        gigatok_jax.load_tokenizer(tmp_path, weights="ema")


@pytest.mark.parametrize("place", ["device", "mesh", None])
def test_parameters_are_placed_in_the_type_asked_for(made, tmp_path, place):
    mesh = jax.make_mesh((1,), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    sharding = {"device": jax.devices()[0], "mesh": everywhere, None: None}[place]
    save(tmp_path / "run", made)
    made.save(tmp_path / "folder")
    half = gigatok_jax.Tokenizer(made.params, made.config, jnp.bfloat16)
    for folder in ("run", "folder"):
        weights = "raw" if folder == "run" else "auto"
        at = {"dtype": "bfloat16", "sharding": sharding, "weights": weights}
        found = gigatok_jax.load_tokenizer(tmp_path / folder, **at)
        same(found.params, half.params)
        kind = NamedSharding if place == "mesh" else jax.sharding.SingleDeviceSharding
        assert all(isinstance(x.sharding, kind) for x in jax.tree.leaves(found.params))


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "float64"}, {"sharding": "gpu"}])
def test_types_and_places_that_cannot_be_are_refused(made, tmp_path, options):
    made.save(tmp_path)
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*, expected"):
        gigatok_jax.load_tokenizer(tmp_path, **options)


def test_a_sharding_that_does_not_fit_names_the_parameter(made, tmp_path):
    made.save(tmp_path)
    devices = jax.make_mesh((1,), ("x",))
    deep = NamedSharding(devices, PartitionSpec(None, None, None, "x"))
    with pytest.raises(ConfigError, match="cannot be divided as"):
        gigatok_jax.load_tokenizer(tmp_path, sharding=deep)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_saved_tokenizer_comes_back_bit_for_bit(made, tmp_path, dtype):
    training = {"weights": "ema", "config": {"name": "ss", "data": {"source": "digits"}}}
    fields = {"step": 7, "training": training}
    saved = gigatok_jax.Tokenizer(made.params, made.config, dtype, **fields)
    saved.save(tmp_path / "x", licence="mit")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        *("model.safetensors", "config.json", "README.md")
    }
    for path in (tmp_path / "x", tmp_path / "x" / "model.safetensors"):
        found = gigatok_jax.load_tokenizer(path, dtype)
        same(found.params, saved.params)
        assert found.config == saved.config and (found.step, found.training) == (7, training)
    card = (tmp_path / "x" / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n')
    for fact in ("16 x 16 pixels into 4 codes of a 32 x 8", "Run `ss`, 7 steps; data: digits"):
        assert fact in card
    count = sum(x.size for x in jax.tree.leaves(made.params))
    assert f"| parameters | {count:,} |" in card


def test_parameters_that_do_not_fit_their_config_are_not_saved(made, tmp_path):
    params = made.params
    del params["encoder"]["norm_out"]
    with pytest.raises(CheckpointError, match="have no encoder/norm_out/scale, which"):
        gigatok_jax.Tokenizer(params, made.config).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_arrays_without_a_config_are_refused(made, tmp_path):
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(1, {"params": made.params}, {})
    saver.close()
    with pytest.raises(CheckpointError, match="no config of a model"):
        gigatok_jax.load_tokenizer(tmp_path)


def test_a_folder_of_another_model_stays(made, tmp_path):
    made.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another model"):
        gigatok_jax.Prior(*reversed(tiny_pair.prior())).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        made.save(tmp_path / "README.md")


def test_a_saved_prior_knows_its_classes_and_its_tokenizer(tmp_path):
    model, params = tiny_pair.prior()
    names = ("cat", "dog", "owl")
    known = {"step": 4, "trained_on": "0123456789abcdef", "class_names": names}
    gigatok_jax.Prior(params, model, **known).save(tmp_path)
    found = gigatok_jax.load_prior(tmp_path)
    same(found.params, params)
    assert (found.step, found.trained_on, found.class_names) == tuple(known.values())
    assert "cat, dog, owl" in (tmp_path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="holds a prior, expected a tokenizer"):
        gigatok_jax.load_tokenizer(tmp_path)


def test_the_originals_file_loads_as_it_is(made, tmp_path):
    """Its average by default; the model is recognised."""
    model, params = made.config, jax.tree.map(np.asarray, made.params)
    ema = convert.to_torch(jax.tree.map(lambda x: 2 * x, params), model)
    saved = {"model": convert.to_torch(params, model), "ema": ema, "steps": 9}
    write.write_pt(tmp_path / "x.pt", saved)
    found = gigatok_jax.load_tokenizer(tmp_path / "x.pt")
    assert found.config == model and found.step == 9
    same(found.params, jax.tree.map(lambda x: 2 * x, params))
    same(gigatok_jax.load_tokenizer(tmp_path / "x.pt", weights="raw").params, params)
    back = convert.to_torch(found.params, model)
    assert all((back[name] == value).all() for name, value in ema.items())


def test_loading_never_holds_two_copies(tmp_path):
    """In half the bytes, the host needs that half and one parameter, not the whole beside it."""
    model, params = tiny_pair.prior(width=256, heads=4, layers=6, vocab=512)
    gigatok_jax.Prior(params, model).save(tmp_path)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    gigatok_jax.load_prior(tmp_path, "bfloat16")  # imports are not what is measured
    tracemalloc.start()
    gigatok_jax.load_prior(tmp_path, "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * whole


@pytest.mark.parametrize("name", ["gone", "gone.pt", "gone.safetensors", "empty"])
def test_nothing_there_is_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name) as error:
        gigatok_jax.load_tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)


def test_parameters_of_another_kind_are_refused(made):
    model, params = tiny_pair.prior()
    with pytest.raises(ConfigError, match="config is of a prior, expected one of a tokenizer"):
        gigatok_jax.Tokenizer(params, model)
    with pytest.raises(CheckpointError, match="the parameters have no cnn_encoder"):
        gigatok_jax.Tokenizer(params, made.config)


def test_import_is_light():
    """The package itself imports neither jax nor flax; the first use of a model does."""
    code = (
        "import sys, time; start = time.perf_counter(); import gigatok_jax;"
        "assert 'jax' not in sys.modules and 'Prior' in dir(gigatok_jax);"
        "assert time.perf_counter() - start < 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
