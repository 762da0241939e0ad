"""Sizes and options of every model as tables and ConfigDicts, and their checks, without jax."""

import math

import ml_collections

from gigatok_jax.errors import ConfigError, near, one_of

# Transformer sizes: layers, heads, width. Smoke runs and the demo use "pico" and "nano".
SIZES = {
    "pico": (3, 2, 64),
    "nano": (4, 4, 128),
    "tiny": (4, 4, 256),
    "small": (6, 8, 512),
    "base": (12, 12, 768),
    "large": (24, 16, 1024),
    "xl": (36, 20, 1280),
    "xxl": (48, 24, 1536),
}

# Published tokenizers: encoder size, decoder size, kind, layer of the 2D kind.
TOKENIZERS = {
    "S-S": ("small", "small", "1d", "transformer"),
    "S-B": ("small", "base", "1d", "transformer"),
    "S-L": ("small", "large", "1d", "transformer"),
    "B-L": ("base", "large", "1d", "transformer"),
    "XL-XXL": ("xl", "xxl", "1d", "transformer"),
    "S-S-2D": ("small", "small", "2d", "qformer"),
    "S-B-2D": ("small", "base", "2d", "transformer"),
    "B-L-2D": ("base", "large", "2d", "transformer"),
}

# Priors: layers, heads, width.
PRIORS = {
    "prior-B": (12, 12, 768),
    "prior-L": (24, 16, 1024),
    "prior-XL": (36, 20, 1280),
    "prior-XXL": (48, 24, 1536),
    "prior-XXXL": (48, 40, 2560),
    "prior-1B": (22, 32, 2048),
    "prior-3B": (24, 32, 3200),
    "prior-7B": (32, 32, 4096),
}

_CHOICES = {
    "kind": ("1d", "2d"),
    "stem": ("cnn", "patch"),
    "query_init": ("multi_level", "mean", "learnable"),
    "decoder_query_init": ("first", "learnable", "last_level", "multi_level"),
    "layer_2d": ("transformer", "qformer"),
    "encoder": tuple(SIZES),
    "decoder": tuple(SIZES),
}
_COUNTS = ("patch_size", "codebook_size", "codebook_width", "cnn_channels")
_PRIOR_COUNTS = ("layers", "heads", "kv_heads", "width", "vocab", "tokens", "classes")
_PRIOR_CHOICES = {"adaln": ("none", "full", "shared")}


class ModelConfig(ml_collections.FrozenConfigDict):
    """Immutable config of a model; equal to a ConfigDict with the same fields."""

    def __eq__(self, other) -> bool:
        return self.eq_as_configdict(other)

    __hash__ = ml_collections.FrozenConfigDict.__hash__


def tokenizer(**overrides) -> ml_collections.ConfigDict:
    """Makes the config of a tokenizer; the defaults are the options of the published 1D models.

    Args:
        **overrides: values of fields, by name.

    Raises:
        ConfigError: a field is unknown, or no such model can be built.
    """
    config = ml_collections.ConfigDict(
        {
            "kind": "1d",
            "encoder": "small",
            "decoder": "small",
            "latent_tokens": 256,
            "codebook_size": 16384,
            "codebook_width": 8,
            "l2_norm": True,
            "rotation": True,
            "query_init": "multi_level",
            "decoder_query_init": "first",
            "layer_2d": "transformer",
            "adaptive_group_norm": True,
            "depth_to_space": True,
            "cnn_attention": False,
            "qk_norm": False,
            "align_block": 3,  # decoder block whose output is aligned to the teacher; 0 is none
            "align_width": 768,  # width of the teacher's features
            "image_size": 256,
            "stem": "cnn",  # "patch": one linear layer per patch, for the demo, not in the paper
            "cnn_channels": 128,
            "patch_size": 16,  # pixels per token; the CNN halves the image log2 of it times
        }
    )
    return _override(config, overrides)


def prior(**overrides) -> ml_collections.ConfigDict:
    """Makes the config of an autoregressive prior, by default the published one of 111M parameters.

    Args:
        **overrides: values of fields, by name; `kv_heads` equals `heads` unless set here too.

    Raises:
        ConfigError: a field is unknown, or no such model can be built.
    """
    layers, heads, width = PRIORS["prior-B"]
    config = ml_collections.ConfigDict(
        {
            "kind": "prior",
            "layers": layers,
            "heads": heads,
            "kv_heads": heads,
            "width": width,
            "vocab": 16384,
            "tokens": 256,
            "classes": 1000,
            "rope": False,
            "qk_norm": False,
            "adaln": "none",  # "full" or "shared" condition every block on the class
        }
    )
    if "heads" in overrides:
        overrides.setdefault("kv_heads", overrides["heads"])
    return _override(config, overrides)


def model_config(name: str, **overrides) -> ml_collections.ConfigDict:
    """Makes the config of a published model: "S-S", "S-S-2D", "prior-B" and so on.

    Args:
        name: a key of `TOKENIZERS` or `PRIORS`.
        **overrides: values of fields, by name.

    Raises:
        ConfigError: the model or a field is unknown, or no such model can be built.
    """
    if name in PRIORS:
        layers, heads, width = PRIORS[name]
        return prior(**{"layers": layers, "heads": heads, "width": width} | overrides)
    one_of("model", name, PRIORS if name.startswith("prior-") else [*TOKENIZERS, *PRIORS])
    encoder, decoder, kind, layer_2d = TOKENIZERS[name]
    fields = {"encoder": encoder, "decoder": decoder, "kind": kind, "layer_2d": layer_2d}
    return tokenizer(**fields | overrides)


def _override(config, overrides):
    for name, value in overrides.items():
        if name not in config:
            hint = near(name, config)
            raise ConfigError(f"a model has no field {name!r}, only {', '.join(config)}{hint}")
        try:
            config[name] = value
        except TypeError:
            kind = type(config[name]).__name__
            raise ConfigError(f"model.{name} is {value!r}, expected a value of {kind}") from None
    validate(config)
    return config


def family(model: ml_collections.ConfigDict) -> str:
    """Returns the family of a model: "prior", or "tokenizer" for both the 1D and the 2D kind."""
    return "prior" if model.kind == "prior" else "tokenizer"


def grid_size(model: ml_collections.ConfigDict) -> int:
    """Returns the number of tokens along one side of a tokenizer's image grid."""
    return model.image_size // model.patch_size


def num_tokens(model: ml_collections.ConfigDict) -> int:
    """Returns the number of codes that a tokenizer makes of one image."""
    return model.latent_tokens if model.kind == "1d" else grid_size(model) ** 2


def validate(model: ml_collections.ConfigDict) -> None:
    """Raises ConfigError if a tokenizer or prior cannot be built; the message says what to change.

    Raises:
        ConfigError: a choice is unknown, a count is below 1 or no power of two or multiple where
            that is needed, or fields do not fit together, such as image and patches, latent tokens
            and pooled queries, or heads and width.
    """
    is_prior = family(model) == "prior"
    for field, choices in (_PRIOR_CHOICES if is_prior else _CHOICES).items():
        one_of(f"model.{field}", model[field], choices)
    for field in _PRIOR_COUNTS if is_prior else _COUNTS:
        if model[field] < 1:
            raise ConfigError(f"model.{field} is {model[field]}, expected at least 1")
    (_validate_prior if is_prior else _validate_tokenizer)(model)


def _validate_tokenizer(model) -> None:
    _validate_grid(model)
    if model.stem == "cnn" and model.cnn_channels % 32:
        raise ConfigError(
            f"model.cnn_channels is {model.cnn_channels}, expected a multiple of the 32 groups of"
            " its norms"
        )
    if not 0 <= model.align_block <= SIZES[model.decoder][0]:
        raise ConfigError(
            f"model.align_block is {model.align_block}, but decoder {model.decoder!r} has"
            f" {SIZES[model.decoder][0]} blocks; 0 turns alignment off"
        )


def _validate_prior(model) -> None:
    if model.width % model.heads:
        raise ConfigError(
            f"model.width is {model.width}, expected a multiple of the {model.heads} heads"
        )
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"model.kv_heads is {model.kv_heads}, expected a divisor of the {model.heads} heads"
        )
    if model.rope and model.width // model.heads % 2:
        raise ConfigError(
            f"model.rope turns pairs of features, but a head is {model.width // model.heads} wide;"
            " take another width or number of heads"
        )


def _validate_grid(model) -> None:
    size, patch, n = model.image_size, model.patch_size, model.latent_tokens
    if size < patch or size % patch:
        raise ConfigError(
            f"model.image_size is {size}, expected a multiple of {patch}, the pixels per token"
        )
    if patch & (patch - 1):
        raise ConfigError(f"model.patch_size is {patch}, expected a power of two")
    if n < 1 or n & (n - 1):
        raise ConfigError(f"model.latent_tokens is {n}, expected a power of two")
    if model.kind == "1d":
        _validate_levels(model)


def _validate_levels(model) -> None:
    """Raises ConfigError if the levels of pooled queries do not fit latent tokens and grid."""
    n, grid = model.latent_tokens, grid_size(model)
    if model.decoder_query_init in ("last_level", "multi_level") and n < 2:
        raise ConfigError(
            f"model.decoder_query_init is {model.decoder_query_init!r}, which needs at least 2"
            f" latent tokens, but model.latent_tokens is {n}"
        )
    fields = {"query_init": "mean", "decoder_query_init": "first"}
    for field, other in fields.items():
        columns, rows = pooled_grids(n)[-1]
        if model[field].endswith("_level") and (grid % columns or grid % rows):
            raise ConfigError(
                f"model.latent_tokens is {n}: its finest queries pool a {columns} x {rows} grid,"
                f" which does not divide the {grid} x {grid} grid of a {model.image_size} px image;"
                f" take fewer latent tokens, another image_size or {field}={other!r}"
            )


def pooled_grids(latent_tokens: int) -> list[tuple[int, int]]:
    """Returns the grid (columns, rows) of each level of pooled queries.

    Areas sum to `latent_tokens`.

    The areas are 1, 1, 2, 4, ...: columns double first, and the first two levels are both the mean
    of the whole image grid.
    """
    levels = int(math.log2(latent_tokens))
    split = [(2 ** ((level + 1) // 2), 2 ** (level // 2)) for level in range(levels)]
    return [(1, 1), *split]
