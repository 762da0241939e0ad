"""Passes of the entropy loss on a TPU.

Axes: o owners (on lanes), m members (on sublanes), t tokens, k rows, e width. A program
owns a block of tokens and goes through all rows, its members, or the other way round.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_OWNERS, _MEMBERS = 256, 512  # owners of one program, members of one of its steps
_FAR = 1e30  # larger than any logit


def forward(
    z: jax.Array, codebook: jax.Array, temperature: float, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the sums over rows and over tokens that the entropy loss needs.

    Args:
        z, codebook: f32[t e] and f32[k e].

    Returns:
        Logarithms of each token's sum of exponentials, as the largest logits f32[t] and the rests
        f32[t], because a logit minus the logarithm needs more digits than either has; entropies in
        nats f32[t]; probabilities summed over tokens f32[k].
    """
    logits = functools.partial(_call, unit=2 / temperature, interpret=interpret)
    offset = -jnp.sum(jnp.square(codebook), axis=1) / temperature
    top, rest, entropy = logits(
        _entropy_kernel, z, codebook, [], [(offset, -_FAR)], [1] * 3, [1] * 3
    )
    top, rest, entropy = top[0], rest[0], entropy[0]
    along = [(top, _FAR), (rest, 0)]
    (total,) = logits(_total_kernel, codebook, z, [offset], along, [1], [1])
    return top, rest, entropy, total[0]


def backward(
    z: jax.Array, codebook: jax.Array, temperature: float,
    top: jax.Array, rest: jax.Array, entropy: jax.Array, slope: jax.Array,
    *, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Computes the sums over rows and over tokens that the gradients of the entropy loss need.

    Args:
        top, rest, entropy: f32[t] each, from `forward`.
        slope: f32[k], derivative to each sum of probabilities, up to a constant.

    Returns:
        With p f[t k] the probabilities and q = p (slope - log p - entropy - sum_k p slope):
        q @ codebook f32[t e]; q.T @ z f32[k e]; the sum of q over tokens f32[k].
    """
    logits = functools.partial(_call, unit=2 / temperature, interpret=interpret)
    offset = -jnp.sum(jnp.square(codebook), axis=1) / temperature
    wide = [z.shape[1], z.shape[1], 1]
    along = [(offset, -_FAR), (slope, 0)]
    mean, weighted, lean = logits(
        _token_kernel, z, codebook, [top, rest, entropy], along, wide, wide
    )
    along = [(top, _FAR), (rest, 0), (entropy + lean[0], 0)]
    wide = wide[1:]
    from_tokens, mass = logits(_row_kernel, codebook, z, [offset, slope], along, wide, wide)
    return (weighted - lean * mean).T, from_tokens.T, mass[0]


def _call(kernel, owners, members, own, along, outs, state, *, unit, interpret):
    """Runs one kernel of the entropy loss and returns its outputs, f32[w o] each.

    Args:
        own: vectors f32[o] with a value for each owner.
        along: vectors f32[m] with a value for each member, each with the value for the padding.
        outs: widths of the outputs.
        state: widths of the arrays that are kept from step to step.
    """
    size = owners.shape[0]
    step = min(_MEMBERS, -(-members.shape[0] // 8) * 8)
    missing = (0, -members.shape[0] % step)
    own = [_blocks(x[:, None]) for x in own]
    along = [jnp.pad(x, missing, constant_values=fill)[:, None] for x, fill in along]
    members = jnp.pad(members, (missing, (0, 0)))
    owners = _blocks(owners)

    def of_owners(width):
        return pl.BlockSpec((width, _OWNERS), lambda i, j: (0, i))

    def of_members(width):
        return pl.BlockSpec((step, width), lambda i, j: (j, 0))

    results = pl.pallas_call(
        functools.partial(kernel, unit=unit),
        out_shape=[jax.ShapeDtypeStruct((n, owners.shape[1]), jnp.float32) for n in outs],
        grid=(owners.shape[1] // _OWNERS, len(members) // step),
        in_specs=[of_owners(len(owners)), of_members(members.shape[1])]
        + [of_owners(1)] * len(own) + [of_members(1)] * len(along),
        out_specs=[of_owners(n) for n in outs],
        scratch_shapes=[pltpu.VMEM((n, _OWNERS), jnp.float32) for n in state],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="entropy" + kernel.__name__.removesuffix("_kernel"),
    )(owners, members, *own, *along)  # fmt: skip
    return [result[:, :size] for result in results]


def _blocks(x):
    """Transposes vectors f32[n w] to f32[w n], with n padded to whole blocks of owners."""
    return jnp.pad(x, ((0, -len(x) % _OWNERS), (0, 0))).T


def _dot(members, owners, contract):
    dimensions = ((contract, (0,)), ((), ()))
    precision = lax.Precision.HIGHEST  # by default a float32 product is computed in bfloat16
    return lax.dot_general(
        members, owners, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _first(fill, *refs):
    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref, value in zip(refs, fill, strict=True):
            ref[...] = jnp.full_like(ref, value)


def _last(write):
    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(write)


def _sum(x):
    return jnp.sum(x, axis=0, keepdims=True)


def _entropy_kernel(
    z_ref,
    e_ref,
    offset_ref,
    out_ref,
    rest_ref,
    entropy_ref,
    top_ref,
    total_ref,
    moment_ref,
    *,
    unit,
):
    _first((-_FAR, 0, 0), top_ref, total_ref, moment_ref)
    logits = unit * _dot(e_ref[...], z_ref[...], (1,)) + offset_ref[...]  # [m o]
    top, total = top_ref[...], total_ref[...]
    new = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
    logits = logits - new
    p, shift = jnp.exp(logits), top - new
    shrink = jnp.exp(shift)
    moment_ref[...] = (moment_ref[...] + total * shift) * shrink + _sum(p * logits)
    total_ref[...] = total * shrink + _sum(p)
    top_ref[...] = new

    @_last
    def _():
        out_ref[...] = top_ref[...]
        rest_ref[...] = jnp.log(total_ref[...])
        entropy_ref[...] = rest_ref[...] - moment_ref[...] / total_ref[...]


def _total_kernel(e_ref, z_ref, offset_ref, top_ref, rest_ref, out_ref, total_ref, *, unit):
    _first((0,), total_ref)
    logits = unit * _dot(z_ref[...], e_ref[...], (1,)) + offset_ref[...]
    total_ref[...] += _sum(jnp.exp(logits - top_ref[...] - rest_ref[...]))

    @_last
    def _():
        out_ref[...] = total_ref[...]


def _token_kernel(
    z_ref, e_ref, top_ref, rest_ref, entropy_ref, offset_ref, slope_ref, *refs, unit
):  # fmt: skip
    *out_refs, mean_ref, weighted_ref, lean_ref = refs
    _first((0, 0, 0), mean_ref, weighted_ref, lean_ref)
    logits = unit * _dot(e_ref[...], z_ref[...], (1,)) + offset_ref[...]
    log_p = logits - top_ref[...] - rest_ref[...]
    p = jnp.exp(log_p)
    mean_ref[...] += _dot(e_ref[...], p, (0,))
    weighted = p * (slope_ref[...] - log_p - entropy_ref[...])
    weighted_ref[...] += _dot(e_ref[...], weighted, (0,))
    lean_ref[...] += _sum(p * slope_ref[...])

    @_last
    def _():
        for out_ref, ref in zip(out_refs, (mean_ref, weighted_ref, lean_ref), strict=True):
            out_ref[...] = ref[...]


def _row_kernel(e_ref, z_ref, offset_ref, slope_ref, top_ref, rest_ref, center_ref, *refs, unit):
    *out_refs, sum_ref, mass_ref = refs
    _first((0, 0), sum_ref, mass_ref)
    logits = unit * _dot(z_ref[...], e_ref[...], (1,)) + offset_ref[...]
    log_p = logits - top_ref[...] - rest_ref[...]
    q = jnp.exp(log_p) * (slope_ref[...] - log_p - center_ref[...])
    sum_ref[...] += _dot(z_ref[...], q, (0,))
    mass_ref[...] += _sum(q)

    @_last
    def _():
        for out_ref, ref in zip(out_refs, (sum_ref, mass_ref), strict=True):
            out_ref[...] = ref[...]
