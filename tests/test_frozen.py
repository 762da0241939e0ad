"""Frozen networks from files: what is kept, what is refused, and Inception's features."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from rule import rule_state, shared_path
from test_dino import DEPTH, WIDTH, vit_shapes

from gigatok_jax.errors import CheckpointError, MissingWeightsError
from gigatok_jax.models import dino, inception
from gigatok_jax.weights import frozen, frozen_names, names, torch_file

FILE = "dinov2-small.safetensors"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def small_state(**fields):
    """A DINOv2 in the authors' names, shrunk, with the tensor of theirs that has no use here."""
    state = rule_state(vit_shapes(**fields).items(), "dinov2.")
    return state | {"mask_token": np.zeros((1, WIDTH), np.float32)}


@pytest.fixture
def shrunk(monkeypatch):
    """The published DINOv2-S at a few thousand parameters."""
    monkeypatch.setitem(dino.SIZES, "dinov2-s", (WIDTH, 2, DEPTH))
    monkeypatch.setitem(frozen.NETWORKS, "dinov2-s", frozen._vit("dinov2-s"))


def load(folder):
    return frozen.load_frozen("dinov2-s", folder)


def kept(folder):
    return folder / "converted" / "dinov2-s.safetensors"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_file_is_converted_once_and_serves_alone(tmp_path, shrunk, monkeypatch):
    safetensors.numpy.save_file(small_state(), tmp_path / FILE)
    first, convert = load(tmp_path), frozen_names._converted
    assert [path.name for path in kept(tmp_path).parent.iterdir()] == ["dinov2-s.safetensors"]
    monkeypatch.setattr(frozen_names, "_converted", None)  # nothing converts from here on
    same(load(tmp_path), first)
    (tmp_path / FILE).unlink()
    assert frozen.available("dinov2-s", tmp_path)
    same(load(tmp_path), first)
    monkeypatch.setattr(frozen_names, "_converted", convert)
    other = {name: value + 1 for name, value in small_state().items()}
    safetensors.numpy.save_file(other, tmp_path / FILE)  # the same size, another content
    np.testing.assert_allclose(load(tmp_path)["class_token"], first["class_token"] + 1)


def test_a_damaged_conversion_is_made_again_or_named(tmp_path, shrunk):
    safetensors.numpy.save_file(small_state(), tmp_path / FILE)
    first, whole = load(tmp_path), kept(tmp_path).read_bytes()
    kept(tmp_path).write_bytes(b"")
    same(load(tmp_path), first)
    assert kept(tmp_path).read_bytes() == whole
    (tmp_path / FILE).unlink()
    kept(tmp_path).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"converted/dinov2-s\.safetensors: .*get it again"):
        load(tmp_path)


def test_a_folder_that_takes_no_files_does(tmp_path, shrunk):
    safetensors.numpy.save_file(small_state(), tmp_path / FILE)
    (tmp_path / "converted").write_text("in the way of the folder")
    assert load(tmp_path)["class_token"].shape == (1, 1, WIDTH)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


WRONG = {
    "lacks": (lambda s: without(s, "norm.bias"), "1 tensors are missing, first norm.bias"),
    "more": (lambda s: s | {"blocks.2.ls1.gamma": np.ones(WIDTH, np.float32)}, "blocks.2.ls1"),
    "wider": (lambda s: small_state(width=WIDTH + 2), r"of shape .*expected"),
    "deeper": (
        lambda s: small_state(depth=DEPTH + 1),
        "holds blocks.2.*which this network has not",
    ),
    "nan": (lambda s: s | {"norm.bias": s["norm.bias"] * np.nan}, "norm/bias is not finite"),
    "turned": (lambda s: s | {"pos_embed": s["pos_embed"][0]}, "not the tensors of dinov2-s"),
    "oblong": (lambda s: s | {"pos_embed": s["pos_embed"][:, :-1]}, "positions are no square"),
    "empty": (lambda s: {}, "missing"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_right_name_with_the_wrong_content_is_refused(tmp_path, shrunk, wrong):
    change, words = WRONG[wrong]
    safetensors.numpy.save_file(change(small_state()), tmp_path / FILE)
    with pytest.raises(CheckpointError, match=words) as error:
        load(tmp_path)
    assert FILE in str(error.value) or wrong == "empty"
    assert "\n" not in str(error.value) and not kept(tmp_path).exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", bytes(100)])
@pytest.mark.parametrize("file", [FILE, "dinov2_vits14_pretrain.pth"])
def test_what_is_no_weights_file_is_refused(tmp_path, shrunk, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}: .*get it again"):
        load(tmp_path)


def test_a_pickle_of_anything_else_is_refused(tmp_path, shrunk):
    torch = pytest.importorskip("torch")
    for saved, words in (([1, 2], "holds a list"), ({"epoch": 3}, "'epoch', which is no tensor")):
        torch.save(saved, tmp_path / "dinov2_vits14_pretrain.pth")
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)


def test_lpips_refuses_another_vgg(tmp_path):
    heads = {f"lin{i}.model.1.weight": np.ones((1, 4, 1, 1), np.float32) for i in range(5)}
    torch_file.save(tmp_path / "vgg.pth", heads)
    other = {"features.1.running_mean": np.ones(4, np.float32)}
    torch_file.save(tmp_path / "vgg16-397923af.pth", other)
    with pytest.raises(CheckpointError, match=r"holds features\.1\.running_mean"):
        frozen.load_frozen("lpips-vgg16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, "s", "b", "l"])
def test_published_sizes_load_from_both_publishers(tmp_path, size):
    """Files of the real names and shapes; None is the DINO trunk, which is published once."""
    width, _, depth = dino.SIZES[f"dinov2-{size}"] if size else (384, 12, 12)
    fields = {} if size else {"patch": 16, "side": 14, "layer_scale": False}
    shapes = vit_shapes(width=width, depth=depth, **fields)
    state = {name: np.full(shape, len(name), np.float32) for name, shape in shapes.items()}
    file = f"dinov2_vit{size}14_pretrain.pth" if size else "dino_deitsmall16_pretrain.pth"
    name = f"dinov2-{size}" if size else "dino-s16"
    torch_file.save(tmp_path / file, state)
    params = frozen.load_frozen(name, tmp_path)
    assert params["blocks"]["qkv"]["kernel"].shape == (depth, width, 3 * width)
    if size:
        hub = {"s": "small", "b": "base", "l": "large"}[size]
        (tmp_path / "hub" / f"dinov2-{hub}").mkdir(parents=True)
        path = tmp_path / "hub" / f"dinov2-{hub}" / "model.safetensors"
        safetensors.numpy.save_file(hub_names(state), path)
        same(frozen.load_frozen(name, tmp_path / "hub"), params)


def hub_names(state):
    """The authors' names as Hugging Face writes them, the fused projection in three."""
    parts = {
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
    }
    hub = {}
    for name, value in state.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        if "attn.qkv" not in name:
            hub[name] = value
            continue
        for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            hub[name.replace("attn.qkv", f"attention.attention.{part}")] = piece
    return hub


# Inception


def a_convolution(at, into, out, rows=1, columns=1):
    """Names and shapes of a convolution and its norm in torch-fidelity's file."""
    shapes = {f"{at}.conv.weight": (out, into, rows, columns)}
    leaves = ("weight", "bias", "running_mean", "running_var")
    return shapes | {f"{at}.bn.{leaf}": (out,) for leaf in leaves}


def chain(at, prefix, into, *layers):
    """Layers (suffix, width, rows, columns), each on the one before it."""
    shapes = {}
    for suffix, out, rows, columns in layers:
        shapes |= a_convolution(f"{at}.{prefix}{suffix}", into, out, rows, columns)
        into = out
    return shapes


def block_a(at, into, pool):
    return {
        **a_convolution(f"{at}.branch1x1", into, 64),
        **chain(at, "branch5x5", into, ("_1", 48, 1, 1), ("_2", 64, 5, 5)),
        **chain(at, "branch3x3dbl", into, ("_1", 64, 1, 1), ("_2", 96, 3, 3), ("_3", 96, 3, 3)),
        **a_convolution(f"{at}.branch_pool", into, pool),
    }


def block_c(at, n, into=768):
    columns = [("_1", n, 1, 1), ("_2", n, 7, 1), ("_3", n, 1, 7), ("_4", n, 7, 1)]
    return {
        **a_convolution(f"{at}.branch1x1", into, 192),
        **chain(at, "branch7x7", into, ("_1", n, 1, 1), ("_2", n, 1, 7), ("_3", 192, 7, 1)),
        **chain(at, "branch7x7dbl", into, *columns, ("_5", 192, 1, 7)),
        **a_convolution(f"{at}.branch_pool", into, 192),
    }


def block_e(at, into):
    shapes = chain(at, "branch3x3", into, ("_1", 384, 1, 1), ("_2a", 384, 1, 3))
    shapes |= a_convolution(f"{at}.branch3x3_2b", 384, 384, 3, 1)
    dbl = ("_1", 448, 1, 1), ("_2", 384, 3, 3), ("_3a", 384, 1, 3)
    shapes |= chain(at, "branch3x3dbl", into, *dbl)
    shapes |= a_convolution(f"{at}.branch3x3dbl_3b", 384, 384, 3, 1)
    shapes |= a_convolution(f"{at}.branch1x1", into, 320)
    return shapes | a_convolution(f"{at}.branch_pool", into, 192)


def inception_shapes():
    """Every tensor of the file but the counters of batch norm."""
    threes = ("_1", 64, 1, 1), ("_2", 96, 3, 3), ("_3", 96, 3, 3)
    sevens = ("_1", 192, 1, 1), ("_2", 192, 1, 7), ("_3", 192, 7, 1), ("_4", 192, 3, 3)
    return {
        **a_convolution("Conv2d_1a_3x3", 3, 32, 3, 3),
        **a_convolution("Conv2d_2a_3x3", 32, 32, 3, 3),
        **a_convolution("Conv2d_2b_3x3", 32, 64, 3, 3),
        **a_convolution("Conv2d_3b_1x1", 64, 80),
        **a_convolution("Conv2d_4a_3x3", 80, 192, 3, 3),
        **block_a("Mixed_5b", 192, 32),
        **block_a("Mixed_5c", 256, 64),
        **block_a("Mixed_5d", 288, 64),
        **a_convolution("Mixed_6a.branch3x3", 288, 384, 3, 3),
        **chain("Mixed_6a", "branch3x3dbl", 288, *threes),
        **block_c("Mixed_6b", 128),
        **block_c("Mixed_6c", 160),
        **block_c("Mixed_6d", 160),
        **block_c("Mixed_6e", 192),
        **chain("Mixed_7a", "branch3x3", 768, ("_1", 192, 1, 1), ("_2", 320, 3, 3)),
        **chain("Mixed_7a", "branch7x7x3", 768, *sevens),
        **block_e("Mixed_7b", 1280),
        **block_e("Mixed_7c", 2048),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }


@functools.cache
def inception_state():
    """Random tensors under which activations neither grow nor vanish."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if len(shape) > 1:
            deviation = np.float32((2 / math.prod(shape[1:])) ** 0.5)
            return rng.standard_normal(shape, np.float32) * deviation
        if name.endswith(("running_var", "bn.weight")):
            return rng.random(shape, np.float32) + np.float32(0.5)
        return rng.standard_normal(shape, np.float32) * np.float32(0.1)

    return {name: draw(name, shape) for name, shape in inception_shapes().items()}


def test_inception_has_the_names_and_shapes_of_its_file():
    entries = frozen_names.inception_entries()
    shapes = inception_shapes()
    assert {entry.name for entry in entries} == shapes.keys()
    params = names.from_torch({k: np.broadcast_to(0, v) for k, v in shapes.items()}, entries)
    frozen._check("inception", "file", params, frozen_names.inception_shapes())
    assert sum(math.prod(shape) for shape in shapes.values()) == 23_885_392


def test_inception_loads_from_its_file(tmp_path):
    with pytest.raises(MissingWeightsError, match=f"put {INCEPTION_FILE} .*toshas/torch-fidelity"):
        frozen.load_frozen("inception", tmp_path)
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    torch_file.save(tmp_path / INCEPTION_FILE, inception_state() | counter)
    params = frozen.load_frozen("inception", tmp_path)
    theirs = inception_state()["Mixed_6d.branch7x7_2.conv.weight"]
    ours = params["Mixed_6d"]["branch7x7_2"]["kernel"]
    np.testing.assert_array_equal(ours, theirs.transpose(2, 3, 1, 0))
    same(frozen.load_frozen("inception", tmp_path), params)


@pytest.mark.parametrize(("height", "width"), [(16, 40), (256, 256), (299, 512)])
def test_resize_is_that_of_tensorflow_one(height, width):
    """Each pixel from its four neighbours by the published rule, in float64."""
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    ours = np.asarray(inception.resize(image))
    assert ours.shape == (1, 299, 299, 3) and ours.dtype == np.float32
    for i, j in np.random.default_rng(1).integers(0, 299, (50, 2)):
        y, x = i * height / 299, j * width / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper, lower = (
            image[0, row, left] * (1 - x + left) + image[0, row, right] * (x - left)
            for row in (top, bottom)
        )
        expected = upper * (1 - y + top) + lower * (y - top)
        np.testing.assert_allclose(ours[0, i, j], expected, atol=0.02)  # positions are float32


def torch_inception(torch, state, x):
    """Pool features, logits and Mixed_6d of torch images in [-1, 1], written from the paper."""
    pad = {1: 0, 3: 1, 5: 2, 7: 3}

    def conv(at, x, stride=1, same=True):
        weight = state[f"{at}.conv.weight"]
        padding = tuple(pad[k] for k in weight.shape[2:]) if same else 0
        x = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
        parts = ("running_mean", "running_var", "weight", "bias")
        norm = [state[f"{at}.bn.{part}"] for part in parts]
        return torch.relu(torch.nn.functional.batch_norm(x, *norm, eps=1e-3))

    def convs(at, x, count):
        for i in range(1, count + 1):
            x = conv(f"{at}_{i}", x)
        return x

    def mean(x):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def largest(x, stride=2, padding=0):
        return torch.nn.functional.max_pool2d(x, 3, stride, padding)

    def same_size(at, x, branches, pool):
        parts = [conv(f"{at}.branch1x1", x)]
        parts += [convs(f"{at}.{name}", x, count) for name, count in branches]
        return torch.cat([*parts, conv(f"{at}.branch_pool", pool(x))], 1)

    def fork(at, x, count, forks):
        x = convs(at, x, count)
        return [conv(f"{at}_{fork}", x) for fork in forks]

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2, False), same=False)
    x = conv("Conv2d_3b_1x1", largest(conv("Conv2d_2b_3x3", x)))
    x = largest(conv("Conv2d_4a_3x3", x, same=False))
    for name in ("5b", "5c", "5d"):
        x = same_size(f"Mixed_{name}", x, (("branch5x5", 2), ("branch3x3dbl", 3)), mean)
    inner = convs("Mixed_6a.branch3x3dbl", x, 2)
    inner = conv("Mixed_6a.branch3x3dbl_3", inner, 2, False)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2, False), inner, largest(x)], 1)
    for name in ("6b", "6c", "6d", "6e"):
        tapped = x if name == "6e" else None
        x = same_size(f"Mixed_{name}", x, (("branch7x7", 3), ("branch7x7dbl", 5)), mean)
    three = conv("Mixed_7a.branch3x3_2", convs("Mixed_7a.branch3x3", x, 1), 2, False)
    seven = conv("Mixed_7a.branch7x7x3_4", convs("Mixed_7a.branch7x7x3", x, 3), 2, False)
    x = torch.cat([three, seven, largest(x)], 1)
    for at, pool in (("Mixed_7b", mean), ("Mixed_7c", lambda x: largest(x, 1, 1))):
        parts = [conv(f"{at}.branch1x1", x), *fork(f"{at}.branch3x3", x, 1, ("2a", "2b"))]
        parts += fork(f"{at}.branch3x3dbl", x, 2, ("3a", "3b"))
        x = torch.cat([*parts, conv(f"{at}.branch_pool", pool(x))], 1)
    pooled = x.mean((2, 3))
    return pooled, pooled @ state["fc.weight"].T, tapped


def test_inception_agrees_with_torch():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(2).integers(0, 256, (1, 16, 16, 3), np.uint8)
    params = names.from_torch(inception_state(), frozen_names.inception_entries())
    found = jax.jit(inception.Inception().apply)({"params": params}, jnp.asarray(image))
    seen = torch.from_numpy(np.array(inception.resize(image)).transpose(0, 3, 1, 2))
    state = {name: torch.from_numpy(value) for name, value in inception_state().items()}
    pool, unbiased, tapped = torch_inception(torch, state, (seen - 128) / 128)
    np.testing.assert_allclose(found.pool, pool, atol=1e-4)
    np.testing.assert_allclose(found.unbiased, unbiased, atol=1e-4)
    np.testing.assert_allclose(found.logits, unbiased + state["fc.bias"], atol=1e-4)
    spatial = tapped[:, : inception.SPATIAL].permute(0, 2, 3, 1)
    np.testing.assert_allclose(found.spatial, spatial, atol=1e-4)
    assert found.spatial[0].size == 2023  # as many as sFID is published with


@pytest.mark.parametrize(
    ("manifest", "key", "table", "constants"),
    [
        ("dinov2_vitb14", "original_names", frozen_names.dinov2_entries(12, 0), {"mask_token"}),
        (
            "disc_dino_backbone_vits16",
            "state_dict",
            frozen_names.vit_entries(12, layer_scale=False),
            {"x_scale", "x_shift", "norm.weight", "norm.bias"},
        ),
        (
            "lpips",
            "state_dict",
            frozen_names.lpips_entries(),
            {"scaling_layer.shift", "scaling_layer.scale"},
        ),
    ],
)
def test_names_of_a_manifest_go_both_ways(manifest, key, table, constants):
    """All but what is a constant here, or unused: bit for bit."""
    content = json.loads(shared_path(f"manifests/{manifest}.json").read_text())[key]
    rng = np.random.default_rng(0)
    state = {name: rng.random(shape, np.float32) for name, shape in dict(content).items()}
    back = names.to_torch(names.from_torch(state, table), table)
    assert set(back) == set(state) - constants
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
