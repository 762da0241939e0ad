"""Converts a tokenizer's parameters to and from the original's state dict."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from gigatok_jax.weights import names, recognise, tokenizer_names


def from_torch(state_dict: Mapping, model: ml_collections.ConfigDict) -> dict:
    """Converts a tokenizer's state dict of the original to our parameters, a nested dict.

    The record of latest codes is under "buffers".

    Args:
        state_dict: any mapping from name to array; each array is read once.
        model: config of the tokenizer, see `model_config`.

    Raises:
        CheckpointError: a tensor is missing.
    """
    return names.from_torch(state_dict, tokenizer_names.entries(model))


def to_torch(params: Mapping, model: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Converts our parameters of a tokenizer to the original's state dict, bit for bit.

    Without an entry "buffers", as in parameters of training code, the record of latest codes is
    zeros, from which the original starts.
    """
    if "buffers" not in params:
        params = {
            **params,
            "buffers": {"codebook_used": np.zeros(tokenizer_names.HISTORY, np.float32)},
        }
    return names.to_torch(params, tokenizer_names.entries(model))


def infer_config(state_dict: Mapping, **overrides) -> ml_collections.ConfigDict:
    """Recognises the config of a tokenizer from the names and shapes of its state dict.

    Fields that names and shapes do not show take the published values, which are printed: l2_norm,
    rotation, align_block and, of pooled queries, query_init.

    Args:
        state_dict: any mapping from name to array; only shapes are read.
        **overrides: fields of the config, see `model_config`.

    Raises:
        CheckpointError: the state dict is of no tokenizer that can be built here.
        ConfigError: an override does not exist or cannot work.
    """
    return recognise.infer_tokenizer(state_dict, **overrides)
