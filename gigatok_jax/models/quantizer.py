"""Vector quantizer. Axes: b batch, n latent tokens, e codebook width, k codebook rows."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.ops import codebook_search, quantize


class Quantized(NamedTuple):
    """Record of a quantization: codes, and the latents and codebook rows that losses compare."""

    inputs: jax.Array  # f32[b n e], latents before quantization (unit if l2_norm), for the losses
    latents: jax.Array  # f32[b n e], value of the chosen rows, gradient to the encoder
    rows: jax.Array  # f32[b n e], the chosen rows themselves, gradient to the codebook
    codes: jax.Array  # i32[b n], in [0, k)


class VectorQuantizer(nn.Module):
    """Module that maps each latent token to the nearest row of a learned codebook."""

    codebook_size: int = 16384
    codebook_width: int = 8
    l2_norm: bool = True  # latents and rows are normalised on every use
    rotation: bool = True  # rotation trick (arXiv:2410.06424); False is straight-through
    search: str | None = None  # an `impl` of codebook_search.nearest

    def setup(self):
        init = quantize.unit_rows_init if self.l2_norm else quantize.uniform_rows_init
        self.codebook = self.param("codebook", init, (self.codebook_size, self.codebook_width))

    def table(self) -> jax.Array:
        """Returns the codebook f32[k e], row by code; the rows are unit vectors if `l2_norm`."""
        return quantize.unit(self.codebook) if self.l2_norm else self.codebook

    def __call__(self, z: jax.Array) -> Quantized:
        """Quantizes latents f[b n e]; returns codes, quantized latents and inputs of the losses."""
        if z.shape[-1] != self.codebook_width:
            raise ValueError(f"latents are {z.shape[-1]} wide, expected {self.codebook_width}")
        table = self.table()
        z = z.astype(jnp.float32)
        z = quantize.unit(z) if self.l2_norm else z
        codes = codebook_search.nearest(z, table, impl=self.search)
        rows = table[codes]
        join = quantize.rotate if self.rotation else quantize.straight_through
        return Quantized(inputs=z, latents=join(z, rows), rows=rows, codes=codes)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Looks up codes i32[b n]; returns the codes' exact codebook rows f32[b n e]."""
        return self.table()[codes]
