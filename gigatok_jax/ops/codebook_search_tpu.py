"""Search of the nearest codebook row on a TPU.

Axes: m tokens (on lanes), k rows (on sublanes), e width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_SUBLANES = 8
_TOKENS = 512  # tokens of one program
_ROWS = 2048  # rows in fast memory at a time


def search(z: jax.Array, codebook: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Finds on a TPU the nearest row i32[m] of a codebook f32[k e] for tokens f32[m e].

    The vector unit adds up squared differences: for narrow vectors this is no slower than the six
    passes of a float32 product on the matrix unit, and as exact as float32 can be.
    """
    (m, e), k = z.shape, len(codebook)
    rows = min(_ROWS, -(-k // _SUBLANES) * _SUBLANES)
    z = jnp.pad(z, ((0, -m % _TOKENS), (0, 0))).T
    codebook = jnp.pad(codebook, ((0, -k % rows), (0, 0)), constant_values=jnp.inf)
    state = pltpu.VMEM((_SUBLANES, _TOKENS), jnp.float32)
    codes = pl.pallas_call(
        functools.partial(_kernel, steps=rows // _SUBLANES),
        out_shape=jax.ShapeDtypeStruct((1, z.shape[1]), jnp.int32),
        grid=(z.shape[1] // _TOKENS, len(codebook) // rows),
        in_specs=[
            pl.BlockSpec((e, _TOKENS), lambda i, j: (0, i)),
            pl.BlockSpec((rows, e), lambda i, j: (j, 0)),
        ],
        out_specs=pl.BlockSpec((1, _TOKENS), lambda i, j: (0, i)),
        scratch_shapes=[state, state],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="codebook_search",
    )(z, codebook)
    return codes[0, :m]


def _kernel(z_ref, e_ref, code_ref, distance_ref, row_ref, *, steps):
    """Pallas kernel: keeps the nearest codebook row of each sublane, then compares these eight."""
    block = pl.program_id(1)
    sublane = lax.broadcasted_iota(jnp.int32, distance_ref.shape, 0)

    @pl.when(block == 0)
    def _():
        distance_ref[...] = jnp.full_like(distance_ref, jnp.inf)
        row_ref[...] = sublane.astype(jnp.float32)

    def step(i, state):
        distance, row = state
        e = e_ref[pl.ds(pl.multiple_of(i * _SUBLANES, _SUBLANES), _SUBLANES), :]
        this = jnp.zeros(distance.shape, jnp.float32)
        for lane in range(e.shape[1]):
            this += jnp.square(z_ref[lane : lane + 1, :] - e[:, lane : lane + 1])
        closer = this < distance  # strict: the first row keeps a tie
        number = ((block * steps + i) * _SUBLANES + sublane).astype(jnp.float32)
        return jnp.where(closer, this, distance), jnp.where(closer, number, row)

    distance, row = lax.fori_loop(0, steps, step, (distance_ref[...], row_ref[...]))
    distance_ref[...] = distance
    row_ref[...] = row

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        nearest = distance == jnp.min(distance, axis=0, keepdims=True)
        # Row numbers are floats, since TPUs reduce no integers here; exact up to 2**24.
        lowest = jnp.min(jnp.where(nearest, row, 2.0**24), axis=0, keepdims=True)
        code_ref[...] = lowest.astype(jnp.int32)
