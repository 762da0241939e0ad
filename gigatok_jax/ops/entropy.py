"""Entropy loss of the codebook, without a matrix of tokens x rows in memory.

Axes: b batch, g groups of the batch, n latent tokens, t tokens of a block or of a group, e codebook
width, k codebook rows.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax.ops import implementation
from gigatok_jax.ops.constrain import batch_axes, per_device

BLOCK_ELEMENTS = 2**22  # probabilities held at once, over all devices: 16 MiB
EPSILON = 1e-5  # inside the logarithm of the mean distribution
WIDTHS = range(1, 17)  # widths that the kernels support


def entropy_loss(
    z: jax.Array,
    codebook: jax.Array,
    temperature: float,
    groups: int = 1,
    *,
    impl: str | None = None,
    interpret: bool = False,
    block_elements: int = BLOCK_ELEMENTS,
) -> jax.Array:
    """Computes the mean entropy of the tokens' soft assignments minus the entropy of their mean.

    A token's assignment is the softmax over rows of -|z - e|^2 / temperature; entropies are in
    nats. The loss is low if every token is sure of its row and all rows are used alike.
    Probabilities are not stored but computed again for the gradient, whose error is within 1e-4 of
    its norm. On a mesh the kernels run on the tokens of each device, and only means and gradients
    of rows are communicated.

    Args:
        z: float[b n e], latents before quantization; computed in float32.
        codebook: float[k e], on the same scale as `z`.
        temperature: divisor of the squared distances, > 0.
        groups: number of consecutive groups of the batch, each with its own mean distribution,
            whose losses are averaged; the number of devices gives the original's statistics.
        impl: one of `implementation.NAMES`, which runs or raises; None chooses the fastest that
            the device and the shapes allow, and logs the choice once.
        interpret: run a Pallas implementation in its interpreter (tests on CPU).
        block_elements: bound on the probabilities that XLA holds at once; the smallest block is
            one position of every image.

    Returns:
        f32[], in [-log k, log k], with gradients to both `z` and `codebook`.

    Raises:
        ValueError: the widths differ, the groups do not divide the batch, or `impl` is unknown.
        NotImplementedError: the named `impl` cannot run here; the message says why.

    Source: arXiv:2310.05737, with the entropy of the mean as -sum p log(p + 1e-5), as in the
        original.
    """
    b, _, e = z.shape
    if codebook.shape[-1] != e:
        raise ValueError(f"latents are {e} wide and codebook rows {codebook.shape[-1]}")
    if b % groups:
        raise ValueError(f"{groups} groups do not divide a batch of {b}")
    if impl is None:  # kernels take whole groups: one in all, or equally many on every device
        whole = groups == 1 or groups % jax.device_count() == 0
        impl = implementation.choose("entropy loss", e, WIDTHS) if whole else "xla"
    implementation.check("entropy loss", impl, e, WIDTHS, interpret)
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    # Moving both does not change distances; around the mean row, a collapsed codebook keeps the
    # digits of its distances.
    centre = jax.lax.stop_gradient(codebook.mean(axis=0))
    z, codebook = z - centre, codebook - centre
    if impl == "xla":
        return _entropy_loss(z, codebook, temperature, groups, block_elements)
    z = z.reshape(groups, -1, e)
    return _fused_loss(z, codebook, _Kernels(impl, temperature, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _entropy_loss(z, codebook, temperature, groups, block_elements):
    return _forward(z, codebook, temperature, groups, block_elements)[0]


def _forward(z, codebook, temperature, groups, block_elements):
    blocks = _blocks(z, codebook.shape[0], groups, block_elements)  # [blocks g b/g t e]

    def step(carry, block):
        entropy, mean = carry
        p, _, h = _assign(block, codebook, temperature)
        return (entropy + h.sum(), mean + p.sum(axis=(1, 2))), None

    start = jnp.zeros(()), jnp.zeros((groups, codebook.shape[0]))
    (entropy, mean), _ = jax.lax.scan(step, start, blocks)
    tokens = z.shape[0] * z.shape[1]
    mean = mean * (groups / tokens)  # [g k]
    negative_entropy_of_mean = jnp.sum(mean * jnp.log(mean + EPSILON)) / groups
    return entropy / tokens + negative_entropy_of_mean, (z, codebook, mean)


def _backward(temperature, groups, block_elements, residuals, cotangent):
    """Returns the gradients of the entropy loss to latents and codebook.

    With s the logits and m the mean distribution, the gradient of the loss to s is q / tokens,
    q = p (f - log p - h - sum_k p f), where f = log(m + eps) + m / (m + eps) is the derivative of
    m log(m + eps). Rows of q sum to zero, so |z|^2 drops out.
    """
    z, codebook, mean = residuals
    slope = jnp.log(mean + EPSILON) + mean / (mean + EPSILON)
    slope = slope[:, None, None, :]  # [g 1 1 k]

    def step(carry, block):
        from_z, mass = carry
        p, log_p, h = _assign(block, codebook, temperature)
        mean_slope = jnp.sum(p * slope, axis=-1, keepdims=True)
        q = p * (slope - log_p - h - mean_slope)  # [g b/g t k]
        # The sums over rows round differently on each processor. What they leave in q is a
        # multiple of p, which hides the gradient of a collapsed codebook.
        q -= p * q.sum(axis=-1, keepdims=True)
        from_z += _einsum("gbtk,gbte->ke", q, block)
        return (from_z, mass + q.sum(axis=(0, 1, 2))), _einsum("gbtk,ke->gbte", q, codebook)

    blocks = _blocks(z, codebook.shape[0], groups, block_elements)
    start = jnp.zeros_like(codebook), jnp.zeros(codebook.shape[0])
    (from_z, mass), dz = jax.lax.scan(step, start, blocks)
    scale = cotangent * 2.0 / (temperature * z.shape[0] * z.shape[1])
    dz = jnp.moveaxis(dz, 0, 2).reshape(z.shape)
    return scale * dz, scale * (from_z - mass[:, None] * codebook)


_entropy_loss.defvjp(_forward, _backward)


class _Kernels(NamedTuple):
    """Record of a Pallas implementation of the entropy loss and its settings; runs both passes."""

    impl: str
    temperature: float
    interpret: bool

    def _run(self, run, *arguments):
        """Runs a pass on each group of the arguments [g ...] in turn; returns results [g ...]."""
        if len(arguments[0]) > 1:
            return jax.lax.map(lambda group: run(*group), arguments)
        return jax.tree.map(lambda x: x[None], run(*(x[0] for x in arguments)))

    def _module(self):
        return importlib.import_module(f"{__name__}_{implementation.PLATFORMS[self.impl]}")

    def forward(self, z, codebook):
        """Runs the forward pass of the entropy loss on every group.

        Returns:
            Logarithms of each token's sum of exponentials, as two summands [g t]; entropies of the
            tokens [g t]; probabilities summed over the tokens of a group [g k].
        """
        forward, same = self._module().forward, {"interpret": self.interpret}
        return self._run(lambda z: forward(z, codebook, self.temperature, **same), z)

    def backward(self, z, codebook, log_sum, rest, entropy, slope):
        """Sums q = p (slope - log p - entropy - sum_k p slope) over rows and over tokens.

        Returns:
            q @ codebook [g t e]; q.T @ z, summed over groups, [k e]; q summed over all tokens [k].
        """
        backward, same = self._module().backward, {"interpret": self.interpret}
        from_rows, from_tokens, mass = self._run(
            lambda z, *group: backward(z, codebook, self.temperature, *group, **same),
            z, log_sum, rest, entropy, slope,
        )  # fmt: skip
        return from_rows, from_tokens.sum(0), mass.sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fused_loss(z, codebook, kernels):
    return _fused_forward(z, codebook, kernels)[0]


def _fused_forward(z, codebook, kernels):
    *log_sum, entropy, total = _spread(kernels, _forward_per_shard, _forward_pass, z, codebook)
    mean = total / z.shape[1]  # [g k]
    negative_entropy_of_mean = jnp.sum(mean * jnp.log(mean + EPSILON)) / len(z)
    return entropy.mean() + negative_entropy_of_mean, (z, codebook, mean, *log_sum, entropy)


def _fused_backward(kernels, residuals, cotangent):
    z, codebook, mean, *per_token = residuals
    slope = jnp.log(mean + EPSILON) + mean / (mean + EPSILON)
    # A constant does not change q; without the mean less cancels.
    slope = slope - jnp.sum(mean * slope, axis=1, keepdims=True)
    from_rows, from_tokens, mass = _spread(
        kernels, _backward_per_shard, _backward_pass, z, codebook, *per_token, slope
    )
    scale = cotangent * 2.0 / (kernels.temperature * z.shape[0] * z.shape[1])
    return scale * from_rows, scale * (from_tokens - mass[:, None] * codebook)


_fused_loss.defvjp(_fused_forward, _fused_backward)


@functools.partial(custom_partitioning, static_argnums=(0,))
def _forward_per_shard(kernels, z, codebook):
    return kernels.forward(z, codebook)


@functools.partial(custom_partitioning, static_argnums=(0,))
def _backward_per_shard(kernels, *arguments):
    return kernels.backward(*arguments)


def _axes(arg_shapes) -> tuple:
    """Returns the mesh axes that divide the first argument, f[g t e], by groups and by tokens."""
    spec = arg_shapes[0].sharding.spec
    return (*spec, None, None)[:2]


def _names(*axes) -> tuple[str, ...]:
    """Returns mesh axes, each a name, a tuple of names or None, as a flat tuple of names."""
    return tuple(jax.tree.leaves(axes))


def _spread(kernels, partitioned, make_pass, *arguments):
    """Runs a pass of the entropy loss on the tokens of each device and returns its results."""
    if kernels.impl == "pallas_gpu":
        return partitioned(kernels, *arguments)
    count, size = arguments[0].shape[:2]
    groups, tokens = (batch_axes(count), ()) if count > 1 else ((), batch_axes(size))
    run, results, specs = make_pass(kernels, groups, tokens)
    return per_device(run, specs, results)(*arguments)


def _forward_pass(kernels, groups, tokens):
    """Returns the forward pass for one device, and the specs of its results and arguments."""

    def forward(z, codebook):
        *per_token, total = kernels.forward(z, codebook)
        return *per_token, jax.lax.psum(total, _names(tokens))

    vectors, per_token = PartitionSpec(groups, tokens, None), PartitionSpec(groups, tokens)
    results = *[per_token] * 3, PartitionSpec(groups, None)
    return forward, results, (vectors, PartitionSpec(None, None))


def _backward_pass(kernels, groups, tokens):
    """Returns the backward pass for one device, and the specs of its results and arguments."""

    def backward(*arguments):
        from_rows, *sums = kernels.backward(*arguments)
        return from_rows, *(jax.lax.psum(x, _names(groups, tokens)) for x in sums)

    vectors, per_token = PartitionSpec(groups, tokens, None), PartitionSpec(groups, tokens)
    rows = PartitionSpec(None, None)
    arguments = vectors, rows, *[per_token] * 3, PartitionSpec(groups, None)
    return backward, (vectors, rows, PartitionSpec(None)), arguments


def _partition(make_pass, kernels, mesh, arg_shapes, result_shape):
    run, *specs = make_pass(kernels, *_axes(arg_shapes))
    results, arguments = ([NamedSharding(mesh, spec) for spec in side] for side in specs)
    return mesh, run, tuple(results), tuple(arguments)


_forward_per_shard.def_partition(
    functools.partial(_partition, _forward_pass),
    sharding_rule="g t e, k e -> g t, g t, g t, g k",
    need_replication_factors=("e", "k"),
)  # fmt: skip
_backward_per_shard.def_partition(
    functools.partial(_partition, _backward_pass),
    sharding_rule="g t e, k e, g t, g t, g t, g k -> g t e, k e, k",
    need_replication_factors=("e", "k"),
)  # fmt: skip


def _assign(block, codebook, temperature):
    """Computes the soft assignment of every token of a block to codebook rows.

    Returns:
        Probabilities and their logarithms, each f[g b/g t k]; entropies f[g b/g t 1].
    """
    half_square = 0.5 * jnp.sum(jnp.square(codebook), axis=-1)
    logits = _einsum("gbte,ke->gbtk", block, codebook) - half_square
    log_p = jax.nn.log_softmax(logits * (2.0 / temperature), axis=-1)
    p = jnp.exp(log_p)
    return p, log_p, -jnp.sum(p * log_p, axis=-1, keepdims=True)


def _blocks(z, rows, groups, block_elements):
    """Cuts latents [b n e] into blocks [blocks g b/g t e]; t is the largest divisor of n that fits.

    The cut is along positions, because the batch is divided over devices.
    """
    b, n, e = z.shape
    most = max(1, block_elements // (b * rows))
    t = max(t for t in range(1, n + 1) if n % t == 0 and t <= most)
    return jnp.moveaxis(z.reshape(groups, b // groups, n // t, t, e), 2, 0)


def _einsum(spec, *operands):
    # By default float32 products are TF32 on a GPU and bfloat16 on a TPU.
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)
