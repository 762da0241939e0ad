"""Passes of the entropy loss on a GPU, in the Triton dialect of Pallas.

Axes: t tokens, k rows, e width, c packed width, o owners, m members, w column classes, s splits.

A program owns a block of tokens and goes through all rows, its members, or the other way round;
nothing of the size of tokens x rows leaves it. Tensor cores compute the logits, of vectors that are
scaled by powers of two into float16's range, and the weighted sums of vectors, with both weights
and vectors split into a high and a low part. Logarithms inside are to base 2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from gigatok_jax.ops import split_product

_CLASSES = 8  # stride between the columns that one thread holds of the tensor cores' result
_FAR = 1e30  # larger than any logit
_LIFT = 10  # weights are multiplied by 2**10, out of float16's subnormal numbers
_LN2 = math.log(2)


class Tiling(NamedTuple):
    """Record of the block sizes and counts that the entropy loss's kernels are compiled for."""

    owners: int = 128  # owners of one program
    members: int = 64  # members of one matrix product
    warps: int = 4
    stages: int = 3
    splits: int = 4  # programs that share the tokens among them where rows are the owners


TILING = Tiling(owners=64, members=128)  # the fastest on an H200 of ten that were tried


class _Side(NamedTuple):
    """Record of the tokens, or of the codebook rows, as operands of products, n after padding."""

    count: int  # vectors without the padding
    packed: jax.Array  # f16[n c], operand of the products for logits
    parts: jax.Array  # f16[n 2e], high and low part, operand of the weighted sums
    scale: jax.Array  # f32[], power of two that both are multiplied by


def forward(
    z: jax.Array,
    codebook: jax.Array,
    temperature: float,
    *,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the sums over rows and over tokens that the entropy loss needs.

    Args:
        z, codebook: f32[t e] and f32[k e].

    Returns:
        Logarithms to base 2 of each token's sum of exponentials, as whole numbers f32[t] and rests
        f32[t], because a logit minus the logarithm needs more digits than either has; entropies in
        nats f32[t]; probabilities summed over tokens f32[k].
    """
    tokens, rows, unit = _sides(z, codebook, temperature, tiling)
    call = functools.partial(_call, unit=unit, tiling=tiling, interpret=interpret)
    whole, rest, entropy = (
        x[0, : len(z)] for x in call(_entropy_kernel, tokens, rows, [(), (), ()])
    )
    size = len(tokens.packed)
    along = [_padded(whole, size, _FAR), _padded(jnp.exp2(-rest), size, 0)]
    (total,) = call(_total_kernel, rows, tokens, [()], along=along, splits=tiling.splits)
    return whole, rest, _LN2 * entropy, total.sum(0)[: len(codebook)]


def backward(
    z: jax.Array, codebook: jax.Array, temperature: float,
    whole: jax.Array, rest: jax.Array, entropy: jax.Array, slope: jax.Array,
    *, tiling: Tiling = TILING, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Computes the sums over rows and over tokens that the gradients of the entropy loss need.

    Args:
        whole, rest, entropy: f32[t] each, from `forward`.
        slope: f32[k], derivative to each sum of probabilities, up to a constant.

    Returns:
        With p f[t k] the probabilities and q = p (slope - log p - entropy - sum_k p slope):
        q @ codebook f32[t e]; q.T @ z f32[k e]; the sum of q over tokens f32[k].
    """
    # The p of a program lacks the factor 2**-rest of its token.
    factor = jnp.exp2(-rest)
    tokens, rows, unit = _sides(z, codebook, temperature, tiling)
    tokens = tokens._replace(parts=_parts(z * factor[:, None] * tokens.scale, len(tokens.packed)))
    call = functools.partial(_call, unit=unit, tiling=tiling, interpret=interpret)
    t, width = len(tokens.packed), tokens.parts.shape[1]
    whole, factor = _padded(whole - _LIFT, t, _FAR), _padded(factor, t, 0)
    entropy = _padded(entropy - (_LIFT + rest) * _LN2, t, 0)
    slope = _padded(slope, len(rows.packed), 0)
    mean, weighted, lean = call(
        _token_kernel, tokens, rows, [(width,), (width,), ()], [whole, entropy], [slope]
    )
    lean = lean[0] * factor * 2.0**-_LIFT
    from_rows = factor[:, None] * (weighted[0] - lean[:, None] * mean[0])
    from_rows = _joined(from_rows, rows, z.shape[1])
    from_tokens, mass = call(
        _row_kernel, rows, tokens, [(width,), ()], [slope],
        [whole, entropy + lean, factor], splits=tiling.splits,
    )  # fmt: skip
    from_tokens = _joined(from_tokens.sum(0), tokens, z.shape[1])
    mass = mass.sum(0) * 2.0**-_LIFT
    return from_rows[: len(z)], from_tokens[: len(codebook)], mass[: len(codebook)]


def _padded(x, size, value):
    return jnp.pad(x, (0, size - len(x)), constant_values=value)


def _joined(sums, side, width):
    """Adds the high and low parts of sums f32[n 2e] and undoes the scaling; returns f32[n e]."""
    half = sums.shape[1] // 2
    return (sums[:, :width] + sums[:, half : half + width]) * (2.0**-_LIFT / side.scale)


def _sides(z, codebook, temperature, tiling) -> tuple[_Side, _Side, jax.Array]:
    """Scales and packs tokens and rows for the kernels.

    Returns:
        Tokens; rows; the factor f32[1] that turns products of tokens and rows into logits.
    """
    z_scale, e_scale = _power(z), _power(codebook)
    offset = -0.5 * jnp.sum(jnp.square(codebook), axis=1) * e_scale * z_scale
    whole = max(tiling.owners, tiling.members * tiling.splits)
    tokens = _side(z * z_scale, z_scale, split_product.left(z * z_scale), whole)
    packed = split_product.right(codebook * e_scale, offset)
    rows = _side(codebook * e_scale, e_scale, packed, whole)
    return tokens, rows, (2 / (temperature * _LN2) / (z_scale * e_scale))[None]


def _power(x):
    """Returns the power of two f32[] that brings the longest vector to a norm near 1."""
    norm = jnp.sqrt(jnp.max(jnp.sum(jnp.square(x), axis=1)))
    _, exponent = jnp.frexp(norm * (1 / 1.02))
    return jnp.where(norm > 0, jnp.ldexp(jnp.float32(1), jnp.clip(-exponent, -60, 60)), 1)


def _side(x, scale, packed, whole):
    size = len(x) + -len(x) % whole
    packed = jnp.pad(packed, ((0, size - len(x)), (0, 0)))
    return _Side(len(x), packed, _parts(x, size), scale)


def _parts(x, size):
    """Splits f32[.. e] into high and low parts, padded and side by side; returns f16[n 2e]."""
    extra = max(8, pl.next_power_of_2(x.shape[1])) - x.shape[1]
    missing = ((0, size - len(x)), (0, extra))
    return jnp.concatenate([jnp.pad(part, missing) for part in split_product.split(x)], axis=1)


def _call(
    kernel, owners, members, outs, own=(), along=(), *, unit, tiling, interpret, splits=1
):  # fmt: skip
    """Runs one kernel of the entropy loss and returns its outputs, f32[s n ...] each.

    Args:
        outs: shape of each output after the axis of the owners.
        own: vectors f32[n] with a value for each owner.
        along: vectors f32[n] with a value for each member.
    """
    size, block = len(owners.packed), tiling.owners
    steps = len(members.packed) // (tiling.members * splits)
    kernel = functools.partial(kernel, tile=_Tile(tiling.members, steps, members.count))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    packed = pl.BlockSpec((block, owners.packed.shape[1]), lambda i, j: (i, 0))
    vector = pl.BlockSpec((block,), lambda i, j: (i,))
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((splits, size, *more), jnp.float32) for more in outs],
        grid=(size // block, splits),
        in_specs=[packed, whole, whole, whole] + [vector] * len(own) + [whole] * len(along),
        out_specs=[
            pl.BlockSpec((None, block, *more), lambda i, j, more=more: (j, i, *[0] * len(more)))
            for more in outs
        ],
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="entropy" + kernel.func.__name__.removesuffix("_kernel"),
    )(owners.packed, members.packed.T, members.parts, unit, *own, *along)


class _Tile(NamedTuple):
    """Record of the loop of one kernel program over its members."""

    members: int  # members of one step
    steps: int
    count: int  # members without the padding

    def through(self, step, carry):
        """Runs `step` for all members of this program's split and returns the last carry."""
        begin = pl.program_id(1) * self.steps
        return lax.fori_loop(0, self.steps, lambda i, x: step(begin + i, x), carry)

    def columns(self, i):
        return pl.ds(i * self.members, self.members)

    def scores(self, owners, members_ref, i):
        """Computes the logits f32[o m] of step i, not yet multiplied by the factor of `_sides`."""
        members = members_ref[:, self.columns(i)]
        scores = jnp.dot(owners, members, preferred_element_type=jnp.float32)
        if self.count == members_ref.shape[1]:
            return scores
        column = i * self.members + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where(column < self.count, scores, -_FAR)


def _by_class(x):
    return x.reshape(x.shape[0], -1, _CLASSES)


def _entropy_kernel(
    owners_ref, members_ref, _, unit_ref, whole_ref, rest_ref, entropy_ref, *, tile
):
    owners, unit = owners_ref[:, :], unit_ref[0]

    def step(i, carry):
        top, total, moment = carry  # of each class: largest logit, sums of p and of p (logit - top)
        scores = _by_class(tile.scores(owners, members_ref, i))
        new = jnp.maximum(top, jnp.max(scores, axis=1) * unit)
        logits = scores * unit - new[:, None]
        p = jnp.exp2(logits)
        shift = top - new
        shrink = jnp.exp2(shift)
        moment = (moment + total * shift) * shrink + jnp.sum(p * logits, axis=1)
        return new, total * shrink + jnp.sum(p, axis=1), moment

    none = jnp.zeros((owners.shape[0], _CLASSES), jnp.float32)
    top, total, moment = tile.through(step, (none - _FAR, none, none))
    new = jnp.max(top, axis=1)
    shift = top - new[:, None]
    shrink = jnp.exp2(shift)
    moment = jnp.sum((moment + total * shift) * shrink, axis=1)
    total = jnp.sum(total * shrink, axis=1)
    log_total = jnp.log2(total)
    whole = jnp.floor(new + log_total)
    whole_ref[:] = whole
    rest_ref[:] = new - whole + log_total
    entropy_ref[:] = log_total - moment / total


def _total_kernel(owners_ref, members_ref, _, unit_ref, whole_ref, factor_ref, total_ref, *, tile):
    owners, unit = owners_ref[:, :], unit_ref[0]

    def step(i, total):
        scores = tile.scores(owners, members_ref, i)
        p = jnp.exp2(scores * unit - whole_ref[tile.columns(i)][None])
        return total + jnp.sum(_by_class(p * factor_ref[tile.columns(i)][None]), axis=1)

    total = jnp.zeros((owners.shape[0], _CLASSES), jnp.float32)
    total_ref[:] = jnp.sum(tile.through(step, total), axis=1)


def _token_kernel(
    owners_ref, members_ref, parts_ref, unit_ref, whole_ref, entropy_ref, slope_ref,
    mean_ref, weighted_ref, lean_ref, *, tile,
):  # fmt: skip
    owners, unit = owners_ref[:, :], unit_ref[0]
    whole, entropy = whole_ref[:][:, None], entropy_ref[:][:, None]

    def step(i, carry):
        mean, weighted, lean = carry
        log_p = tile.scores(owners, members_ref, i) * unit - whole
        slope = slope_ref[tile.columns(i)][None]
        p = jnp.exp2(log_p)
        vectors = parts_ref[tile.columns(i), :]
        mean = mean + _sums(p, vectors)
        weighted = weighted + _sums(p * (slope - _LN2 * log_p - entropy), vectors)
        return mean, weighted, lean + jnp.sum(_by_class(p * slope), axis=1)

    none = jnp.zeros(mean_ref.shape, jnp.float32)
    start = none, none, jnp.zeros((owners.shape[0], _CLASSES), jnp.float32)
    mean, weighted, lean = tile.through(step, start)
    mean_ref[:, :] = mean
    weighted_ref[:, :] = weighted
    lean_ref[:] = jnp.sum(lean, axis=1)


def _row_kernel(
    owners_ref, members_ref, parts_ref, unit_ref, slope_ref, whole_ref, center_ref,
    factor_ref, sum_ref, mass_ref, *, tile,
):  # fmt: skip
    owners, unit, slope = owners_ref[:, :], unit_ref[0], slope_ref[:][:, None]

    def step(i, carry):
        vectors, mass = carry
        log_p = tile.scores(owners, members_ref, i) * unit - whole_ref[tile.columns(i)][None]
        center = center_ref[tile.columns(i)][None]
        q = jnp.exp2(log_p) * (slope - _LN2 * log_p - center)
        vectors = vectors + _sums(q, parts_ref[tile.columns(i), :])
        return vectors, mass + jnp.sum(_by_class(q * factor_ref[tile.columns(i)][None]), axis=1)

    start = (
        jnp.zeros(sum_ref.shape, jnp.float32),
        jnp.zeros((owners.shape[0], _CLASSES), jnp.float32),
    )
    vectors, mass = tile.through(step, start)
    sum_ref[:, :] = vectors
    mass_ref[:] = jnp.sum(mass, axis=1)


def _sums(weights, vectors):
    """Computes weighted sums f32[o m] @ f16[m 2e] with weights split into a high and a low part.

    Bits split the weights, since XLA drops casts in the interpreter. The sum is halved and doubled,
    so that the sums of the steps are added in float32: tensor cores do not round their sums.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int32) & -0x2000
    high = lax.bitcast_convert_type(bits, jnp.float32)
    low = (weights - high).astype(jnp.float16)
    total = jnp.dot(low, vectors, preferred_element_type=jnp.float32)
    total += jnp.dot(high.astype(jnp.float16), vectors, preferred_element_type=jnp.float32)
    return 0.5 * total * 2.0
