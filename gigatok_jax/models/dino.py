"""Frozen vision transformers, DINOv2 and DINO. Axes: b batch, n tokens, c width, l blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gigatok_jax.errors import one_of
from gigatok_jax.ops import activation, attention

SIZES = {  # width, heads, blocks
    "dinov2-s": (384, 6, 12),
    "dinov2-b": (768, 12, 12),
    "dinov2-l": (1024, 16, 24),
}
GRID = 16  # tokens along one side for which position embeddings are converted
NAMES = (*SIZES, *(f"{name}-reg" for name in SIZES))  # "reg": with four register tokens


class Block(nn.Module):
    """Module of one ViT block: pre-norm self-attention and MLP, each optionally with LayerScale.

    LayerScale multiplies a branch's output by a learned factor per channel.
    """

    heads: int
    layer_scale: bool
    exact_gelu: bool
    keep: bool  # also return the result as the scan's output, for models that read every depth
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Applies the block to f[b n c]; returns (f[b n c], None), the pair that a scan needs.

        With `keep` the result is also the second item.
        """
        x = x + self._scale("scale_1", self._attention(layer_norm(self.dtype, "norm_1")(x)))
        x = x + self._scale("scale_2", self._mlp(layer_norm(self.dtype, "norm_2")(x)))
        return x, x if self.keep else None

    def _scale(self, name: str, x: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return x
        return x * self.param(name, nn.initializers.ones, x.shape[-1:]).astype(self.dtype)

    def _attention(self, x: jax.Array) -> jax.Array:
        b, n, c = x.shape
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # The discriminator's trunk keeps its depths and is differentiated; the teacher is not.
        out = attention.attend(q, k, v, gradient=self.keep)  # [b n h d]
        return nn.Dense(c, dtype=self.dtype, name="out")(out.reshape(b, n, c))

    def _mlp(self, x: jax.Array) -> jax.Array:
        hidden = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="up")(x)
        hidden = activation.gelu(hidden) if self.exact_gelu else nn.gelu(hidden)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(hidden)


def layer_norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Makes a layer norm with epsilon 1e-6, as these models have, and statistics in float32."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name, use_fast_variance=False)


def blocks(depth: int, **fields) -> nn.Module:
    """Makes a stack of `depth` ViT blocks as one scan, parameters stacked on a leading axis."""
    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
    return scan(name="blocks", **fields)


def embed(module: nn.Module, x: jax.Array, patch: int) -> jax.Array:
    """Embeds square images f32[b h w 3] as ViT tokens f[b 1+n c], with positions added.

    The class token is the first token, then patches follow. The parameters belong to `module`.
    """
    b, side, c = x.shape[0], x.shape[1] // patch, module.width
    size, stride = (patch, patch), (patch, patch)
    x = nn.Conv(c, size, stride, padding="VALID", dtype=module.dtype, name="patches")(x)
    small = nn.initializers.normal(0.02)
    class_token = module.param("class_token", small, (1, 1, c))
    positions = module.param("positions", small, (1, 1 + side * side, c))
    class_token = jnp.broadcast_to(class_token, (b, 1, c))
    x = jnp.concatenate([class_token, x.reshape(b, -1, c).astype(jnp.float32)], axis=1)
    return (x + positions).astype(module.dtype)  # [b 1+n c]


class DINOv2(nn.Module):
    """Module of a frozen DINOv2, the alignment loss's teacher: a ViT with patches of 14 pixels.

    Source: arXiv:2304.07193; registers arXiv:2309.16588.
    """

    width: int = 768
    heads: int = 12
    depth: int = 12
    registers: int = 0  # extra tokens beside the class token, 4 in the "reg" models
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes patch tokens f32[b (h/14)^2 c] of images f32[b h w 3].

        The images come from `ops.image.teacher_input`.
        """
        return self.tokens(x)[:, 1 + self.registers :]

    @nn.compact
    def tokens(self, x: jax.Array) -> jax.Array:
        """Computes all tokens of images f32[b h w 3], after the last norm.

        Returns f32[b 1+registers+n c]: the class token, the register tokens, the patch tokens.
        """
        x = embed(self, x, 14)
        if self.registers:
            shape = (self.registers, self.width)
            extra = self.param("register_tokens", nn.initializers.normal(0.02), (1, *shape))
            extra = jnp.broadcast_to(extra.astype(self.dtype), (x.shape[0], *shape))
            x = jnp.concatenate([x[:, :1], extra, x[:, 1:]], axis=1)
        fields = {"heads": self.heads, "layer_scale": True, "exact_gelu": True, "keep": False}
        x, _ = blocks(self.depth, dtype=self.dtype, **fields)(x)
        return layer_norm(jnp.float32, "norm")(x)  # [b 1+registers+n c]


def teacher(name: str, dtype: DTypeLike = jnp.float32) -> DINOv2:
    """Makes the module of the published DINOv2 with a name in `NAMES`.

    Raises:
        ConfigError: the name is unknown.
    """
    one_of("teacher", name, NAMES)
    width, heads, depth = SIZES[name.removesuffix("-reg")]
    return DINOv2(width, heads, depth, 4 if name.endswith("-reg") else 0, dtype=dtype)


class DINO(nn.Module):
    """Module of the DINO discriminator's trunk: a frozen ViT-S/16, read at five depths.

    The depths are the embedded input and the four blocks in `taps`.

    Source: arXiv:2104.14294; the depths are those of StyleGAN-T (arXiv:2301.09515).
    """

    width: int = 384
    heads: int = 6
    depth: int = 12
    taps: tuple[int, ...] = (2, 5, 8, 11)  # blocks whose results are read, counted from 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Computes the trunk's feature maps of images, one f32[b n c] for each depth.

        The class token is added to every patch token.

        Args:
            x: images f32[b h w 3] normalised by ImageNet's statistics, sides a multiple of 16;
                224 pixels with the published position embeddings.
        """
        x = embed(self, x, 16)
        fields = {"heads": self.heads, "layer_scale": False, "exact_gelu": False, "keep": True}
        _, depths = blocks(self.depth, dtype=self.dtype, **fields)(x)  # [l b n c]
        tapped = [x] + [depths[i] for i in self.taps]
        return [(y[:, 1:] + y[:, :1]).astype(jnp.float32) for y in tapped]
