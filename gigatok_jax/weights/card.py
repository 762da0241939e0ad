"""Writes the text of a model card beside saved weights: the model, its training and its use."""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from gigatok_jax import trees
from gigatok_jax.model_config import family, num_tokens

PLACES = ("folder", "eval_folder", "tokenizer", "codes", "eval_codes", "cooldown_from")
_USE = {
    "tokenizer": (
        'tokenizer = gigatok_jax.load_tokenizer("FOLDER")\n'
        "codes = tokenizer.encode(images)  # uint8[b h w 3] -> int32[b n]\n"
        "images = gigatok_jax.to_uint8(tokenizer.decode(codes))\n"
    ),
    "prior": (
        'prior = gigatok_jax.load_prior("FOLDER")\n'
        "codes = prior.generate([0, 1, 2], seed=0)  # classes -> int32[b n] for its tokenizer\n"
    ),
}


def text(
    config: ml_collections.ConfigDict,
    params: Mapping[str, Any],
    about: Mapping[str, Any],
    name: str | None,
    licence: str,
) -> str:
    """Returns the text of a model card in Markdown, with the header that model hubs read.

    Args:
        config: config of the model.
        params: parameters of the model, a nested dict of arrays.
        about: step, training, and of a prior tokenizer and class_names, as far as known.
        name: name of the published model with this config, if any.
        licence: an identifier such as "mit", or "unknown".
    """
    kind = family(config)
    title = f"GigaTok {kind}" + (f" {name.removeprefix('prior-')}" if name else "")
    head = {"license": licence, "library_name": "gigatok_jax", "tags": ["gigatok", kind]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    sections = [
        "\n".join(["---", *lines, "---"]),
        f"# {title}\n\n{_what(config, kind)}",
        _table(config, params, about),
        f"## Training\n\n{_training(about)}",
        f"## Use\n\n```python\nimport gigatok_jax\n\n{_USE[kind]}```",
        f"## Licence\n\n{_licence(licence)}",
    ]
    return "\n\n".join(sections) + "\n"


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies the config of a run without the paths on its machine, which mean nothing elsewhere."""
    return {
        key: without_places(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in PLACES
    }


def _what(config, kind: str) -> str:
    if kind == "prior":
        return (
            f"Writes the {config.tokens} codes of an image, given one of {config.classes} classes"
            " (arXiv:2504.08736); a tokenizer turns them into pixels."
        )
    codes = num_tokens(config)
    return (
        f"Turns {config.image_size} x {config.image_size} pixels into {codes} codes of a"
        f" {config.codebook_size} x {config.codebook_width} codebook, and back (arXiv:2504.08736)."
    )


def _table(config, params, about: Mapping[str, Any]) -> str:
    leaves = trees.flatten({key: params[key] for key in params if key != "buffers"}).values()
    rows = {
        "parameters": f"{sum(math.prod(leaf.shape) for leaf in leaves):,}",
        "types": ", ".join(sorted({str(leaf.dtype) for leaf in leaves})),
        "step": about.get("step", "unknown"),
        "weights": about.get("training", {}).get("weights", "unknown"),
    }
    if config.kind == "prior":
        rows["tokenizer"] = about.get("tokenizer", "unknown")
        rows["classes"] = ", ".join(about.get("class_names", ())[:20]) or config.classes
    fields = ", ".join(f"{key}={value}" for key, value in config.items())
    rows = rows | {"config": f"`{fields}`"}
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _training(about: Mapping[str, Any]) -> str:
    training = about.get("training", {})
    config = training.get("config")
    if not config:
        return "Unknown: the weights came without the config of their run."
    steps = about.get("step", "an unknown number of")
    data = training.get("data", {}).get("fingerprint", "unknown")
    source = config.get("data", {}).get("source", "unknown")
    return (
        f"Run `{config.get('name', 'unknown')}`, {steps} steps; data: {source}, fingerprint {data}."
        f"\n\n```json\n{json.dumps(config, indent=2)}\n```"
    )


def _licence(licence: str) -> str:
    if licence == "unknown":
        return "Unknown: fill in the head of this page; the training data may set terms."
    return f"{licence}, see the head of this page."
