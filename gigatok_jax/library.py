"""Trained tokenizers and priors as objects, the loading of both, and checks of their inputs.

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

from gigatok_jax import parallel, sampling, trees
from gigatok_jax.errors import CheckpointError, ConfigError, DataError, ImmutableError, one_of
from gigatok_jax.model_config import ModelConfig, family, num_tokens
from gigatok_jax.models import ar
from gigatok_jax.models.tokenizer import decode, encode
from gigatok_jax.run import processes
from gigatok_jax.weights import read, write

MOST_IMAGES = 64  # largest batch of a tokenizer
MOST_SEQUENCES = 256  # largest batch of a prior
PARTS = {  # names at the top of the parameters
    "tokenizer": ("cnn_encoder", "encoder", "pre_quant", "quantizer", "decoder", "cnn_decoder"),
    "prior": ("class_embedding", "code_embedding", "blocks", "head"),
}
CODE_PARTS = ("cnn_encoder", "encoder", "pre_quant", "quantizer")  # parameters that decide codes
TYPES = ("float32", "bfloat16", "float16")

# Objects of one config share their compiled programs.
_encode = jax.jit(encode, static_argnames="config")
_decode = jax.jit(decode, static_argnames="config")


class _Model:
    """Base of `Tokenizer` and `Prior`: immutable parameters with their config and origin."""

    KIND: str
    config: ModelConfig
    step: int | None  # step of the checkpoint that the parameters come from
    _params: dict[str, Any]
    _training: dict[str, Any]

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        dtype: jax.typing.DTypeLike | None = None,
        *,
        step: int | None = None,
        training: Mapping[str, Any] | None = None,
        **fields: Any,
    ):
        """Makes a model of trained parameters.

        Args:
            params: nested dict of arrays, on devices or on the host.
            config: model config, from `model_config`.
            dtype: type of parameters and computation, one of `TYPES`; None is float32.
            step: step of the checkpoint that the parameters come from.
            training: JSON values about the training, which `save` keeps.
            **fields: further attributes, which differ between the kinds of model.

        Raises:
            ConfigError: the config describes another kind, or the dtype is not one of `TYPES`.
            CheckpointError: the parameters do not belong to a model of this kind.
        """
        config = ModelConfig(config)
        _check_parts(params, config, self.KIND)
        fields |= {"config": config, "step": step, "_training": copy.deepcopy(training or {})}
        vars(self).update(fields, _params=_on_devices(params, dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self).__name__
        raise ImmutableError(f"{kind}.{name} cannot be set: make another {kind}")

    def __delattr__(self, name: str) -> None:
        raise ImmutableError(f"{type(self).__name__}.{name} cannot be deleted")

    @property
    def params(self) -> dict[str, Any]:
        """Parameters as a new nested dict of arrays; a change of the dict changes no model."""
        return jax.tree.map(lambda x: x, self._params)

    @property
    def training(self) -> dict[str, Any]:
        """Origin of the parameters as far as it is known: weights (ema or raw), config, data."""
        return copy.deepcopy(self._training)

    def _save(self, folder: epath.PathLike, licence: str, **about) -> None:
        about |= {"step": self.step, "training": self._training}
        write.save_model(folder, self._params, self.config, about, licence)


class Tokenizer(_Model):
    """Trained tokenizer: turns images into codes and codes into images, in batches of any size.

    A tokenizer is immutable and safe to share between threads. A batch is cut and padded to powers
    of two up to 64, so that few programs are compiled.
    """

    KIND = "tokenizer"

    @property
    def codebook(self) -> jax.Array:
        """Codebook f32[k e]: the rows as they are stored, not normalised."""
        return self._params["quantizer"]["codebook"]

    @property
    def num_tokens(self) -> int:
        """Number of codes of one image."""
        return num_tokens(self.config)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.config.image_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters that decide codes, 16 hex digits, same in float32 and bfloat16."""
        return fingerprint({name: self._params[name] for name in CODE_PARTS})

    def encode(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Encodes images to codes.

        Args:
            images: uint8[b h w 3], or float[b h w 3] in [-1, 1].

        Returns:
            i32[b n] in [0, codebook_size).

        Raises:
            DataError: the images have another size, number of channels or dtype.
        """
        images = _checked_images(images, self.image_size)
        run = functools.partial(_encode, config=self.config)
        return parallel.in_batches(run, self._params, MOST_IMAGES, images)

    def decode(self, codes: np.ndarray | jax.Array) -> jax.Array:
        """Decodes codes to images.

        Args:
            codes: int[b n] in [0, codebook_size).

        Returns:
            f32[b h w 3], nominally in [-1, 1], not clamped; `to_uint8` clamps.

        Raises:
            DataError: an image has another number of codes, or a code is outside the codebook.
        """
        codes = _on_host(codes, "decode(params, codes, config)")
        check_codes(codes, self.num_tokens, self.config.codebook_size)
        run = functools.partial(_decode, config=self.config)
        return parallel.in_batches(run, self._params, MOST_IMAGES, codes.astype(np.int32))

    def warmup(
        self, sizes: Sequence[int] | None = None, dtype: jax.typing.DTypeLike = np.uint8
    ) -> None:
        """Compiles a tokenizer's `encode` and `decode`, so that later calls start at once.

        Args:
            sizes: batch sizes to compile for; None is every padded size.
            dtype: dtype of the images, uint8 or float32.
        """
        for size in sizes or parallel.padded_sizes(MOST_IMAGES):
            images = np.zeros((size, self.image_size, self.image_size, 3), dtype)
            jax.block_until_ready(self.decode(self.encode(images)))

    def save(self, folder: epath.PathLike, licence: str = "unknown") -> None:
        """Writes a tokenizer to a folder: `model.safetensors`, `config.json` and `README.md`.

        The arrays have the original's names. `load_tokenizer(folder)` returns the same parameters,
        bit for bit.

        Args:
            folder: destination, created if it does not exist.
            licence: licence of the weights, such as "mit", for the head of the model card.

        Raises:
            CheckpointError: the folder holds another model, or cannot be written.
        """
        self._save(folder, licence)


class Prior(_Model):
    """Trained prior: generates codes of images from class ids.

    A prior is immutable and safe to share between threads.
    """

    KIND = "prior"
    trained_on: str  # fingerprint of the tokenizer whose codes the prior learned, "" if unknown
    class_names: tuple[str, ...]  # names of the classes in the training data, empty if unknown
    _module: ar.Prior

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        dtype: jax.typing.DTypeLike | None = None,
        *,
        trained_on: str = "",
        class_names: Sequence[str] = (),
        **origin: Any,
    ):
        """Makes a prior of trained parameters.

        Args:
            params, config, dtype: as for `Tokenizer`.
            trained_on: fingerprint of the tokenizer whose codes the prior learned, "" if unknown.
            class_names: names of the classes in the order of their ids; empty if unknown.
            **origin: step and training, as for `Tokenizer`.

        Raises:
            ConfigError, CheckpointError: as for `Tokenizer`.
        """
        origin |= {"trained_on": trained_on, "class_names": tuple(class_names)}
        super().__init__(params, config, dtype, **origin)
        vars(self)["_module"] = ar.make(self.config, self._params["head"]["kernel"].dtype)

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
        """Generates codes of new images of given classes.

        Args:
            class_ids: int[b] in [0, classes]; the number of classes itself is the null class.
            seed: seed of all draws, in [0, 2^32); seed and image id together fix an image.
            cfg_scale, cfg_schedule, cfg_start, cfg_end, cfg_interval: see `sampling.weights`.
            temperature: divisor of the logits; 0 takes the most likely code.
            top_k, top_p: see `sampling.filtered`; 0 and 1 keep all codes.
            image_ids: int[b] in [0, 2^31), 0 to b - 1 by default.

        Returns:
            i32[b n] in [0, vocab).

        Raises:
            ConfigError: a setting is outside its range.
            DataError: a class or image id is outside its range.
        """
        if not 0 <= seed < 2**32:  # a key holds 32 bits: larger seeds would repeat smaller ones
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
        """Compiles a prior's `generate`, so that later calls start at once.

        Args:
            sizes: batch sizes to compile for; None is every padded size, up to 256.
            **settings: keywords of `generate`. Guidance on or off, and filters on or off, are
                separate programs.
        """
        for size in sizes or parallel.padded_sizes(MOST_SEQUENCES):
            jax.block_until_ready(self.generate(np.zeros(size, np.int32), **settings))

    def save(self, folder: epath.PathLike, licence: str = "unknown") -> None:
        """Writes a prior to a folder: `model.safetensors`, `config.json`, `README.md`.

        Arguments and errors are those of `Tokenizer.save`; `load_prior(folder)` reads the folder.
        """
        self._save(folder, licence, tokenizer=self.trained_on, class_names=self.class_names)


def load_tokenizer(
    path: epath.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    Parameters are read, cast and moved to their devices one at a time: the host never holds two
    copies of the model.

    Args:
        path: the original's `.pt`, a `.safetensors`, a folder with `model.safetensors`, or a
            checkpoint of a run: its workdir, its checkpoints/ or one step.
        dtype: type of parameters and computation, one of `TYPES`; None is float32.
        sharding: device or sharding of the parameters; None is the default device.
        weights: "ema" or "raw" (the trained copy); "auto" is the EMA copy if the checkpoint has it.

    Raises:
        ConfigError: the path is empty, weights or dtype are unknown, or the sharding does not
            divide a parameter.
        CheckpointError: the checkpoint is missing, damaged, or not of a tokenizer.
    """
    params, config, about = _load(path, "tokenizer", dtype, sharding, weights)
    return Tokenizer(params, config, dtype, step=about["step"], training=about["training"])


def load_prior(
    path: epath.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: jax.sharding.Sharding | jax.Device | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> Prior:
    """Loads the prior of a checkpoint; arguments and errors are those of `load_tokenizer`.

    Here `weights="auto"` is the trained copy, which the original evaluates, not the EMA copy.
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


def _load(path, kind: str, dtype, sharding, weights: str) -> read.Loaded:
    if isinstance(sharding, jax.Device):
        sharding = jax.sharding.SingleDeviceSharding(sharding)
    if not isinstance(sharding, jax.sharding.Sharding | None):
        raise ConfigError(f"sharding is {sharding!r}, expected a jax.sharding.Sharding or a device")
    type_of = functools.partial(_type_of, dtype=_checked_type(dtype))
    return read.load_model(path, kind, weights, type_of, sharding and parallel.auto_mesh(sharding))


def fingerprint(params: Mapping[str, Any]) -> str:
    """Computes a hash of parameters, 16 hex digits, from names, shapes and values in bfloat16.

    The collection "buffers" is left out. Arrays may be divided over processes; all processes then
    call this function.
    """
    digest = hashlib.blake2b(digest_size=8)
    hashed = {name: tree for name, tree in params.items() if name != "buffers"}
    leaves = jax.tree_util.tree_leaves_with_path(hashed)
    for path, leaf in sorted((jax.tree_util.keystr(keys), leaf) for keys, leaf in leaves):
        array = processes.whole(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
        value = array.astype(jnp.bfloat16)
        digest.update(f"{path}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8))
    return digest.hexdigest()


def check_codes(codes: np.ndarray, tokens: int, vocab: int) -> None:
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
    """Returns images of the right shape as uint8 or float32; raises DataError for other images."""
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
    """Checks that config and parameters belong to a kind of model, "tokenizer" or "prior".

    Raises:
        ConfigError: the config is of another kind.
        CheckpointError: a part of the parameters is missing.
    """
    if family(config) != kind:
        raise ConfigError(f"the config is of a {family(config)}, expected one of a {kind}")
    if missing := [name for name in PARTS[kind] if name not in params]:
        raise CheckpointError(
            f"the parameters have no {missing[0]}, only {', '.join(map(str, params))}: expected"
            f" those of a {kind}"
        )


def _checked_type(dtype) -> np.dtype:
    try:
        name = jnp.dtype(dtype or jnp.float32).name
    except TypeError:
        name = dtype
    one_of("dtype", name, TYPES)
    return jnp.dtype(name)


def _type_of(path: str, dtype: np.dtype) -> np.dtype:
    """Returns the dtype of a parameter by path: float32 for codebook and buffers, else `dtype`."""
    return np.dtype(np.float32) if path.startswith(("quantizer/", "buffers/")) else dtype


def _on_devices(params: Mapping[str, Any], dtype) -> dict[str, Any]:
    """Casts parameters to a dtype, and copies numpy arrays among them to the default device."""
    dtype = _checked_type(dtype)

    def to_device(keys, leaf):
        type_ = _type_of(trees.path(keys), dtype)
        leaf = jnp.array(leaf, type_, copy=not isinstance(leaf, jax.Array))
        return jax.device_put(leaf, parallel.auto_mesh(leaf.sharding))

    return jax.tree_util.tree_map_with_path(to_device, dict(params))
