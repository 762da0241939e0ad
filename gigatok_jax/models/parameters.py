"""Parameters of a config's model, from shapes alone: seconds for any size."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax.errors import ConfigError
from gigatok_jax.model_config import validate
from gigatok_jax.models import ar, tokenizer

ALIGNMENT = "align"  # the part that only training uses


class Row(NamedTuple):
    path: str  # e.g. "decoder/blocks/mlp/up/kernel"; scanned blocks are one row
    shape: tuple[int, ...]
    dtype: str
    count: int  # parameters


def abstract_params(model) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`, the parameters of a tokenizer's or prior's config."""
    module, inputs = _prior(model) if model.kind == "prior" else _tokenizer(model)
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def _tokenizer(model):
    """The module and the shapes of what it takes."""
    size = model.image_size
    return tokenizer.make(model), [jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)]


def _prior(model):
    shapes = (1,), (1, model.tokens)  # class ids and codes
    return ar.make(model), [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


def rows(params) -> list[Row]:
    """One row for each array, in the order of its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        Row("/".join(key.key for key in path), x.shape, x.dtype.name, math.prod(x.shape))
        for path, x in leaves
    ]


def count(params) -> int:
    """Number of parameters."""
    return sum(row.count for row in rows(params))


def count_alignment(params) -> int:
    """Number of parameters of the alignment MLP, which the published counts leave out."""
    return sum(row.count for row in rows(params) if ALIGNMENT in row.path.split("/"))


def report(config) -> str:
    """Parameter table and totals of a config's model, as text.

    Raises:
        ConfigError: the config has no model (its task reads a checkpoint) or a wrong one.
    """
    if "model" not in config:
        raise ConfigError(f"{config.name} takes its model from a checkpoint: nothing to plan")
    validate(config.model)
    params = abstract_params(config.model)
    return "\n".join([*_table(rows(params)), "", *_totals(params)])


def _table(rows) -> list[str]:
    width = max(len(row.path) for row in rows)
    return [
        f"{row.path:{width}}  {'x'.join(map(str, row.shape)):>18}  {row.dtype}  {row.count:>13,}"
        for row in rows
    ]


def _totals(params) -> list[str]:
    parts = {name: count(part) for name, part in params.items()}
    total, alignment = sum(parts.values()), count_alignment(params)
    parts["total"] = total
    if alignment:
        parts["without alignment MLP"] = total - alignment
    return [f"{name:24}{number:>16,}" for name, number in parts.items()]
