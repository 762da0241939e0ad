"""Checkpoints of every format, the commands that convert them, and files that are refused."""

import json
import os
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gigatok_jax.conversion import __main__, ar
from gigatok_jax.conversion import tokenizer as convert
from gigatok_jax.errors import CheckpointError, ConfigError
from gigatok_jax.model_config import model_config
from gigatok_jax.run import checkpoint
from gigatok_jax.weights import read, recognise, safetensors_file, tables, torch_file, write

SMALL = {"encoder": "pico", "decoder": "pico", "codebook_size": 32, "latent_tokens": 4}
SMALL |= {"cnn_channels": 32, "patch_size": 4, "image_size": 16, "align_width": 8}
PRIOR = {"layers": 2, "heads": 1, "width": 64, "vocab": 32, "tokens": 4, "classes": 3}


def small(name="S-S", **fields):
    return model_config(name, **(PRIOR if name.startswith("prior") else SMALL) | fields)


def random_state(model, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = recognise.tensor_shapes(model)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def command(*arguments) -> int:
    return __main__.main([str(argument) for argument in arguments])


def refused(capfd, *arguments) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    message = ended.value.code
    assert message.startswith("error: ") and "\n" not in message
    assert "Traceback" not in capfd.readouterr().err
    return message


@pytest.fixture
def file(tmp_path):
    """A training file of the original's form, and the states in it."""
    model = small()
    state, average = random_state(model), random_state(model, 1)
    average["quantize.codebook_used"][:] = 0  # the original's average never gets any
    write.write_pt(tmp_path / "0000007.pt", {"model": state, "ema": average, "steps": 7})
    return tmp_path / "0000007.pt", state, average


def equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


# Formats.


def test_every_format_gives_the_same_weights(file, tmp_path):
    path, state, average = file
    command("from_torch", path, tmp_path / "x" / "model.safetensors")
    command("from_torch", path, tmp_path / "run")
    command("to_torch", tmp_path / "run", tmp_path / "back.pt")
    command("to_torch", tmp_path / "x", tmp_path / "only.pt")
    for place in (path, tmp_path / "run", tmp_path / "run" / "checkpoints" / "7", "back.pt"):
        equal(read.read(tmp_path / place, "raw").state, state)
        found = read.read(tmp_path / place)
        equal(found.state, average)
        assert found.config == small() and found.kind == "tokenizer"
        assert found.extras["step"] == 7 and found.extras["weights"] == "ema"
    for place in ("x", "x/model.safetensors", "only.pt"):
        equal(read.read(tmp_path / place).state, average)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["weights"] == "ema"
    assert not list(tmp_path.glob("**/*.draft"))


def test_the_average_stands_in_for_no_weights_that_are_not_there(file, tmp_path):
    path, _, _ = file
    command("from_torch", path, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="no raw weights, only ema"):
        read.read(tmp_path / "x.safetensors", "raw")


def test_a_prior_is_read_as_trained_unless_asked_otherwise(tmp_path):
    model = small("prior-B")
    state, average = random_state(model), random_state(model, 1)
    write.write_pt(tmp_path / "x.pt", {"model": state, "ema": average, "steps": 3})
    equal(read.read(tmp_path / "x.pt").state, state)
    equal(read.read(tmp_path / "x.pt", "ema").state, average)
    assert read.read(tmp_path / "x.pt").config == model


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_stays_until_a_run_goes_on(tmp_path, dtype, wrapped):
    model = small("prior-B")
    state = random_state(model, dtype=dtype)
    write.write_pt(tmp_path / "x.pt", {"model": state} if wrapped else state)
    command("from_torch", tmp_path / "x.pt", tmp_path / "x.safetensors")
    equal(read.read(tmp_path / "x.safetensors").state, state)
    command("from_torch", tmp_path / "x.pt", tmp_path / "run")
    widened = {name: tensor.astype(np.float32) for name, tensor in state.items()}
    equal(read.read(tmp_path / "run").state, widened)


def test_our_patches_are_kept_under_names_of_our_own(tmp_path):
    model = small(stem="patch", cnn_channels=128)
    state = random_state(model)
    assert "encoder.embed.weight" in state
    write.write_safetensors(tmp_path / "model.safetensors", state, model)
    found = read.read(tmp_path)
    equal(found.state, state)
    assert found.config == model and convert.infer_config(state) == model
    assert tables.entries(model)


def test_safetensors_are_those_of_everybody(tmp_path):
    import safetensors.numpy

    state = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.int64)}
    state["c"] = np.ones((3,), ml_dtypes.bfloat16)
    safetensors_file.save(tmp_path / "x.safetensors", state, {"config": "{}"})
    equal(dict(sorted(safetensors.numpy.load_file(tmp_path / "x.safetensors").items())), state)
    safetensors.numpy.save_file(state, tmp_path / "y.safetensors")
    promises, metadata = safetensors_file.load(tmp_path / "y.safetensors")
    equal({name: promises[name].read() for name in sorted(promises)}, state)
    assert metadata == {}


def test_safetensors_that_are_not_on_a_local_disk(tmp_path, monkeypatch):
    state = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.int64)}
    state["c"] = np.arange(3).astype(ml_dtypes.bfloat16)
    safetensors_file.save(tmp_path / "x.safetensors", state, {})
    monkeypatch.setattr(safetensors_file.os.path, "exists", lambda path: False)
    promises, _ = safetensors_file.load(tmp_path / "x.safetensors")
    equal({name: promises[name].read() for name in sorted(promises)}, state)


def test_a_config_of_another_model_is_not_overwritten(tmp_path):
    model = small("prior-B")
    write.write_safetensors(tmp_path / "a.safetensors", random_state(model), model)
    with pytest.raises(CheckpointError, match=r"config\.json belongs to another model"):
        other = small("prior-B", tokens=8)
        write.write_safetensors(tmp_path / "b.safetensors", random_state(other), other)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.safetensors", "config.json"]


# Recognition.

VARIANTS = {
    "1d": {},
    "qk_norm": {"qk_norm": True},
    "attention": {"cnn_attention": True},
    "learnable": {"query_init": "learnable", "decoder_query_init": "learnable"},
    "plain": {"depth_to_space": False, "adaptive_group_norm": False},
    "teacher": {"align_width": 12},
    "2d": {"kind": "2d"},
    "2d_qformer": {"kind": "2d", "layer_2d": "qformer"},
    "nano": {"encoder": "nano", "codebook_width": 4, "image_size": 32, "latent_tokens": 16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tokenizer_is_recognised(variant):
    model = small(**VARIANTS[variant])
    if model.kind == "2d":
        model.latent_tokens = 256  # which it does not have
    assert convert.infer_config(random_state(model)) == model


@pytest.mark.parametrize("fields", [
    {}, {"adaln": "full"}, {"adaln": "shared"}, {"qk_norm": True, "heads": 4},
    {"rope": True, "tokens": 256}, {"width": 128, "heads": 2, "kv_heads": 1},
])  # fmt: skip
def test_a_prior_is_recognised(fields):
    model = small("prior-B", **fields)
    assert ar.infer_config(random_state(model)) == model


def test_what_does_not_show_is_printed_and_can_be_overridden(capsys):
    state = random_state(small())
    convert.infer_config(state)
    told = capsys.readouterr().out
    for field in ("l2_norm=True", "rotation=True", "align_block=3", "query_init='multi_level'"):
        assert field in told
    found = convert.infer_config(state, rotation=False, query_init="mean")
    assert (found.rotation, found.query_init) == (False, "mean")
    assert "rotation" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no field 'rotations'"):
        convert.infer_config(state, rotations=False)


def test_recognition_looks_at_shapes_alone():
    class Outline:
        def __init__(self, shape):
            self.shape = shape

    state = {name: Outline(shape) for name, shape in recognise.tensor_shapes(small()).items()}
    assert convert.infer_config(state) == small()
    assert recognise.published_name(model_config("XL-XXL")) == "XL-XXL"


# Commands.


def test_compare_tells_names_and_the_largest_difference(tmp_path, capsys):
    model = small("prior-B")
    state = random_state(model)
    other = {name: np.array(tensor) for name, tensor in state.items()}
    other["norm.weight"][3] += 0.25
    write.write_pt(tmp_path / "a.pt", {"model": state})
    write.write_safetensors(tmp_path / "b.safetensors", other, model)
    assert command("compare", tmp_path / "a.pt", tmp_path / "b.safetensors") == 1
    assert "0.25: norm.weight" in capsys.readouterr().out
    there = (tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert command("compare", *there, "--tolerance=0.3") == 0
    assert "largest difference 0.25, of norm.weight" in capsys.readouterr().out
    other["more"] = other.pop("output.weight")
    write.write_pt(tmp_path / "c.pt", {"model": other})
    assert command("compare", tmp_path / "a.pt", tmp_path / "c.pt", "--tolerance=1") == 1
    told = capsys.readouterr().out
    assert "missing: output.weight" in told and "extra: more" in told


def test_inspect_tells_what_a_file_is(file, capsys):
    path, state, _ = file
    assert command("inspect", path) == 0
    told = capsys.readouterr().out
    assert "tokenizer at step 7" in told and "codebook_size=32" in told
    assert f"ema: {len(state)} tensors" in told


def test_overrides_reach_the_config(file, tmp_path):
    command("from_torch", file[0], tmp_path / "x.safetensors", "--set", "rotation=false")
    assert read.read(tmp_path / "x.safetensors").config == small(rotation=False)


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = random_state(small("prior-B"))
    write.write_pt("x.pt", {"model": state})
    command("from_torch", "x.pt", "run")
    command("to_torch", "run", "y.pt")
    command("to_torch", "run", "y.safetensors")
    assert command("compare", "run", "y.pt") == command("compare", "x.pt", "y.safetensors") == 0


def test_what_is_there_is_not_overwritten(file, tmp_path, capfd):
    (tmp_path / "x.safetensors").write_text("mine")
    message = refused(capfd, "from_torch", file[0], tmp_path / "x.safetensors")
    assert "is there already" in message
    assert (tmp_path / "x.safetensors").read_text() == "mine"


# Files that are refused: each with one line, nothing run and nothing left behind.


class Dangerous:
    """Runs a command when unpickled by anything that trusts the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def header(table, data=b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def safetensors_of(**entry) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return header({"w": entry}, bytes(8))


def archive(path: pathlib.Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickled)


OPTIMIZER = "optimizer is not the state"


def damaged_files(folder: pathlib.Path):
    """(path, piece of the message) of each."""
    model = small("prior-B")
    state = random_state(model)

    def pt(name, saved):
        torch_file.save(folder / name, saved)
        return folder / name

    def raw(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    whole = pt("whole.pt", {"model": state}).read_bytes()
    yield raw("cut.pt", whole[: len(whole) // 2]), "damaged"
    yield raw("magic.pt", b"PNG" + whole[3:400]), "damaged"
    yield raw("empty.pt", b""), "is empty"
    yield folder / "nothing.pt", "no such file"
    (folder / "folder.pt").mkdir()
    yield folder / "folder.pt", "has no checkpoint"
    archive(folder / "code.pt", pickle.dumps(Dangerous(folder / "ran"), protocol=2))
    yield folder / "code.pt", "system, which is not a tensor"
    (folder / "old.pt").write_bytes(pickle.dumps(Dangerous(folder / "ran"), protocol=2))
    yield folder / "old.pt", "system, which is not a tensor"
    archive(folder / "list.pt", pickle.dumps([1, 2], protocol=2))
    yield folder / "list.pt", "holds a list"
    bad = dict(state, **{"layers.1.ffn_norm.weight": np.full(64, np.nan, np.float32)})
    yield pt("nan.pt", {"model": bad}), r"layers.1.ffn_norm.weight holds 64 values that are not"
    bad = {name: tensor for name, tensor in state.items() if name != "layers.1.attention.wo.weight"}
    yield pt("missing.pt", bad), "1 tensors are missing, first layers.1.attention.wo.weight"
    bad = {name: tensor for name, tensor in state.items() if not name.startswith("layers.0.")}
    yield pt("gap.pt", bad), "have gaps"
    bad = dict(state, **{"layers.0.feed_forward.w2.weight": np.zeros((64, 64), np.float32)})
    yield pt("shape.pt", bad), "first layers.0.feed_forward.w2.weight: [64, 64], expected [64, 256]"
    yield (
        pt("vgg.pt", {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}),
        "is no tokenizer",
    )
    yield pt("numbers.pt", {"model": {"tok_embeddings.weight": 3}}), "is not a tensor"
    bad = dict(state, **{"tok_embeddings.weight": np.zeros((32, 0), np.float32)})
    yield pt("nothing_wide.pt", bad), "model.width is 0"
    judge = {"main.0.weight": np.zeros((64, 3, 4, 4), np.float32)}
    yield pt("judge.pt", {"discriminator": judge}), "holds a discriminator"
    yield pt("optimizer.pt", {"model": state, "optimizer": {}}), OPTIMIZER
    yield pt("steps.pt", {"model": state, "steps": "many"}), "steps is 'many'"
    yield raw("cut.safetensors", safetensors_of()[:20]), "cut short"
    yield raw("long.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"), "cut short"
    yield raw("json.safetensors", header(b"{w}")), "damaged or not safetensors"
    yield raw("twice.safetensors", header(b'{"w": 1, "w": 2}')), "has w twice"
    yield raw("empty.safetensors", b""), "is empty"
    yield raw("large.safetensors", safetensors_of(shape=[1 << 60])), "refused"
    yield raw("minus.safetensors", safetensors_of(shape=[-2], data_offsets=[8, 0])), "refused"
    yield raw("past.safetensors", safetensors_of(shape=[4], data_offsets=[0, 16])), "ends before w"
    yield raw("type.safetensors", safetensors_of(dtype="F8_E4M3")), "w is F8_E4M3"
    (folder / "run" / "checkpoints" / "5").mkdir(parents=True)
    yield folder / "run", "no whole checkpoint"


def test_damaged_and_hostile_files_end_in_one_line(tmp_path, capfd):
    there = tmp_path / "there"
    there.mkdir()
    count = 0
    for path, expected in damaged_files(there):
        for out in ("run",) if expected is OPTIMIZER else ("x.safetensors", "run"):
            assert expected in refused(capfd, "from_torch", path, tmp_path / "out" / out), path
        assert expected in refused(capfd, "to_torch", path, tmp_path / "out" / "x.pt"), path
        assert not (there / "ran").exists(), path
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), path
        count += 1
    assert count >= 20


def test_a_wrong_name_of_the_result_is_one_line(file, tmp_path, capfd):
    assert "writes .pt or .safetensors" in refused(capfd, "to_torch", file[0], tmp_path / "x.bin")
    message = refused(capfd, "from_torch", file[0], tmp_path / "x.bin")
    assert "writes .safetensors or a workdir" in message
    message = refused(capfd, "from_torch", file[0], tmp_path / "x", "--set", "rotation")
    assert "expected NAME=VALUE" in message


def test_a_run_of_ours_is_read_without_its_optimizer(tmp_path):
    model = small("prior-B")
    state = random_state(model)
    params = jax.tree.map(jnp.asarray, ar.from_torch(state, model))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(3, {"params": params}, {"config": {"model": model.to_dict()}})
    checkpoints.close()
    equal(read.read(tmp_path).state, state)
    assert read.read(tmp_path).extras["weights"] == "raw"
