"""Image tokenizer, from images to codes and back.

Axes: b batch, H W pixels, h w image grid, n latent tokens, c width, e codebook width, t teacher's
width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.typing import DTypeLike

from gigatok_jax.model_config import SIZES, grid_size
from gigatok_jax.models import cnn, layers, qformer, vit2d
from gigatok_jax.models.cnn import TOKEN_WIDTH
from gigatok_jax.models.quantizer import Quantized, VectorQuantizer
from gigatok_jax.ops.image import to_pixels


class Encoding(NamedTuple):
    """Record of the tokenizer's values at every stage from an image to its codes."""

    features: jax.Array  # f[b h w 256], from the CNN
    tokens: jax.Array  # f[b n c], from the transformer after its last norm
    projected: jax.Array  # f[b n 256]
    latents: jax.Array  # f[b n e], before quantization
    quantized: Quantized


class Decoding(NamedTuple):
    """Record of the tokenizer's values at every stage from quantized latents to an image."""

    tapped: jax.Array | None  # f[b hw c], output of the alignment block
    aligned: jax.Array | None  # f[b hw t], output of the alignment MLP for it
    features: jax.Array  # f[b h w 256], for the CNN
    images: jax.Array  # f32[b H W 3], nominally in [-1, 1]


class Tokenizer(nn.Module):
    """Module of a whole image tokenizer: encoder, quantizer and decoder.

    Source: arXiv:2504.08736, figure 2.
    """

    cnn_encoder: nn.Module
    encoder: nn.Module
    quantizer: VectorQuantizer
    decoder: nn.Module
    cnn_decoder: nn.Module
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        width = self.quantizer.codebook_width
        into, out = layers.fan_in_uniform(TOKEN_WIDTH), layers.fan_in_uniform(width)
        self.pre_quant = nn.Dense(width, dtype=self.dtype, kernel_init=into, bias_init=into)
        self.post_quant = nn.Dense(TOKEN_WIDTH, dtype=self.dtype, kernel_init=out, bias_init=out)

    def encode(self, images: jax.Array) -> Encoding:
        """Encodes images f[b H W 3] in [-1, 1]; returns every stage from features to codes."""
        features = self.cnn_encoder(images.astype(self.dtype))
        encoded = self.encoder(features)
        latents = self.pre_quant(encoded.projected)
        return Encoding(features, *encoded, latents, self.quantizer(latents))

    def decode(self, latents: jax.Array) -> Decoding:
        """Decodes quantized latents f[b n e]; returns images and all stages before the images."""
        decoded = self.decoder(self.post_quant(latents.astype(self.dtype)))
        return Decoding(*decoded, self.decode_features(decoded.features))

    def decode_features(self, features: jax.Array) -> jax.Array:
        """Decodes features f[b h w 256] to images f32[b H W 3], by the CNN decoder alone."""
        return self.cnn_decoder(features).astype(jnp.float32)

    def decode_codes(self, codes: jax.Array) -> Decoding:
        """Decodes codes i32[b n]; returns images and all stages before the images."""
        return self.decode(self.quantizer.lookup(codes))

    def __call__(self, images: jax.Array) -> tuple[Encoding, Decoding]:
        """Encodes and decodes images f[b H W 3] in [-1, 1]; `init` creates every parameter."""
        encoding = self.encode(images)
        return encoding, self.decode(encoding.quantized.latents)


def make(
    model: ml_collections.ConfigDict,
    dtype: DTypeLike = jnp.float32,
    loop: layers.Loop = layers.SCANNED,
) -> Tokenizer:
    """Makes the module of the tokenizer that a config describes.

    Args:
        model: config of a tokenizer, from `model_config`.
        dtype: compute type; parameters are float32.
        loop: how the transformers' blocks are compiled; `remat="full"` holds for the CNN too.
    """
    shared = {"dtype": dtype, "loop": loop}
    encoder = dict(zip(("layers", "heads", "width"), SIZES[model.encoder], strict=True))
    decoder = dict(zip(("layers", "heads", "width"), SIZES[model.decoder], strict=True))
    decoder |= {
        "grid": grid_size(model),
        "align_block": model.align_block,
        "align_width": model.align_width,
    }
    if model.kind == "1d":
        encoder |= {"latent_tokens": model.latent_tokens, "query_init": model.query_init}
        decoder |= {"query_init": model.decoder_query_init}
        shared |= {"qk_norm": model.qk_norm}
        classes = qformer.QFormerEncoder, qformer.QFormerDecoder
    else:
        shared |= {"layer": model.layer_2d}
        classes = vit2d.Encoder2D, vit2d.Decoder2D
    stem_in, stem_out = _stems(model, dtype, loop.remat == "full")
    quantizer = VectorQuantizer(
        model.codebook_size, model.codebook_width, model.l2_norm, model.rotation
    )
    encoder, decoder = classes[0](**encoder, **shared), classes[1](**decoder, **shared)
    return Tokenizer(stem_in, encoder, quantizer, decoder, stem_out, dtype)


def _stems(model, dtype, remat: bool) -> tuple[nn.Module, nn.Module]:
    """Makes the modules between pixels and the feature grid; returns (encoder, decoder)."""
    if model.stem == "patch":
        return cnn.PatchEncoder(model.patch_size, dtype), cnn.PatchDecoder(model.patch_size, dtype)
    fields = {
        "base": model.cnn_channels,
        "patch_size": model.patch_size,
        "attention": model.cnn_attention,
        "remat": remat,
        "dtype": dtype,
    }
    out = {"adaptive_group_norm": model.adaptive_group_norm, "depth_to_space": model.depth_to_space}
    return cnn.CNNEncoder(**fields), cnn.CNNDecoder(**fields, **out)


def encode(
    params: Mapping[str, Any], images: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Encodes images as codes; pure, for use inside jit, grad and shard_map.

    Args:
        params: nested dict of a tokenizer's parameters; their dtype is the compute type.
        images: uint8[b h w 3], or float[b h w 3] in [-1, 1].
        config: model config of the tokenizer.

    Returns:
        i32[b n] in [0, codebook_size).
    """
    pixels = to_pixels(images) if images.dtype == jnp.uint8 else images
    module = make(config, params["pre_quant"]["kernel"].dtype)
    return module.apply({"params": params}, pixels, method="encode").quantized.codes


def decode(
    params: Mapping[str, Any], codes: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
    """Decodes codes to images; pure, for use inside jit, grad and shard_map.

    Args:
        params: nested dict of a tokenizer's parameters; their dtype is the compute type.
        codes: i32[b n] in [0, codebook_size).
        config: model config of the tokenizer.

    Returns:
        f32[b h w 3], nominally in [-1, 1], not clamped; `to_uint8` clamps.
    """
    module = make(config, params["pre_quant"]["kernel"].dtype)
    return module.apply({"params": params}, codes, method="decode_codes").images
