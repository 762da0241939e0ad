"""Texts of programs compiled for eight CPU devices: python -m compiled FOLDER NAME...

This runs in a process of its own because the number of devices is fixed when jax starts.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec

from configs import xlxxl
from gigatok_jax import parallel
from gigatok_jax.models import cnn, layers, qformer
from gigatok_jax.planning import plan

P = PartitionSpec


def make_mesh(sizes: str) -> jax.sharding.Mesh:
    """Mesh of data x fsdp x tensor sizes such as "2x4x1"."""
    axes = dict(zip(parallel.AXES, map(int, sizes.split("x")), strict=True))
    return parallel.make_mesh(ml_collections.ConfigDict(axes))


# Programs whose collectives and bytes are known. The mesh is 2x4x1, so "fsdp" has four devices.


def in_loop(x, w):
    """A sum in each of 5 trips."""
    return jax.lax.scan(lambda x, _: (jax.lax.psum(x @ w, "fsdp"), None), x, None, length=5)[0]


def in_loops(x, w):
    """The sum of `in_loop`, 3 x 5 times."""
    return jax.lax.scan(lambda x, _: (in_loop(x, w), None), x, None, length=3)[0]


def counted(x, w):
    """A sum in each of 14 trips, from 3 to 17."""
    return jax.lax.fori_loop(3, 17, lambda i, x: jax.lax.psum(x @ w + i, "fsdp"), x)


def until(x, w):
    """A sum in each trip of a loop whose length is unknown before it runs."""
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x @ w, "fsdp"), x)


def either(x, w):
    """Two branches, of which the second has more products and no sum."""
    return jax.lax.cond(
        x[0, 0] > 0, lambda x: jax.lax.psum(x @ w, "fsdp"), lambda x: x @ w @ w + 1, x
    )


def exchange(x, w):
    """A collective of each kind but all-reduce."""
    x = jax.lax.all_gather(x, "fsdp", tiled=True)  # [64 16]
    x = jax.lax.psum_scatter(x + 1, "fsdp", tiled=True)  # [16 16]
    x = jax.lax.all_to_all(x * w, "fsdp", 0, 1, tiled=True)  # [4 64]
    return jax.lax.ppermute(jnp.sin(x), "fsdp", [(i, (i + 1) % 4) for i in range(4)])


BY_HAND = {f.__name__: f for f in (in_loop, in_loops, counted, until, either, exchange)}


def by_hand(name: str):
    """Compiled program of two f32[16 16], the same on every device."""
    shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    spread = functools.partial(jax.shard_map, mesh=make_mesh("2x4x1"), check_vma=False)
    mapped = spread(BY_HAND[name], in_specs=P(), out_specs=P())
    return jax.jit(mapped).lower(shape, shape).compile()


# Parts of our models, from shapes.

PARTS = {  # module, path of its parameters, shape of its inputs, which are smaller than kernels
    "align": (layers.AlignmentMLP(768), "align", (16, 4, 768)),
    "block": (cnn.ResnetBlock(512), "cnn_encoder/level_4_block_0", (16, 4, 4, 512)),
    "encoder": (
        qformer.QFormerEncoder(5, 8, 512, 16, loop=layers.Loop("blocks")),
        "encoder",
        (16, 4, 4, 256),
    ),
}


def parameters(name: str) -> dict:
    """Shapes of a module's parameters, under their path."""
    module, path, shape = PARTS[name]
    return {path: jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))["params"]}


def part(name: str):
    """Compiled gradient of a module, for 16 images on a 2x4x1 mesh."""
    module, path, shape = PARTS[name]
    mesh, params = make_mesh("2x4x1"), parameters(name)
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallel.split_batch(mesh))
    placed = parallel.shardings(params, mesh, parallel.RULES["tokenizer"])
    params = parallel.with_shardings(params, placed)

    def loss(params, x):
        out = jax.tree.leaves(module.apply({"params": params[path]}, x))
        return sum((x**2).sum() for x in out)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss), out_shardings=placed).lower(params, inputs).compile()


def step_config():
    """Config of XL-XXL as published, with all losses, for a batch of 16."""
    config = xlxxl.get_config()
    config.train.global_batch = 16
    return config


def step(sizes: str):
    """Compiled training step of `step_config` on a mesh of these sizes."""
    return plan.program_of(step_config(), make_mesh(sizes)).lower().compile()


def main(folder: str, *names: str) -> None:
    """Writes the text of each program into `folder/name`: "in_loop", "align", "2x4x1"."""
    for name in names:
        make = by_hand if name in BY_HAND else part if name in PARTS else step
        pathlib.Path(folder, name).write_text(make(name).as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
