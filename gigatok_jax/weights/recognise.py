"""Recognises the model of a state dict from its names and shapes alone.

A field that names and shapes do not show takes the published value, is printed, and can be
overridden.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from gigatok_jax.errors import CheckpointError
from gigatok_jax.model_config import PRIORS, SIZES, TOKENIZERS, model_config
from gigatok_jax.model_config import prior as prior_config
from gigatok_jax.model_config import tokenizer as tokenizer_config

# A name that is in every state dict of a kind and in no other.
MARKS = {
    "tokenizer": "quantize.embedding.weight",
    "prior": "tok_embeddings.weight",
    "patchgan": "main.0.weight",
    "dino": "heads.0.0.0.weight_orig",
}
HEAD_WIDTH = 64  # of every published model
LARGEST = 1 << 37  # numbers in a model: a larger state dict is refused


class Seen(NamedTuple):
    """Record of the shapes of a state dict's tensors by name, with methods that look them up."""

    shapes: dict[str, tuple[int, ...]]

    def size(self, name: str, axis: int = 0) -> int:
        """Returns the length of a tensor's axis; raises CheckpointError without such an axis."""
        shape = self.shapes.get(name, ())
        if axis >= len(shape):
            raise CheckpointError(
                f"{name} is missing or has shape {list(shape)}: is this a state dict of another"
                " model?"
            )
        return shape[axis]

    def layers(self, prefix: str) -> int:
        """Counts the layers "<prefix>0.", "<prefix>1.", ...; raises CheckpointError at a gap."""
        numbered = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
        numbers = {int(match[1]) for name in self.shapes if (match := numbered.match(name))}
        if numbers != set(range(len(numbers))):
            raise CheckpointError(
                f"layers {sorted(numbers)[:9]} of {prefix} have gaps between them"
            )
        return len(numbers)

    def any(self, text: str) -> bool:
        """Returns whether a piece of text is in the name of any tensor."""
        return any(text in name for name in self.shapes)


def seen(state: Mapping[str, Any]) -> Seen:
    """Collects the names and shapes of a state dict of arrays or promises in a `Seen`.

    Raises:
        CheckpointError: a value is not a tensor, or the tensors are larger than any model.
    """
    shapes = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise CheckpointError(f"{name!r} is not a tensor: is this a state dict?")
        shapes[name] = tuple(tensor.shape)
    if sum(math.prod(shape) for shape in shapes.values()) > LARGEST:
        raise CheckpointError(f"its tensors hold over {LARGEST} numbers; no model here does")
    return Seen(shapes)


def kind_of(state: Mapping[str, Any]) -> str:
    """Recognises the kind of a state dict's model: "tokenizer", "prior", "patchgan" or "dino".

    Raises:
        CheckpointError: no kind has these names.
    """
    for kind, mark in MARKS.items():
        if mark in state:
            return kind
    first = ", ".join(list(map(str, state))[:3]) or "nothing"
    raise CheckpointError(
        f"is no tokenizer, prior or discriminator of GigaTok: it holds {first}; expected"
        f" {' or '.join(MARKS.values())} among its names"
    )


def infer_tokenizer(state: Mapping[str, Any], **overrides) -> ml_collections.ConfigDict:
    """Recognises the config of a tokenizer from the names and shapes of its state dict.

    See `conversion.tokenizer.infer_config`.
    """
    names = seen(state)
    one_d = names.any("s2to1encoder.")
    encoder, decoder = (
        ("s2to1encoder.", "s1to2decoder.") if one_d else ("s2dencoder.", "s2ddecoder.")
    )
    fields = {"kind": "1d" if one_d else "2d"}
    fields["encoder"] = _size(names, f"{encoder}encoder_embed.weight", encoder)
    fields["decoder"] = _size(names, f"{decoder}decoder_embed.weight", decoder)
    fields["codebook_size"] = names.size(MARKS["tokenizer"], 0)
    fields["codebook_width"] = names.size(MARKS["tokenizer"], 1)
    fields["qk_norm"] = names.any("q_norm")
    fields |= _stem(names) | _grid(names, encoder) | _alignment(names, decoder)
    assumed = {"l2_norm": True, "rotation": True}
    if fields["align_block"]:
        assumed["align_block"] = fields.pop("align_block")
    if one_d:
        fields["latent_tokens"] = names.size(f"{encoder}latent_token_positional_embedding")
        learnable = f"{encoder}query_1d" in names.shapes
        (fields if learnable else assumed)["query_init"] = (
            "learnable" if learnable else "multi_level"
        )
        learnable = f"{decoder}q_2d" in names.shapes
        fields["decoder_query_init"] = "learnable" if learnable else "first"
    else:
        fields["layer_2d"] = "qformer" if names.any("multihead_attn") else "transformer"
    return _build(tokenizer_config, fields, assumed, overrides)


def infer_prior(state: Mapping[str, Any], **overrides) -> ml_collections.ConfigDict:
    """Recognises the config of a prior from the names and shapes of its state dict.

    See `conversion.ar.infer_config`.
    """
    names = seen(state)
    width, layers = names.size(MARKS["prior"], 1), names.layers("layers.")
    fields = {"layers": layers, "width": width, "vocab": names.size(MARKS["prior"])}
    fields["classes"] = names.size("cls_embedding.embedding_table.weight") - 1
    fields["rope"] = "positional_embedding" not in names.shapes
    fields["qk_norm"] = names.any("q_norm")
    full = "layers.0.adaLN_modulation.1.weight" in names.shapes
    shared = "adaLN.1.weight" in names.shapes
    fields["adaln"] = "full" if full else "shared" if shared else "none"
    assumed = {}
    (assumed if fields["rope"] else fields)["tokens"] = (
        256 if fields["rope"] else names.size("positional_embedding") - 1
    )
    if fields["qk_norm"]:
        fields["heads"] = width // max(names.size("layers.0.attention.q_norm.weight"), 1)
    else:
        published = {(layers, width): heads for layers, heads, width in PRIORS.values()}
        assumed["heads"] = published.get((layers, width), max(width // HEAD_WIDTH, 1))
    heads = overrides.get("heads", fields.get("heads") or assumed.get("heads"))
    fields["kv_heads"] = _key_value_heads(names, width, heads)
    return _build(prior_config, fields, assumed, overrides)


def published_name(model: ml_collections.ConfigDict) -> str | None:
    """Returns the name of the published model with a config, such as B-L, or None."""
    names = PRIORS if model.kind == "prior" else TOKENIZERS
    same = (name for name in names if model_config(name) == model)
    return next(same, None)


def _size(names: Seen, embed: str, prefix: str) -> str:
    """Finds the name of a transformer's size, such as "base", by its depth and width."""
    width, layers = names.size(embed), names.layers(f"{prefix}transformer.")
    for name, (depth, _, wide) in SIZES.items():
        if (depth, wide) == (layers, width):
            return name
    known = ", ".join(f"{depth} x {wide} ({name})" for name, (depth, _, wide) in SIZES.items())
    raise CheckpointError(
        f"{prefix.rstrip('.')} has {layers} layers of width {width}; there are {known}"
    )


def _stem(names: Seen) -> dict[str, Any]:
    """Recognises the config fields of the layers before and after a tokenizer's transformers."""
    if "encoder.embed.weight" in names.shapes:
        pixels = names.size("encoder.embed.weight", 1) // 3
        return {"stem": "patch", "patch_size": math.isqrt(pixels)}
    levels = names.layers("encoder.conv_blocks.")
    fields = {"patch_size": 2 ** (min(levels, 16) - 1)} if levels else {}
    fields["cnn_channels"] = names.size("encoder.conv_in.weight")
    fields["adaptive_group_norm"] = names.any("decoder.adaptive.")
    fields["depth_to_space"] = not names.any(".upsample.conv.")
    fields["cnn_attention"] = "encoder.mid.1.q.weight" in names.shapes
    return fields


def _grid(names: Seen, encoder: str) -> dict[str, int]:
    tokens = names.size(f"{encoder}positional_embedding")
    side, patch = math.isqrt(tokens), _stem(names).get("patch_size", 1)
    if side * side != tokens:
        raise CheckpointError(
            f"{encoder}positional_embedding has {tokens} rows, expected a square grid of them"
        )
    return {"image_size": side * patch}


def _alignment(names: Seen, decoder: str) -> dict[str, int]:
    last = f"{decoder}distill_mlp.4.weight"
    if last not in names.shapes:
        return {"align_block": 0}
    published = tokenizer_config().align_block
    block = min(published, names.layers(f"{decoder}transformer."))
    return {"align_block": block, "align_width": names.size(last)}


def _key_value_heads(names: Seen, width: int, heads: int) -> int:
    """Computes the number of a prior's key-value heads from the rows of its fused projection."""
    rows, head = names.size("layers.0.attention.wqkv.weight"), width // max(heads, 1)
    return max((rows - width) // max(2 * head, 1), 1)


def _build(make, fields, assumed, overrides) -> ml_collections.ConfigDict:
    model = make(**assumed | fields | overrides)
    left = {name: value for name, value in assumed.items() if name not in overrides}
    if left:
        values = ", ".join(f"{name}={value!r}" for name, value in left.items())
        print(f"names and shapes do not show {values}: published values, override what differs")
    return model


# Comparison with a config.


@functools.lru_cache(maxsize=4)
def _tensor_shapes(model: ml_collections.FrozenConfigDict) -> dict[str, tuple[int, ...]]:
    # Imported late: the functions above need no jax.
    from gigatok_jax.weights import names, tables

    shapes = tables.shapes(model)
    return {
        name: promise.shape
        for name, promise in names.tensors(shapes, tables.entries(model)).items()
    }


def tensor_shapes(model: ml_collections.ConfigDict) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a model's state dict by name, in the original's order."""
    return _tensor_shapes(ml_collections.FrozenConfigDict(model))


def check(state: Mapping[str, Any], model: ml_collections.ConfigDict) -> list[str]:
    """Compares the names and shapes of a state dict with those that a config demands.

    Returns:
        Names in the state dict that the model does not have.

    Raises:
        CheckpointError: a name is missing, or has another shape.
    """
    expected, shapes = tensor_shapes(model), seen(state).shapes
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}: is this a state"
            " dict of another model?"
        )
    other = [name for name, shape in expected.items() if shapes[name] != shape]
    if other:
        name = other[0]
        raise CheckpointError(
            f"{len(other)} tensors have another shape, first {name}: {list(shapes[name])},"
            f" expected {list(expected[name])}"
        )
    return [name for name in shapes if name not in expected]


def not_finite(name: str, array: np.ndarray) -> str:
    """Returns a message that counts the values of a tensor that are not finite; "" if none is."""
    if array.dtype.kind in "iub" or np.isfinite(array).all():
        return ""
    return f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite"
