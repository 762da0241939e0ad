"""The library: trained models as objects, and their pure forms for use inside other programs.

Axes: b batch of any size, h w pixels, n codes of an image.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gigatok_jax import checkpoint, sampling
from gigatok_jax.errors import CheckpointError, ConfigError, DataError
from gigatok_jax.model_config import num_tokens
from gigatok_jax.models import ar
from gigatok_jax.models import tokenizer as tokenizer_lib
from gigatok_jax.ops.image import to_pixels

MOST_IMAGES = 64  # that go through a tokenizer at once
MOST_SEQUENCES = 256  # that a prior writes at once
CODE_PARTS = ("cnn_encoder", "encoder", "pre_quant", "quantizer")  # what decides the codes


def encode(params, images: jax.Array, config) -> jax.Array:
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


def decode(params, codes: jax.Array, config) -> jax.Array:
    """Images of codes; pure, for use inside jit, grad and shard_map.

    Args:
        params, config: as for `encode`.
        codes: i32[b n] in [0, codebook_size).

    Returns:
        f32[b h w 3], nominally in [-1, 1], not clamped; `to_uint8` clamps.
    """
    module = tokenizer_lib.make(config, params["pre_quant"]["kernel"].dtype)
    return module.apply({"params": params}, codes, method="decode_codes").images


class Tokenizer:
    """A trained tokenizer: images to codes and back, in batches of any size.

    Immutable and safe to share between threads. A batch is cut and padded to powers of two up to
    64, so that few programs are compiled.
    """

    def __init__(self, params, config, dtype=None, *, step: int | None = None):
        """Args:
        params: nested dict of arrays, placed already or on the host.
        config: of the model, from `model_config`.
        dtype: of parameters and computation; None is float32.
        step: of the checkpoint they are from.
        """
        self.config = ml_collections.FrozenConfigDict(config)
        self.params = _placed(params, dtype)
        self.step = step
        self._encode = jax.jit(functools.partial(encode, config=self.config))
        self._decode = jax.jit(functools.partial(decode, config=self.config))

    @property
    def codebook(self) -> jax.Array:
        """f[k e], the rows as they are stored."""
        return self.params["quantizer"]["codebook"]

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
        return fingerprint({name: self.params[name] for name in CODE_PARTS})

    def encode(self, images) -> jax.Array:
        """uint8[b h w 3], or float[b h w 3] in [-1, 1] -> i32[b n].

        Raises:
            DataError: images of another size or number of channels.
        """
        expected = (self.image_size, self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise DataError(
                f"images are {images.shape}, expected [b, {', '.join(map(str, expected))}]"
            )
        return _in_batches(self._encode, self.params, MOST_IMAGES, images)

    def decode(self, codes) -> jax.Array:
        """i32[b n] -> f32[b h w 3], nominally in [-1, 1], not clamped.

        Raises:
            DataError: another number of codes, or a code outside the codebook.
        """
        check_codes(codes, self.num_tokens, self.config.codebook_size)
        return _in_batches(self._decode, self.params, MOST_IMAGES, codes)


class Prior:
    """A trained prior: class labels to codes. Immutable and safe to share between threads."""

    def __init__(self, params, config, dtype=None, *, step: int | None = None, trained_on=""):
        """Args:
        params, config, dtype, step: as for `Tokenizer`.
        trained_on: fingerprint of the tokenizer whose codes it learned, "" when unknown.
        """
        self.config = ml_collections.FrozenConfigDict(config)
        self.params = _placed(params, dtype)
        self.step, self.trained_on = step, trained_on
        self._module = ar.make(self.config, self.params["head"]["kernel"].dtype)

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
        return _in_batches(run, self.params, MOST_SEQUENCES, class_ids, image_ids)


def load_tokenizer(path: epath.PathLike, dtype=None, sharding=None, weights="auto") -> Tokenizer:
    """Tokenizer of a checkpoint.

    Args:
        path: a workdir, its checkpoints/, or one step.
        dtype: of parameters and computation; None is float32.
        sharding: where parameters go; None is the first device.
        weights: "ema" or "raw"; "auto" is the EMA copy.

    Raises:
        ConfigError: no path, or unknown weights.
        CheckpointError: nothing there, damaged, or not of a tokenizer.
    """
    params, extras = _load(path, {"auto": "ema_params"}, weights, sharding)
    config = ml_collections.ConfigDict(extras["config"]["model"])
    if config.kind == "prior":
        raise CheckpointError(f"{path} holds a prior, expected a tokenizer")
    return Tokenizer(params, config, dtype, step=extras["step"])


def load_prior(path: epath.PathLike, dtype=None, sharding=None, weights="auto") -> Prior:
    """Prior of a checkpoint; arguments and errors as for `load_tokenizer`.

    "auto" is the trained copy, which the original evaluates, not the EMA.
    """
    params, extras = _load(path, {"auto": "params"}, weights, sharding)
    config = ml_collections.ConfigDict(extras["config"]["model"])
    if config.kind != "prior":
        raise CheckpointError(f"{path} holds a tokenizer, expected a prior")
    trained_on = extras.get("tokenizer", "")
    return Prior(params, config, dtype, step=extras["step"], trained_on=trained_on)


def _load(path, auto: dict[str, str], weights: str, sharding):
    if not path:
        raise ConfigError("no checkpoint is named: give a workdir, its checkpoints/ or one step")
    names = auto | {"ema": "ema_params", "raw": "params"}
    if weights not in names:
        raise ConfigError(f"weights are {weights!r}, expected one of {', '.join(names)}")
    trees, extras = checkpoint.load_params(path, (names[weights],), sharding)
    return trees[names[weights]], extras


def fingerprint(params) -> str:
    """16 hex digits of names, shapes and values; values rounded to bfloat16."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in sorted(
        (jax.tree_util.keystr(keys), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    ):
        value = np.asarray(leaf).astype(jnp.bfloat16)
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


def _placed(params, dtype):
    """On the device, unless they are on one, in the type asked for; the codebook stays float32."""
    placed = jax.tree.map(lambda x: _auto(jnp.asarray(x, dtype or jnp.float32)), params)
    if "quantizer" in params:
        placed["quantizer"] = jax.tree.map(lambda x: _auto(jnp.asarray(x)), params["quantizer"])
    return placed


def _auto(x: jax.Array) -> jax.Array:
    """The same array on a mesh whose axes leave shardings to the compiler, as ours do."""
    if not isinstance(x.sharding, NamedSharding):
        return x
    mesh = x.sharding.mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))


def _in_batches(run: Callable[..., jax.Array], params, most: int, *arrays) -> jax.Array:
    """`run(params, ...)` over pieces padded to powers of two; the padding is cut off again."""
    place, shards = _batch_sharding(params)
    count, done = len(arrays[0]), []
    for start in range(0, max(count, 1), most):
        pieces = [array[start : start + most] for array in arrays]
        size = len(pieces[0])
        room = -(-(1 << max(size - 1, 0).bit_length()) // shards) * shards
        padded = [_padded(piece, room - size) for piece in pieces]
        done.append(run(params, *jax.device_put(padded, place))[:size])
    return done[0] if len(done) == 1 else jnp.concatenate(done)


def _batch_sharding(params):
    """Examples are divided over the mesh that the parameters lie on; its sharding and parts."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return sharding, 1
    axes = tuple(axis for axis in ("data", "fsdp") if axis in sharding.mesh.axis_names)
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(axes)), parts


def _padded(array, count: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((count, *array.shape[1:]), array.dtype)])
