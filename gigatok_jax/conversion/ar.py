"""Prior parameters to and from the original's state dict, in the original's order."""

from collections.abc import Mapping

import numpy as np

from gigatok_jax.weights import names, prior_names, recognise


def from_torch(state_dict: Mapping, model) -> dict:
    """Parameters from a state dict of the original.

    Args:
        state_dict: any mapping from name to array; each is read once.
        model: config of the prior, see `model_config`.

    Raises:
        CheckpointError: tensors are missing.
    """
    return names.from_torch(state_dict, prior_names.entries(model))


def to_torch(params: Mapping, model) -> dict[str, np.ndarray]:
    """The original's state dict, every name of it, bit for bit."""
    return names.to_torch(params, prior_names.entries(model))


def infer_config(state_dict: Mapping, **overrides):
    """Config of the prior that a state dict is of, from its names and shapes alone.

    What they do not show takes the published value and is printed: heads without qk-norm (64 wide
    each, where no published model has the depth and width), and tokens with rotary positions.

    Args, Raises: as of `conversion.tokenizer.infer_config`.
    """
    return recognise.infer_prior(state_dict, **overrides)
