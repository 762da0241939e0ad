"""The library: trained models as objects, and their pure forms for use inside other programs.

Axes: b batch of any size, h w pixels, n codes of an image.
"""

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from gigatok_jax import parallel, sampling
from gigatok_jax.errors import CheckpointError, ConfigError, DataError, ImmutableError
from gigatok_jax.model_config import family, num_tokens
from gigatok_jax.models import ar
from gigatok_jax.models import tokenizer as tokenizer_lib
from gigatok_jax.ops.image import to_pixels
from gigatok_jax.run import processes
from gigatok_jax.weights import load

MOST_IMAGES = 64  # that go through a tokenizer at once
MOST_SEQUENCES = 256  # that a prior writes at once
PARTS = {  # at the top of the parameters
    "tokenizer": ("cnn_encoder", "encoder", "pre_quant", "quantizer", "decoder", "cnn_decoder"),
    "prior": ("class_embedding", "code_embedding", "blocks", "head"),
}
CODE_PARTS = ("cnn_encoder", "encoder", "pre_quant", "quantizer")  # what decides the codes
TYPES = ("float32", "bfloat16", "float16")


def encode(
    params: Mapping[str, Any], images: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Codes of images; pure, for use inside jit, grad and shard_map.

    Args:
        params: of the tokenizer; their type is the type computed in.
        images: uint8[b h w 3], or float[b h w 3] in [-1, 1].
        config: of the model.

    Returns:
        i32[b n] in [0, codebook_size).
    """
    pixels = to_pixels(images) if images.dtype == jnp.uint8 else images
    module = tokenizer_lib.make(config, params["pre_quant"]["kernel"].dtype)
    return module.apply({"params": params}, pixels, method="encode").quantized.codes


def decode(
    params: Mapping[str, Any], codes: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Images of codes; pure, for use inside jit, grad and shard_map.

    Args:
        params, config: as for `encode`.
        codes: i32[b n] in [0, codebook_size).

    Returns:
        f32[b h w 3], nominally in [-1, 1], not clamped; `to_uint8` clamps.
    """
    module = tokenizer_lib.make(config, params["pre_quant"]["kernel"].dtype)
    return module.apply({"params": params}, codes, method="decode_codes").images


# Objects of one config share what is compiled.
_encode = jax.jit(encode, static_argnames="config")
_decode = jax.jit(decode, static_argnames="config")


class ModelConfig(ml_collections.FrozenConfigDict):
    """Config of a model that nothing changes; equal to a ConfigDict of the same fields."""

    def __eq__(self, other) -> bool:
        return self.eq_as_configdict(other)

    __hash__ = ml_collections.FrozenConfigDict.__hash__


class _Model:
    """What a tokenizer and a prior have in common."""

    KIND: str
    config: ModelConfig
    step: int | None  # of the checkpoint that the parameters are from
    _params: dict[str, Any]
    _training: dict[str, Any]

    def __init__(self, params, config, dtype, step, training, **fields):
        config = ModelConfig(config)
        _check_parts(params, config, self.KIND)
        fields |= {"config": config, "step": step, "_training": copy.deepcopy(training or {})}
        vars(self).update(fields, _params=_placed(params, dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise ImmutableError(f"{kind}.{name} cannot be set: make another {kind}")

    def __delattr__(self, name: str) -> None:
        raise ImmutableError(f"{type(self).__name__}.{name} cannot be deleted")

    @property
    def params(self) -> dict[str, Any]:
        """Nested dict of arrays; every time another one, so that changes to it stay outside."""
        return jax.tree.map(lambda x: x, self._params)

    @property
    def training(self) -> dict[str, Any]:
        """How the parameters came to be, where known: weights (ema or raw), config, data."""
        return copy.deepcopy(self._training)

    def _save(self, folder: epath.PathLike, licence: str, **about) -> None:
        about |= {"step": self.step, "training": self._training}
        load.save_model(folder, self._params, self.config, about, licence)


class Tokenizer(_Model):
    """A trained tokenizer: images to codes and back, in batches of any size.

    Immutable and safe to share between threads. A batch is cut and padded to powers of two up to
    64, so that few programs are compiled.
    """

    KIND = "tokenizer"

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        dtype: jax.typing.DTypeLike | None = None,
        *,
        step: int | None = None,
        training: Mapping[str, Any] | None = None,
    ):
        """Args:
        params: nested dict of arrays, placed already or on the host.
        config: of the model, from `model_config`.
        dtype: of parameters and computation, one of `TYPES`; None is float32.
        step: of the checkpoint they are from.
        training: JSON values about how they were made, which `save` keeps.

        Raises:
            ConfigError: the config of a prior, or another type.
            CheckpointError: the parameters are not of a tokenizer.
        """
        super().__init__(params, config, dtype, step, training)

    @property
    def codebook(self) -> jax.Array:
        """f32[k e], the rows as they are stored."""
        return self._params["quantizer"]["codebook"]

    @property
    def num_tokens(self) -> int:
        """Codes of one image."""
        return num_tokens(self.config)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.config.image_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the parameters that decide codes, the same in float32 and bfloat16."""
        return fingerprint({name: self._params[name] for name in CODE_PARTS})

    def encode(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Codes of images.

        Args:
            images: uint8[b h w 3], or float[b h w 3] in [-1, 1].

        Returns:
            i32[b n] in [0, codebook_size).

        Raises:
            DataError: images of another size, number of channels or type.
        """
        images = _checked_images(images, self.image_size)
        run = functools.partial(_encode, config=self.config)
        return parallel.in_batches(run, self._params, MOST_IMAGES, images)

    def decode(self, codes: np.ndarray | jax.Array) -> jax.Array:
        """Images of codes.

        Args:
            codes: int[b n] in [0, codebook_size).

        Returns:
            f32[b h w 3], nominally in [-1, 1], not clamped; `to_uint8` clamps.

        Raises:
            DataError: another number of codes, or a code outside the codebook.
        """
        codes = _on_host(codes, "decode(params, codes, config)")
        check_codes(codes, self.num_tokens, self.config.codebook_size)
        run = functools.partial(_decode, config=self.config)
        return parallel.in_batches(run, self._params, MOST_IMAGES, codes.astype(np.int32))

    def warmup(
        self, sizes: Sequence[int] | None = None, dtype: jax.typing.DTypeLike = np.uint8
    ) -> None:
        """Compiles `encode` and `decode`, so that later calls start at once.

        Args:
            sizes: of batches; None is every padded size.
            dtype: of the images, uint8 or float32.
        """
        for size in sizes or parallel.padded_sizes(MOST_IMAGES):
            images = np.zeros((size, self.image_size, self.image_size, 3), dtype)
            jax.block_until_ready(self.decode(self.encode(images)))

    def save(self, folder: epath.PathLike, licence: str = "unknown") -> None:
        """Writes `model.safetensors` in the original's names, `config.json` and `README.md`.

        `load_tokenizer(folder)` gives the same parameters, bit for bit.

        Args:
            folder: made when missing.
            licence: of the weights, such as "mit", for the head of the model card.

        Raises:
            CheckpointError: the folder holds another model, or cannot be written.
        """
        self._save(folder, licence)


class Prior(_Model):
    """A trained prior: class labels to codes. Immutable and safe to share between threads."""

    KIND = "prior"
    trained_on: str  # fingerprint of the tokenizer whose codes it learned, "" when unknown
    class_names: tuple[str, ...]  # as its data called them, none when unknown
    _module: ar.Prior

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        dtype: jax.typing.DTypeLike | None = None,
        *,
        step: int | None = None,
        training: Mapping[str, Any] | None = None,
        trained_on: str = "",
        class_names: Sequence[str] = (),
    ):
        """Args:
        params, config, dtype, step, training: as for `Tokenizer`.
        trained_on: fingerprint of the tokenizer whose codes it learned, "" when unknown.
        class_names: of its classes, in the order of their ids; none when unknown.

        Raises:
            ConfigError: the config of a tokenizer, or another type.
            CheckpointError: the parameters are not of a prior.
        """
        fields = {"trained_on": trained_on, "class_names": tuple(class_names)}
        super().__init__(params, config, dtype, step, training, **fields)
        module = ar.make(self.config, self._params["head"]["kernel"].dtype)
        vars(self).update(_module=module)

    def generate(
        self,
        class_ids: Sequence[int] | np.ndarray,
        seed: int = 0,
        cfg_scale: float = 1.75,
        cfg_schedule: str = "step",
        cfg_start: float = 0.18,
        cfg_end: float = 1.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        image_ids: Sequence[int] | np.ndarray | None = None,
    ) -> jax.Array:
        """Codes of new images.

        Args:
            class_ids: [b] in [0, classes]; the number of classes itself is the null class.
            seed: of all draws; with the image id it names an image.
            cfg_scale, cfg_schedule, cfg_start, cfg_end, cfg_interval: see `sampling.weights`.
            temperature: 0 takes the most likely code.
            top_k, top_p: see `sampling.filtered`; 0 and 1 keep all codes.
            image_ids: [b], 0 to b - 1 by default.

        Returns:
            i32[b n].

        Raises:
            ConfigError: a setting outside its range.
            DataError: a class or image id that cannot be.
        """
        if not 0 <= seed < 2**32:  # what a key holds: others would repeat those
            raise ConfigError(f"seed is {seed}, expected 0 to {2**32 - 1}")
        class_ids = _checked_ids(class_ids, self.config.classes + 1, "class")
        image_ids = np.arange(len(class_ids)) if image_ids is None else image_ids
        image_ids = _checked_ids(image_ids, 2**31, "image")
        if len(image_ids) != len(class_ids):
            raise DataError(f"{len(image_ids)} image ids for {len(class_ids)} class ids")
        weight = sampling.weights(
            self.config.tokens, cfg_scale, cfg_schedule, cfg_start, cfg_end, cfg_interval
        )
        run = functools.partial(
            sampling.generate,
            self._module,
            rng=jax.random.key(seed),
            weight=weight,
            settings=sampling.make_draw(temperature, top_k, top_p),
            guided=cfg_scale != 1,
            filters=top_k > 0 or top_p < 1,
        )
        return parallel.in_batches(run, self._params, MOST_SEQUENCES, class_ids, image_ids)

    def warmup(self, sizes: Sequence[int] | None = None, **settings) -> None:
        """Compiles `generate`, so that later calls start at once.

        Args:
            sizes: of batches; None is every padded size, up to 256.
            **settings: of `generate`; with or without guidance, and with or without filters, are
                programs of their own.
        """
        for size in sizes or parallel.padded_sizes(MOST_SEQUENCES):
            jax.block_until_ready(self.generate(np.zeros(size, np.int32), **settings))

    def save(self, folder: epath.PathLike, licence: str = "unknown") -> None:
        """Writes `model.safetensors`, `config.json` and `README.md`; see `Tokenizer.save`."""
        self._save(folder, licence, tokenizer=self.trained_on, class_names=self.class_names)


def load_tokenizer(
    path: epath.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> Tokenizer:
    """Tokenizer of a checkpoint.

    Parameters go to their place one after the other, in their type; the host never holds two copies
    of them.

    Args:
        path: the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a
            checkpoint of a run: its workdir, its checkpoints/ or one step.
        dtype: of parameters and computation, one of `TYPES`; None is float32.
        sharding: where parameters go; None is the default device.
        weights: "ema" or "raw"; "auto" is the EMA copy if there is one.

    Raises:
        ConfigError: no path, unknown weights or type, or a sharding that a parameter does not fit.
        CheckpointError: nothing there, damaged, or not of a tokenizer.
    """
    params, config, about = _load(path, "tokenizer", dtype, sharding, weights)
    return Tokenizer(params, config, dtype, step=about["step"], training=about["training"])


def load_prior(
    path: epath.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> Prior:
    """Prior of a checkpoint; arguments and errors as for `load_tokenizer`.

    "auto" is the trained copy, which the original evaluates, not the EMA.
    """
    params, config, about = _load(path, "prior", dtype, sharding, weights)
    return Prior(
        params,
        config,
        dtype,
        step=about["step"],
        training=about["training"],
        trained_on=about["tokenizer"],
        class_names=about["class_names"],
    )


def _load(path, kind: str, dtype, sharding, weights: str) -> load.Loaded:
    if isinstance(sharding, jax.Device):
        sharding = jax.sharding.SingleDeviceSharding(sharding)
    if not isinstance(sharding, jax.sharding.Sharding | None):
        raise ConfigError(f"sharding is {sharding!r}, expected a jax.sharding.Sharding or a device")
    type_of = functools.partial(_type_of, dtype=_checked_type(dtype))
    return load.load_model(path, kind, weights, type_of, sharding and parallel.auto_mesh(sharding))


def fingerprint(params: Mapping[str, Any]) -> str:
    """16 hex digits of names, shapes and values; values rounded to bfloat16, no buffers.

    Arrays may be divided over processes, all of which call it then.
    """
    digest = hashlib.blake2b(digest_size=8)
    named = {name: tree for name, tree in params.items() if name != "buffers"}
    for path, leaf in sorted(
        (jax.tree_util.keystr(keys), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(named)
    ):
        whole = processes.whole(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
        value = whole.astype(jnp.bfloat16)
        digest.update(f"{path}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8))
    return digest.hexdigest()


def check_codes(codes, tokens: int, vocab: int) -> None:
    """Raises DataError unless codes are int[b tokens] in [0, vocab)."""
    if codes.ndim != 2 or codes.shape[1] != tokens:
        raise DataError(f"codes are {codes.shape}, expected [b, {tokens}]")
    if not np.issubdtype(codes.dtype, np.integer):
        raise DataError(f"codes are {codes.dtype}, expected integers")
    if codes.size:
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= vocab:
            raise DataError(f"codes go from {low} to {high}, expected 0 to {vocab - 1}")


def _checked_ids(ids, limit: int, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{what} ids are {ids.dtype}{list(ids.shape)}, expected a list of integers")
    if ids.size and not (ids.min() >= 0 and ids.max() < limit):
        bad = ids[(ids < 0) | (ids >= limit)][0]
        raise DataError(f"{what} id {bad} is outside 0 to {limit - 1}")
    return ids.astype(np.int32)


def _checked_images(images, size: int) -> np.ndarray | jax.Array:
    """Images that a tokenizer takes, uint8 or float32."""
    if not isinstance(images, jax.Array) or isinstance(images, jax.core.Tracer):
        images = _on_host(images, "encode(params, images, config)")
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise DataError(f"images are {images.shape}, expected [b, {size}, {size}, 3]")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise DataError(f"images are {images.dtype}, expected uint8, or floats in [-1, 1]")
    return images.astype(np.float32)


def _on_host(array, pure: str) -> np.ndarray:
    if isinstance(array, jax.core.Tracer):
        raise DataError(f"inside jit, grad and shard_map call gigatok_jax.{pure}")
    return np.asarray(array)


def _check_parts(params: Mapping[str, Any], config: ModelConfig, kind: str) -> None:
    """Refuses what is seen at a glance to be no model of that kind."""
    found = family(config)
    if found != kind:
        raise ConfigError(f"the config is of a {found}, expected one of a {kind}")
    if missing := [part for part in PARTS[kind] if part not in params]:
        raise CheckpointError(
            f"the parameters have no {missing[0]}, only {', '.join(map(str, params))}: expected"
            f" those of a {kind}"
        )


def _checked_type(dtype) -> np.dtype:
    try:
        chosen = jnp.dtype(dtype or jnp.float32)
    except TypeError:
        chosen = None
    if chosen is None or chosen.name not in TYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(TYPES)}")
    return chosen


def _type_of(path: str, dtype: np.dtype) -> np.dtype:
    """Type of a parameter by its path: distances to the codebook are taken in float32."""
    return np.dtype(np.float32) if path.startswith(("quantizer/", "buffers/")) else dtype


def _placed(params: Mapping[str, Any], dtype) -> dict[str, Any]:
    """In the type asked for, on the device unless they are on one; copies of numpy arrays."""
    dtype = _checked_type(dtype)

    def place(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        leaf = jnp.array(leaf, _type_of(path, dtype), copy=not isinstance(leaf, jax.Array))
        return jax.device_put(leaf, parallel.auto_mesh(leaf.sharding))

    return jax.tree_util.tree_map_with_path(place, dict(params))
