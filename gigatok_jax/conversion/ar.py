"""Converts a prior's parameters to and from the original's state dict."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from gigatok_jax.weights import names, prior_names, recognise


def from_torch(state_dict: Mapping, model: ml_collections.ConfigDict) -> dict:
    """Converts a prior's state dict of the PyTorch original to our parameters, a nested dict.

    Args:
        state_dict: any mapping from name to array; each array is read once.
        model: config of the prior, see `model_config`.

    Raises:
        CheckpointError: a tensor is missing.
    """
    return names.from_torch(state_dict, prior_names.entries(model))


def to_torch(params: Mapping, model: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Converts our parameters of a prior to the original's state dict: every name, bit for bit."""
    return names.to_torch(params, prior_names.entries(model))


def infer_config(state_dict: Mapping, **overrides) -> ml_collections.ConfigDict:
    """Recognises the config of a prior from the names and shapes of its state dict.

    Fields that names and shapes do not show take the published values, which are printed: heads
    without qk-norm (each 64 wide, if no published model has the depth and width), and tokens with
    rotary positions. Arguments and exceptions are those of `conversion.tokenizer.infer_config`.
    """
    return recognise.infer_prior(state_dict, **overrides)
