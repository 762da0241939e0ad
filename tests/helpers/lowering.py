"""Lowering for devices that are not there."""

import jax
import jax.numpy as jnp

from gigatok_jax import parallel
from gigatok_jax.ops import codebook_search, entropy


def on_hopper():
    """Where jax asks for the device that it lowers a GPU kernel for, it finds an H200."""
    more = {}
    if hasattr(jax.sharding, "AbstractDevice"):
        more["abstract_device"] = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), **more))


def lowered(function, platform, *arguments) -> str:
    """The program of a jitted function for "cuda" or "tpu"."""
    with on_hopper():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def search_and_loss(mesh, latents, rows: int, groups: int = 1) -> jax.stages.Compiled:
    """Codes, and gradients of the entropy loss, of a batch divided over a mesh."""
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)

    def run(z, codebook):
        loss = lambda *x: entropy.entropy_loss(*x, 0.01, groups)  # noqa: E731
        return codebook_search.nearest(z, codebook), jax.grad(loss, (0, 1))(z, codebook)

    given = (
        jax.ShapeDtypeStruct(latents, jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((rows, latents[-1]), jnp.float32, sharding=whole),
    )
    with jax.set_mesh(mesh):
        return jax.jit(run, out_shardings=(split, (split, whole))).lower(*given).compile()
