"""Lowering and compilation for absent devices."""

import jax
import jax.numpy as jnp

from gigatok_jax import parallel
from gigatok_jax.ops import codebook_search, entropy


def on_hopper():
    """Context in which jax lowers GPU kernels for an H200."""
    more = {}
    if hasattr(jax.sharding, "AbstractDevice"):
        more["abstract_device"] = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), **more))


def lowered(function, platform, *arguments) -> str:
    """Text of a jitted function lowered for "cuda" or "tpu"."""
    with on_hopper():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def search_and_loss(mesh, latents, rows: int, groups: int = 1) -> jax.stages.Compiled:
    """Compiled search and entropy-loss gradients of a batch that is divided over a mesh.

    Args:
        mesh: devices, present or not.
        latents: shape [b n e].
        rows: of the codebook.
        groups: groups of images whose mean distributions are separate.
    """
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)

    def run(z, codebook):
        loss = lambda *x: entropy.entropy_loss(*x, 0.01, groups)  # noqa: E731
        return codebook_search.nearest(z, codebook), jax.grad(loss, (0, 1))(z, codebook)

    inputs = (
        jax.ShapeDtypeStruct(latents, jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((rows, latents[-1]), jnp.float32, sharding=whole),
    )
    with jax.set_mesh(mesh):
        return jax.jit(run, out_shardings=(split, (split, whole))).lower(*inputs).compile()
