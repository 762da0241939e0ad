"""PatchGAN discriminator. Axes: b batch, g groups, h w position, c channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.errors import ConfigError


def leaky_relu(x: jax.Array) -> jax.Array:
    """`x` where positive, 0.2 `x` elsewhere."""
    return nn.leaky_relu(x, 0.2)


def _near_one(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


def _fan_in_uniform(fan_in: int):
    """Uniform in +-1/sqrt(fan_in): PyTorch's initial bias, which the original keeps."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class BatchNorm(nn.Module):
    """Batch normalisation over groups of consecutive examples, in float32.

    `groups=1` takes statistics over the global batch. With k groups each b/k consecutive
    examples are normalised apart, as k devices of the original do without synchronisation;
    the running statistics then follow group 0, the device that writes the checkpoint.

    Source: arXiv:1502.03167; running variance unbiased, as in PyTorch.
    """

    groups: int = 1
    momentum: float = 0.1  # weight of the new batch in the running statistics
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", _near_one, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if not train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.eps)
            return (x.astype(jnp.float32) - running_mean.value) * factor + bias
        normed, mean, var, size = grouped_norm(x, self.groups, self.eps)
        if not self.is_initializing():
            running_mean.value += self.momentum * (mean - running_mean.value)
            running_var.value += self.momentum * (var * size / (size - 1) - running_var.value)
            count.value += 1
        return normed * scale + bias


def grouped_norm(x: jax.Array, groups: int, eps: float):
    """Zero mean and unit variance per channel in each group of consecutive examples.

    Args:
        x: float[b ... c].
        groups: divides b; example i belongs to group i // (b / groups).

    Returns:
        f32[b ... c], mean and biased variance f32[c] of group 0, and the number of values
        behind each.

    Raises:
        ConfigError: `groups` does not divide the batch.
    """
    if x.shape[0] % groups:
        raise ConfigError(
            f"batch norm got {x.shape[0]} examples for {groups} groups; "
            "make the batch a multiple of the groups"
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
    """Judges overlapping patches (70 x 70 pixels with three layers) as real or made.

    Source: arXiv:1611.07004 (pix2pix), as configured by VQGAN (arXiv:2012.09841).
    """

    num_filters: int = 64
    num_layers: int = 3  # convolutions of stride 2
    groups: int = 1  # of batch statistics; 1 is the global batch
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits f32[b h/8-2 w/8-2 1] of images float[b h w 3] in [-1, 1]; positive is real.

        `train=True` normalises by batch statistics and updates the collection `batch_stats`,
        which must then be mutable.
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
            bias_init=_fan_in_uniform(16 * x.shape[-1]),
            name=name,
        )(x)
