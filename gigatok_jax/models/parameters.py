"""Shapes, number and table of the parameters of a config's model, without computing values.

This takes seconds for a model of any size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview

from gigatok_jax.errors import ConfigError
from gigatok_jax.model_config import validate
from gigatok_jax.models import ar, tokenizer
from gigatok_jax.trees import flatten

ALIGNMENT = "align"  # module that only training uses; published counts leave it out


def abstract_params(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the shapes of a model's parameters, as nested dicts of `jax.ShapeDtypeStruct`.

    Args:
        model: config of a tokenizer or a prior.
    """
    if model.kind == "prior":
        module, shapes, dtype = ar.make(model), [(1,), (1, model.tokens)], jnp.int32
    else:
        size = model.image_size
        module, shapes, dtype = tokenizer.make(model), [(1, size, size, 3)], jnp.float32
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def count(params: Any) -> int:
    """Counts the parameters, each a single number, in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def count_alignment(params: Any) -> int:
    """Counts the parameters of the alignment MLP in a model's tree of arrays or shapes."""
    return count([x for path, x in flatten(params).items() if ALIGNMENT in path.split("/")])


def report(config: ml_collections.ConfigDict) -> str:
    """Returns a table of the parameters of a config's model and totals of its modules, as text.

    Raises:
        ConfigError: the config has no model (its task reads a checkpoint) or an invalid model.
    """
    if "model" not in config:
        raise ConfigError(f"{config.name} takes its model from a checkpoint: nothing to plan")
    validate(config.model)
    params = abstract_params(config.model)
    totals = {name: count(module) for name, module in params.items()} | {"total": count(params)}
    if alignment := count_alignment(params):
        totals["without alignment MLP"] = totals["total"] - alignment
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    return "\n".join([table, "", *(f"{name:24}{n:>16,}" for name, n in totals.items())])
