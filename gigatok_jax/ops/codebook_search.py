"""Search of the nearest codebook row of every token. Axes: m tokens, e width, k rows."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax.ops import implementation
from gigatok_jax.ops.constrain import batch_axes, per_device

_CHUNK = 1 << 26  # scores held at a time: 256 MB of float32
WIDTHS = range(1, 65)  # widths that the kernels are tested with


def nearest(
    z: jax.Array, codebook: jax.Array, *, impl: str | None = None, interpret: bool = False
) -> jax.Array:
    """Returns the index of the codebook row nearest to each token in squared euclidean distance.

    Accurate to float32 for any input dtype: the distance to the chosen row exceeds the smallest
    distance by at most 1e-6 (|z|^2 + |e|^2), and of equal rows the lowest is chosen. A token with a
    NaN gets an arbitrary row. No gradient. On a mesh each device searches the whole codebook, which
    is gathered if it is sharded, for the tokens that it holds.

    Args:
        z: float[... e], any scale.
        codebook: float[k e], same scale as `z`.
        impl: one of `implementation.NAMES`, which runs or raises; None chooses the fastest that the
            device and the shapes allow, and logs the choice once.
        interpret: run a Pallas implementation in its interpreter (tests on CPU).

    Returns:
        int32[...], each in [0, k).

    Raises:
        ValueError: `z` and `codebook` differ in width, or `impl` is unknown.
        NotImplementedError: the named `impl` cannot run here; the message says why.

    Source: arXiv:1711.00937, eq. 1; l2-normalised as in arXiv:2110.04627.
    """
    if z.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"tokens are {z.shape[-1]} wide, codebook rows {codebook.shape[-1]}")
    if impl is None:
        impl = implementation.choose("codebook search", z.shape[-1], WIDTHS)
    implementation.check("codebook search", impl, z.shape[-1], WIDTHS, interpret)
    if z.size == 0:
        return jnp.zeros(z.shape[:-1], jnp.int32)
    z, codebook = lax.stop_gradient(z), lax.stop_gradient(codebook)
    if impl != "pallas_tpu" and implementation.platform() != "tpu":
        return _per_shard(z, codebook, impl, interpret)
    tokens = PartitionSpec(batch_axes(len(z)))
    search = functools.partial(_per_shard.fun, impl=impl, interpret=interpret)
    return per_device(search, (tokens, PartitionSpec()), tokens)(z, codebook)


@functools.partial(custom_partitioning, static_argnums=(2, 3))
def _per_shard(z, codebook, impl, interpret):
    tokens = z.astype(jnp.float32).reshape(-1, z.shape[-1])
    codebook = codebook.astype(jnp.float32)
    if impl == "xla":
        codes = _search(*_moderate(tokens, codebook))
    elif impl == "pallas_tpu":
        module = importlib.import_module(f"{__name__}_tpu")
        codes = module.search(*_moderate(tokens, codebook), interpret=interpret)
    else:  # this kernel scales extreme values itself
        module = importlib.import_module(f"{__name__}_gpu")
        codes = module.search(tokens, codebook, interpret=interpret)
    return codes.reshape(z.shape[:-1])


def _shardings(mesh, arg_shapes):
    """Returns the shardings of a search's arguments, tokens and codebook, and of its codes.

    Tokens stay on the devices that hold them; token vectors and the codebook are whole.
    """
    spec = arg_shapes[0].sharding.spec
    spec = (*spec, *[None] * (arg_shapes[0].ndim - len(spec)))[:-1]
    tokens, rows = PartitionSpec(*spec, None), PartitionSpec(None, None)
    same = (NamedSharding(mesh, tokens), NamedSharding(mesh, rows))
    return same, NamedSharding(mesh, PartitionSpec(*spec))


def _infer(impl, interpret, mesh, arg_shapes, result_shape):
    return _shardings(mesh, arg_shapes)[1]


def _partition(impl, interpret, mesh, arg_shapes, result_shape):
    arguments, result = _shardings(mesh, arg_shapes)
    search = functools.partial(_per_shard.fun, impl=impl, interpret=interpret)
    return mesh, search, result, arguments


_per_shard.def_partition(
    _partition,
    infer_sharding_from_operands=_infer,
    sharding_rule="... e, k e -> ...",
    need_replication_factors=("e", "k"),
)


def _moderate(tokens, table):
    """Scales tokens and codebook by one power of two if squares could leave float32's range."""
    largest = jnp.max(jnp.where(jnp.isfinite(table), jnp.abs(table), 0))
    _, exponent = jnp.frexp(largest)
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(-exponent, -126, 126))
    scale = jnp.where((largest > 0) & (jnp.abs(exponent) > 40), scale, 1)
    return tokens * scale, table * scale


def _search(tokens, table):
    """Finds with XLA the nearest row i32[m] of a codebook f32[k e] for tokens f32[m e]."""
    offset = 0.5 * jnp.sum(jnp.square(table), axis=-1)  # |z|^2 is the same for all rows
    finite = jnp.isfinite(offset)
    table, offset = jnp.where(finite[:, None], table, 0), jnp.where(finite, offset, jnp.inf)

    def search(tokens):
        scores = jnp.dot(tokens, table.T, precision=lax.Precision.HIGHEST) - offset
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    rows = max(1, _CHUNK // table.shape[0])
    return search(tokens) if len(tokens) <= rows else lax.map(search, tokens, batch_size=rows)
