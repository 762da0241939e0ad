"""Search of the nearest codebook row on a GPU, in the Triton dialect of Pallas.

Axes: m tokens, k rows, e width, c packed width, w column classes, s splits, a tokens that are
compared with all rows at once.

Scores z.e - |e|^2 / 2 come from tensor cores, accurate to a few 1e-7. For each class of columns
(the columns that one thread holds) a program keeps the best score and the group of rows behind it.
The rows of the best group are then compared by their float32 distances. If a second group is as
near as the first, its rows are compared as well. If a third group is as near, two rows of a group
are equally near, or norms are outside the range in which scores are accurate, all rows are
compared. So the chosen row is the nearest up to rounding, and the lowest of equal rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from gigatok_jax.ops import split_product

_CLASSES = 8  # stride between the columns that one thread holds of the tensor cores' result
_GUARD = 2e-6  # bound on the error of a difference of two scores
_BIAS = 1.5  # keeps the scores of unit vectors positive: positive floats are ordered as integers
_LOW, _HIGH = 0.01, 2.6  # range of biased scores that are accurate
_SHORT, _LONG = 0.2, 1.05  # range of squared norms for which scores are accurate
_NEVER, _ALWAYS = -60000.0, 30000.0  # offset of a padding row; of a row with inaccurate scores
_ROUNDING = 4e-7  # relative error of a distance
_PROGRAMS = 128  # smallest number of programs, if need be by splits of the codebook
_GATHERED = 64  # floats of codebook rows that a thread loads at a time
_EXACT_TOKENS, _EXACT_ELEMENTS = 8, 2048  # tokens, and loaded floats, of a search in all rows


class Tiling(NamedTuple):
    """Record of the block sizes and counts that the search kernel is compiled for."""

    tokens: int = 128  # tokens of one program
    rows: int = 128  # rows of one matrix product
    unroll: int = 1  # matrix products per step, and so per group
    warps: int = 4
    stages: int = 3
    splits: int = 1  # programs that share the codebook among them

    @property
    def span(self) -> int:
        """Number of codebook rows that a program compares in one step."""
        return self.rows * self.unroll


def choose_tiling(tokens: int, rows: int, width: int) -> Tiling:
    """Returns the tiling of the search kernel for these numbers of tokens and rows and this width.

    It is the fastest on an H200 (132 multiprocessors) of about 30 tilings that were tried.
    """
    if width > 16:  # as much as fits into shared memory
        tiling = Tiling(tokens=64, rows=64)
    elif tokens > 2**15:
        return Tiling()
    else:
        tiling = Tiling(tokens=64, rows=256 if width <= 8 else 128)
    blocks, steps = pl.cdiv(tokens, tiling.tokens), pl.cdiv(rows, tiling.rows)
    splits = min(pl.cdiv(_PROGRAMS, blocks), max(1, steps // 4))
    return tiling._replace(splits=splits)


def search(
    z: jax.Array, codebook: jax.Array, *, tiling: Tiling | None = None, interpret: bool = False
) -> jax.Array:
    """Finds on a GPU the nearest row i32[m] of a codebook f32[k e] for tokens f32[m e]."""
    m, (k, e) = z.shape[0], codebook.shape
    tiling = tiling or choose_tiling(m, k, e)
    wide = ((0, 0), (0, pl.next_power_of_2(e) - e))
    groups = pl.cdiv(k, tiling.span * tiling.splits)  # per split
    packed = _pack_rows(codebook, groups * tiling.splits, tiling)
    tokens = split_product.left(jnp.pad(z, ((0, -m % tiling.tokens), (0, 0))))
    shape = (tiling.splits, m)
    block = pl.BlockSpec((tiling.tokens, tokens.shape[1]), lambda i, j: (i, 0))
    out = pl.BlockSpec(memory_space=pl.ANY)
    distance, code = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, groups=groups),
        out_shape=[jax.ShapeDtypeStruct(shape, x) for x in (jnp.float32, jnp.int32)],
        grid=(pl.cdiv(m, tiling.tokens), tiling.splits),
        in_specs=[block, out, out, out],
        out_specs=[out, out],
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="codebook_search",
    )(tokens, packed, jnp.pad(z, wide), jnp.pad(codebook, wide))
    if tiling.splits == 1:
        return code[0]
    # Of splits at equal distance, up to rounding, the first has the lowest rows.
    split = jnp.argmax(distance <= (1 + _ROUNDING) * jnp.min(distance, axis=0), axis=0)
    return jnp.take_along_axis(code, split[None], axis=0)[0]


def _pack_rows(codebook, groups, tiling):
    """Packs a codebook f32[k e] into f16[c k], the second operand of the products for scores.

    The columns of a product are dealt out to the classes, so that the rows of a group are
    neighbours.
    """
    norm = jnp.sum(jnp.square(codebook), axis=1)
    served = (norm >= _SHORT) & (norm <= _LONG)
    offset = jnp.where(served, _BIAS - 0.5 * norm, jnp.where(jnp.isfinite(norm), _ALWAYS, _NEVER))
    missing = (0, groups * tiling.span - len(codebook))
    rows = jnp.pad(jnp.where(served[:, None], codebook, 0), (missing, (0, 0)))
    packed = split_product.right(rows, jnp.pad(offset, missing, constant_values=_NEVER))
    packed = packed.reshape(groups, _CLASSES, tiling.unroll, -1, packed.shape[1])
    return packed.transpose(4, 0, 2, 3, 1).reshape(packed.shape[-1], -1)


def _kernel(tokens_ref, packed_ref, z_ref, e_ref, distance_ref, code_ref, *, tiling, groups):
    block, split = tiling.tokens, pl.program_id(1)
    begin = pl.program_id(0) * block
    token = begin + lax.iota(jnp.int32, block)
    start = split * groups  # first group of this split
    best, group = _best_groups(tokens_ref, packed_ref, tiling, start, groups)
    members = tiling.span // _CLASSES
    score, first, rest = _pick(best, group, members)
    second_score, second, rest = _pick(rest, group, members)
    third_score = lax.bitcast_convert_type(jnp.max(rest, axis=1), jnp.float32)
    z = _rows_at(z_ref, token)
    nearest = _nearest_of(e_ref, z, first, members, tiling.warps)
    nearest = lax.cond(
        _any(second_score >= score - _GUARD),
        lambda: _nearer(nearest, _nearest_of(e_ref, z, second, members, tiling.warps)),
        lambda: nearest,
    )
    distance, runner_up, code = nearest
    decided = (score > _LOW) & (score < _HIGH) & (third_score < score - _GUARD)
    decided &= (jnp.sum(jnp.square(z), axis=1) <= _LONG) & (runner_up > distance + 2 * _GUARD)
    undecided = jnp.where(decided | (token >= z_ref.shape[0]), 0, 1)
    share = jnp.max(undecided.reshape(-1, _EXACT_TOKENS), axis=1)
    here = jnp.broadcast_to(share[:, None], (share.shape[0], _EXACT_TOKENS)).reshape(block) == 0
    _store(distance_ref, code_ref, split, token, distance, code, here)

    @pl.when(_any(undecided > 0))
    def _():
        scale = _scale(e_ref)

        def resolve(chunk, _):
            @pl.when(_any((lax.iota(jnp.int32, share.shape[0]) == chunk) & (share > 0)))
            def _():
                token = begin + chunk * _EXACT_TOKENS + lax.iota(jnp.int32, _EXACT_TOKENS)
                rows = groups * tiling.span
                nearest = _nearest_of_all(z_ref, e_ref, token, scale, split * rows, rows)
                _store(distance_ref, code_ref, split, token, *nearest, token >= 0)

            return 0

        lax.fori_loop(0, share.shape[0], resolve, 0)


def _any(condition):
    return jnp.max(jnp.where(condition, 1, 0)) > 0


def _store(distance_ref, code_ref, split, token, distance, code, mask):
    mask &= token < code_ref.shape[1]
    plt.store(distance_ref.at[split, token], distance, mask=mask)
    plt.store(code_ref.at[split, token], code, mask=mask)


def _rows_at(ref, row, lane=None):
    """Loads the rows `row` of `ref`, f32[.. lanes]; a row past the end of `ref` is infinite."""
    if lane is None:
        lane = lax.iota(jnp.int32, ref.shape[1])
    row, lane = jnp.broadcast_arrays(row[:, None], lane[None])
    return plt.load(ref.at[row, lane], mask=row < ref.shape[0], other=jnp.inf)


def _best_groups(tokens_ref, packed_ref, tiling, start, groups):
    """Finds each token's best score in each class of columns, among the groups of one split.

    Returns:
        Bits i32[m w] of the best score, a float32; the group of rows i32[m w] with this score.
    """
    z = tokens_ref[:, :]

    def step(i, carry):
        best, group = carry
        tops = []
        for product in range(tiling.unroll):
            columns = pl.ds(((start + i) * tiling.unroll + product) * tiling.rows, tiling.rows)
            scores = jnp.dot(z, packed_ref[:, columns], preferred_element_type=jnp.float32)
            bits = lax.bitcast_convert_type(scores, jnp.int32)
            tops.append(jnp.max(bits.reshape(tiling.tokens, -1, _CLASSES), axis=1))
        top = functools.reduce(jnp.maximum, tops)
        better = top > best  # strict: the first group keeps a tie
        return jnp.where(better, top, best), jnp.where(better, start + i, group)

    nothing = jnp.zeros((tiling.tokens, _CLASSES), jnp.int32)
    return lax.fori_loop(0, groups, step, (nothing, nothing + start))


def _pick(best, group, members):
    """Picks each token's best score over all classes of columns.

    Returns:
        Score f32[m]; first row i32[m] of its group; the bits of all scores, this score being -1.
    """
    bits = jnp.max(best, axis=1)
    column = lax.broadcasted_iota(jnp.int32, best.shape, 1)
    chosen = jnp.min(jnp.where(best == bits[:, None], column, _CLASSES), axis=1)
    hit = column == chosen[:, None]
    group = jnp.sum(jnp.where(hit, group, 0), axis=1)
    score = lax.bitcast_convert_type(bits, jnp.float32)
    return score, (group * _CLASSES + chosen) * members, jnp.where(hit, -1, best)


def _nearest_of(e_ref, z, first, count, warps):
    """Finds the nearest of `count` codebook rows; each token has its own first row `first` i32[m].

    Returns:
        Squared distances f32[m] to the nearest and to the second nearest row; nearest row i32[m].
    """
    together = max(1, min(count, _GATHERED * 32 * warps // z.size))

    def step(i, state):
        for offset in range(together):
            distance, runner_up, code = state
            row = first + i * together + offset
            this = jnp.sum(jnp.square(z - _rows_at(e_ref, row)), axis=1)
            runner_up = jnp.minimum(runner_up, jnp.maximum(this, distance))
            code = jnp.where(this < distance, row, code)
            state = jnp.where(this < distance, this, distance), runner_up, code
        return state

    far = jnp.full(first.shape, jnp.inf, jnp.float32)
    return lax.fori_loop(0, count // together, step, (far, far, first))


def _nearer(x, y):
    """Returns per token the nearer of two results of `_nearest_of`, on a tie that of the lower row.

    The distance of the second nearest row stays that of the same result: a tie between groups is
    decided here, while a tie within a group may hide a lower row.
    """
    closer = (y[0] < x[0]) | ((y[0] == x[0]) & (y[2] < x[2]))
    return tuple(jnp.where(closer, b, a) for a, b in zip(x, y, strict=True))


def _scale(e_ref):
    """Returns a power of two f32[] that brings the largest value of an extreme codebook near 1.

    It is 1 for a codebook whose largest value is between 2^-40 and 2^40.
    """
    size = _EXACT_ELEMENTS // e_ref.shape[1]

    def step(i, largest):
        e = jnp.abs(_rows_at(e_ref, i * size + lax.iota(jnp.int32, size)))
        return jnp.maximum(largest, jnp.max(jnp.where(e < jnp.inf, e, 0)))

    largest = lax.fori_loop(0, pl.cdiv(e_ref.shape[0], size), step, jnp.float32(0))
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    inverse = lax.bitcast_convert_type(0x7F000000 - jnp.minimum(exponent, 0x7E800000), jnp.float32)
    return jnp.where((largest > 2.0**-40) & (largest < 2.0**40), 1.0, inverse)


def _nearest_of_all(z_ref, e_ref, token, scale, begin, count):
    """Finds for a few tokens the nearest of the `count` codebook rows from `begin` on.

    Returns:
        Squared distances f32[a]; rows i32[a], the lowest of equally near rows.
    """
    size = _EXACT_ELEMENTS // _EXACT_TOKENS
    shape = _EXACT_TOKENS, size
    unroll = min(8, z_ref.shape[1])

    def column(ref, row, lane):
        values = plt.load(ref.at[row, lane], mask=row < ref.shape[0], other=jnp.inf)
        return values * scale

    def step(i, state):
        row = begin + i * size + lax.iota(jnp.int32, size)

        def add(lanes, total):
            for offset in range(unroll):
                lane = lanes * unroll + offset
                apart = column(z_ref, token, lane)[:, None] - column(e_ref, row, lane)[None]
                total += jnp.square(apart)
            return total

        distance, code = state
        this = lax.fori_loop(0, z_ref.shape[1] // unroll, add, jnp.zeros(shape, jnp.float32))
        closer = this < distance
        row = jnp.broadcast_to(row[None], shape)
        return jnp.where(closer, this, distance), jnp.where(closer, row, code)

    far = jnp.full(shape, jnp.inf, jnp.float32)
    row = begin + lax.broadcasted_iota(jnp.int32, shape, 1)
    distance, code = lax.fori_loop(0, pl.cdiv(count, size), step, (far, row))
    nearest = jnp.min(distance, axis=1)
    code = jnp.where(distance == nearest[:, None], code, jnp.iinfo(jnp.int32).max)
    return nearest, jnp.min(code, axis=1)
