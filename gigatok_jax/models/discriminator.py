"""PatchGAN and DINO discriminators. Axes: b batch, g groups, h w position, n tokens, c channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.errors import ConfigError
from gigatok_jax.models import dino
from gigatok_jax.models.layers import fan_in_uniform
from gigatok_jax.ops import diffaug, image

GROUP = 8  # largest number of examples in one group of `LocalNorm`


def leaky_relu(x: jax.Array) -> jax.Array:
    """Applies the leaky ReLU: returns `x` where positive, 0.2 `x` elsewhere."""
    return nn.leaky_relu(x, 0.2)


def _near_one(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Module of batch normalisation over groups of consecutive examples, in float32.

    `groups=1` takes statistics over the global batch. With k groups, every b/k consecutive
    examples have their own statistics, as the original has on k devices without synchronisation;
    the running statistics follow group 0, the device that writes the checkpoint.

    Source: arXiv:1502.03167; running variance unbiased, as in PyTorch.
    """

    groups: int = 1
    momentum: float = 0.1  # weight of the new batch in the running statistics
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises f[b ... c] to f32[b ... c].

        With `train` the batch's statistics are used, and the running statistics are updated;
        without `train`, and at initialisation, the running statistics are used.
        """
        c = x.shape[-1]
        scale = self.param("scale", _near_one, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if not train or self.is_initializing():  # initialisation may have a single example
            factor = scale * jax.lax.rsqrt(running_var.value + self.eps)
            return (x.astype(jnp.float32) - running_mean.value) * factor + bias
        normed, mean, var, size = grouped_norm(x, self.groups, self.eps)
        running_mean.value += self.momentum * (mean - running_mean.value)
        running_var.value += self.momentum * (var * size / (size - 1) - running_var.value)
        count.value += 1
        return normed * scale + bias


def grouped_norm(
    x: jax.Array, groups: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Normalises each channel to mean 0 and variance 1 in each group of consecutive examples.

    Args:
        x: float[b ... c].
        groups: divides b; example i belongs to group i // (b / groups).
        eps: added to the variance before the division.

    Returns:
        The normalised values f32[b ... c]; mean and biased variance of group 0, f32[c] each; the
        number of values that each mean is taken over.

    Raises:
        ConfigError: `groups` does not divide the batch.
    """
    if x.shape[0] % groups:
        raise ConfigError(
            f"batch norm has {x.shape[0]} examples for {groups} groups:"
            " make the batch a multiple of the groups"
        )
    split = x.astype(jnp.float32).reshape(groups, x.shape[0] // groups, -1, x.shape[-1])
    mean = split.mean((1, 2), keepdims=True)  # [g 1 1 c]
    var = jnp.square(split - mean).mean((1, 2), keepdims=True)  # [g 1 1 c]
    normed = (split - mean) * jax.lax.rsqrt(var + eps)
    size = split.shape[1] * split.shape[2]
    # Running statistics are state, not a path for gradients.
    mean, var = jax.lax.stop_gradient((mean[0, 0, 0], var[0, 0, 0]))
    return normed.reshape(x.shape), mean, var, size


class PatchGAN(nn.Module):
    """Module of a discriminator of overlapping patches, of 70 x 70 pixels with three layers.

    Source: arXiv:1611.07004 (pix2pix), as configured by VQGAN (arXiv:2012.09841).
    """

    num_filters: int = 64  # channels after the first convolution
    num_layers: int = 3  # convolutions of stride 2
    groups: int = 1  # groups of batch statistics; 1 is the global batch
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes logits of patches of images float[b h w 3] in [-1, 1]; positive means real.

        Returns f32[b h/8-2 w/8-2 1] with three layers. `train=True` normalises by batch statistics
        and updates the collection `batch_stats`, which must then be mutable.
        """
        x = leaky_relu(self._conv("conv_0", x, self.num_filters, stride=2, use_bias=True))
        for i in range(1, self.num_layers + 1):
            width = self.num_filters * min(2**i, 8)
            stride = 2 if i < self.num_layers else 1
            x = self._conv(f"conv_{i}", x, width, stride, use_bias=False)
            x = leaky_relu(BatchNorm(self.groups, name=f"norm_{i}")(x, train))
        last = f"conv_{self.num_layers + 1}"
        return self._conv(last, x, 1, stride=1, use_bias=True).astype(jnp.float32)

    def _conv(self, name: str, x: jax.Array, width: int, stride: int, use_bias: bool):
        return nn.Conv(
            width,
            (4, 4),
            (stride, stride),
            padding=1,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=fan_in_uniform(16 * x.shape[-1]),
            name=name,
        )(x)


def whole_view(images: jax.Array, size: int) -> jax.Array:
    """Resizes and normalises whole images for the DINO discriminator's trunk.

    The images float[b h w 3] in [-1, 1] become f32[b size size 3].
    """
    method = image.area if images.shape[1] > size else image.bicubic
    return image.resize(image.normalise(images, *image.IMAGENET), size, method)


def random_view(images: jax.Array, draws: jax.Array, size: int) -> jax.Array:
    """Crops images for the DINO discriminator's trunk, or resizes whole images, as `draws` say.

    Args:
        images: float[b h w 3] in [-1, 1]; always whole if a side is not larger than `size`.
        draws: float[3] in [0, 1), for the whole batch: the first chooses a crop if at most 1/2; the
            second and third choose the crop's row and column.
        size: side of the trunk's input in pixels.

    Returns:
        f32[b size size 3], normalised by ImageNet's statistics.
    """
    room = jnp.array([images.shape[1] - size, images.shape[2] - size])
    if images.shape[1] <= size or images.shape[2] <= size:
        return whole_view(images, size)
    row, column = jnp.floor(draws[1:] * (room + 1)).astype(jnp.int32)

    def crop(images):
        shape = (images.shape[0], size, size, 3)
        cut = jax.lax.dynamic_slice(images, (0, row, column, 0), shape)
        return image.normalise(cut, *image.IMAGENET)

    return jax.lax.cond(draws[0] <= 0.5, crop, lambda x: whole_view(x, size), images)


class SpectralConv(nn.Module):
    """Module of a circular convolution over tokens with spectral normalisation.

    The kernel, as a matrix, is divided by its largest singular value. One step of power iteration
    per training call estimates that value; its vectors `u` and `v` are the collection `spectral`.
    The gradient passes through the matrix, not through `u` and `v`.

    Source: arXiv:1802.05957.
    """

    features: int
    size: int  # odd number of tokens under the kernel
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Convolves f[b n c] with the spectrally normalised kernel; returns f[b n features]."""
        fan_in = self.size * x.shape[-1]
        init, shape = fan_in_uniform(fan_in), (self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape)  # [size c features]
        bias = self.param("bias", init, (self.features,))
        kernel = (kernel / self._largest_singular_value(kernel, train)).astype(self.dtype)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (self.size // 2,) * 2, (0, 0)), mode="wrap")
        form = ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=form)
        return x + bias.astype(self.dtype)

    def _largest_singular_value(self, kernel: jax.Array, train: bool) -> jax.Array:
        matrix = kernel.transpose(2, 1, 0).reshape(self.features, -1)  # [features c*size]
        u = self.variable("spectral", "u", self._random_unit, matrix.shape[0])
        v = self.variable("spectral", "v", self._random_unit, matrix.shape[1])
        if train and not self.is_initializing():
            fixed = jax.lax.stop_gradient(matrix)
            v.value = _unit(_product("ij,i->j", fixed, u.value))
            u.value = _unit(_product("ij,j->i", fixed, v.value))
        return _product("i,ij,j->", u.value, matrix, v.value)

    def _random_unit(self, size: int) -> jax.Array:
        return _unit(jax.random.normal(self.make_rng("params"), (size,)))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def _product(form: str, *arrays: jax.Array) -> jax.Array:
    """Computes an einsum with full float32 products.

    Default precision may be lower, and an estimated norm must not carry half-precision error.
    """
    return jnp.einsum(form, *arrays, precision=jax.lax.Precision.HIGHEST)


class LocalNorm(nn.Module):
    """Module of batch norm over groups of at most 8 examples, without running statistics.

    Evaluation uses the statistics of its batch too, as in StyleGAN-T (arXiv:2301.09515).
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises f[b n c] over groups of at most 8 examples; returns f32[b n c].

        The number of groups, b / 8 rounded up, has to divide b.
        """
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        groups = -(-x.shape[0] // GROUP)
        return grouped_norm(x, groups, eps=1e-6)[0] * scale + bias


class DinoHead(nn.Module):
    """Module of the DINO discriminator's head for one depth of the trunk.

    Three convolutions compute one logit per token.
    """

    kernel: int = 9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes a logit per token: tokens f[b n c] -> logits f32[b n]."""
        x = self._layer(0, x, 1, train)
        x = (self._layer(1, x, self.kernel, train) + x) * 0.5**0.5
        return SpectralConv(1, 1, self.dtype, name="conv_2")(x, train)[..., 0].astype(jnp.float32)

    def _layer(self, i: int, x: jax.Array, size: int, train: bool) -> jax.Array:
        x = SpectralConv(x.shape[-1], size, self.dtype, name=f"conv_{i}")(x, train)
        return leaky_relu(LocalNorm(name=f"norm_{i}")(x))


class DinoDiscriminator(nn.Module):
    """Module of a discriminator on the features of a frozen DINO ViT-S/16 at five depths.

    The parameters are those of the heads; the trunk's are the collection `trunk`, which never
    changes. With an rng named `augment` the images go through DiffAug and `random_view`; without
    that rng the trunk sees whole images.

    Source: arXiv:2301.09515 (StyleGAN-T, projected discriminator).
    """

    width: int = 384
    heads: int = 6
    depth: int = 12
    taps: tuple[int, ...] = (2, 5, 8, 11)
    size: int = 224  # pixels on a side that the trunk sees
    kernel: int = 9
    dtype: jnp.dtype = jnp.float32

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Computes logits f32[b 5*n] of images float[b h w 3] in [-1, 1]; positive means real.

        `train=True` takes a step of the power iteration: `spectral` must then be mutable.
        """
        if not self.has_rng("augment"):
            return self.logits(whole_view(images, self.size), train)
        key, view = jax.random.split(self.make_rng("augment"))
        images = diffaug.random_augment(key, images)
        return self.logits(random_view(images, jax.random.uniform(view, (3,)), self.size), train)

    @nn.compact
    def logits(self, view: jax.Array, train: bool) -> jax.Array:
        """Computes logits f32[b 5*n] of images that `whole_view` or `random_view` prepared."""
        maps = self._maps(view)
        heads = [DinoHead(self.kernel, self.dtype, name=f"head_{i}") for i in range(len(maps))]
        return jnp.concatenate([h(x, train) for h, x in zip(heads, maps, strict=True)], axis=1)

    def _maps(self, view: jax.Array) -> list[jax.Array]:
        if self.is_initializing():  # the parameters of the heads depend on shapes alone
            shape = (view.shape[0], (self.size // 16) ** 2, self.width)
            return [jnp.zeros(shape)] * (len(self.taps) + 1)
        trunk = dino.DINO(self.width, self.heads, self.depth, self.taps, self.dtype, parent=None)
        return trunk.apply({"params": self.variables["trunk"]}, view)
