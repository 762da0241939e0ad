"""Sizes and options of every model: one table, plain ConfigDicts, no jax."""

import math

import ml_collections

from gigatok_jax.errors import ConfigError

# Transformer sizes: layers, heads, width. "pico" and "nano" are for smoke runs and the demo.
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
    "decoder_query_init": ("first", "learnable"),
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
    """Config of a tokenizer; the defaults are the options of the published 1D models.

    Raises:
        ConfigError: an override does not exist or the result cannot be built.
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
            "align_block": 3,  # decoder block whose output meets the teacher; 0 is none
            "align_width": 768,  # width of the teacher's features
            "image_size": 256,
            "stem": "cnn",  # "patch" is one linear layer per patch: the demo, not a paper model
            "cnn_channels": 128,
            "patch_size": 16,  # pixels per token; the CNN halves the image log2 of it times
        }
    )
    return _override(config, overrides)


def prior(**overrides) -> ml_collections.ConfigDict:
    """Config of an autoregressive prior; the defaults are the published 111M one.

    Raises:
        ConfigError: an override does not exist or the result cannot be built.
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
    """Config of a published model: "S-S" ... "XL-XXL", "S-S-2D" ..., "prior-B" ... "prior-7B".

    Args:
        name: one of `TOKENIZERS` or `PRIORS`.
        **overrides: any field of the config, by keyword.

    Raises:
        ConfigError: no such model or field, or a combination that cannot be built.
    """
    if name in PRIORS:
        layers, heads, width = PRIORS[name]
        return prior(**{"layers": layers, "heads": heads, "width": width} | overrides)
    if name not in TOKENIZERS:
        known = ", ".join(PRIORS if name.startswith("prior-") else [*TOKENIZERS, *PRIORS])
        raise ConfigError(f"no model {name!r}; there are {known}")
    encoder, decoder, kind, layer_2d = TOKENIZERS[name]
    fields = {"encoder": encoder, "decoder": decoder, "kind": kind, "layer_2d": layer_2d}
    return tokenizer(**fields | overrides)


def _override(config, overrides):
    for name, value in overrides.items():
        if name not in config:
            raise ConfigError(f"a model has no field {name!r}; it has {', '.join(config)}")
        try:
            config[name] = value
        except TypeError:
            kind = type(config[name]).__name__
            raise ConfigError(f"model.{name} is {value!r}, expected a value of {kind}") from None
    validate(config)
    return config


def family(model) -> str:
    """What a model is: "prior", or "tokenizer" of either kind."""
    return "prior" if model.kind == "prior" else "tokenizer"


def grid_size(model) -> int:
    """Tokens along one side of the image grid."""
    return model.image_size // model.patch_size


def num_tokens(model) -> int:
    """Codes of one image."""
    return model.latent_tokens if model.kind == "1d" else grid_size(model) ** 2


def validate(model) -> None:
    """Refuses a tokenizer or prior that cannot be built, with what to change.

    Raises:
        ConfigError: an unknown choice, an image that the grid does not fit, latent tokens that
            the pooled queries cannot make, or heads that do not divide what they share.
    """
    if model.kind == "prior":
        _validate_prior(model)
    else:
        _validate_tokenizer(model)


def _validate_tokenizer(model) -> None:
    _validate_choices(model, _CHOICES)
    _validate_counts(model, _COUNTS)
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


def _validate_choices(model, known) -> None:
    for field, choices in known.items():
        if model[field] not in choices:
            raise ConfigError(f"model.{field} is {model[field]!r}, expected one of {choices}")


def _validate_counts(model, fields: tuple[str, ...]) -> None:
    for field in fields:
        if model[field] < 1:
            raise ConfigError(f"model.{field} is {model[field]}, expected at least 1")


def _validate_prior(model) -> None:
    _validate_choices(model, _PRIOR_CHOICES)
    _validate_counts(model, _PRIOR_COUNTS)
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
    if model.kind == "1d" and model.query_init == "multi_level":
        columns, rows = pooled_grids(n)[-1]
        grid = grid_size(model)
        if grid % columns or grid % rows:
            raise ConfigError(
                f"model.latent_tokens is {n}: its finest queries pool a {columns} x {rows} grid,"
                f" which does not divide the {grid} x {grid} grid of a {size} px image;"
                " take fewer latent tokens, another image_size or query_init='mean'"
            )


def pooled_grids(latent_tokens: int) -> list[tuple[int, int]]:
    """(columns, rows) of each level of pooled queries; their areas sum to `latent_tokens`.

    Levels double, columns first: 1, 1, 2, 4, ...; the first two are both the global mean.
    """
    levels = int(math.log2(latent_tokens))
    split = [(2 ** ((level + 1) // 2), 2 ** (level // 2)) for level in range(levels)]
    return [(1, 1), *split]
