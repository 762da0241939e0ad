"""Tokenizer parameters to and from the original's state dict, in the original's order."""

from collections.abc import Mapping

import numpy as np

from gigatok_jax.weights import names, recognise, tokenizer_names


def from_torch(state_dict: Mapping, model) -> dict:
    """Parameters from a state dict of the original; counters sit under "buffers".

    Args:
        state_dict: any mapping from name to array; each is read once.
        model: config of the tokenizer, see `model_config`.

    Raises:
        CheckpointError: tensors are missing.
    """
    return names.from_torch(state_dict, tokenizer_names.entries(model))


def to_torch(params: Mapping, model) -> dict[str, np.ndarray]:
    """The original's state dict, every name of it, bit for bit.

    A missing "buffers" entry (parameters fresh from training code) is written as zeros, the value
    that the original starts from.
    """
    if "buffers" not in params:
        params = {
            **params,
            "buffers": {"codebook_used": np.zeros(tokenizer_names.HISTORY, np.float32)},
        }
    return names.to_torch(params, tokenizer_names.entries(model))


def infer_config(state_dict: Mapping, **overrides):
    """Config of the tokenizer that a state dict is of, from its names and shapes alone.

    What they do not show takes the published value and is printed: l2_norm, rotation,
    align_block and, of pooled queries, query_init.

    Args:
        state_dict: any mapping from name to array; nothing is read but shapes.
        **overrides: fields of the config, see `model_config`.

    Raises:
        CheckpointError: no tokenizer that can be built here.
        ConfigError: an override that does not exist or cannot work.
    """
    return recognise.infer_tokenizer(state_dict, **overrides)
