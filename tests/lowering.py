"""Lowering for devices that are not there."""

import jax


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
