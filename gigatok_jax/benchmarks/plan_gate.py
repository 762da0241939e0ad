"""What programs cost by the TPU's compiler, kept in the repository; a TPU is not needed.

Steps have their transformers in full. The gradient of the CNN at 256 pixels takes the compiler half
an hour, so the CNN is there forwards alone.
"""

import json
import pathlib
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax import parallel
from gigatok_jax.errors import ConfigError
from gigatok_jax.models import tokenizer
from gigatok_jax.planning import compiled, hardware, hlo, plan
from gigatok_jax.run import command_line
from gigatok_jax.train import program as program_lib

TOLERANCE = 0.02  # of a figure
SMALL = 2**20  # bytes; changes of less than so much of a figure are none
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


class Case(NamedTuple):
    """A config on a topology."""

    config: str
    topology: str
    mesh: dict[str, int]
    lower: Callable  # (config, mesh) to a lowered program
    train: dict  # what differs from the recipe, so that it fits


def read(name: str):
    """Config of "ss" or "ar:size=b".

    Raises:
        ConfigError: there is none of that name.
    """
    file, _, argument = name.partition(":")
    path = pathlib.Path("configs") / f"{file}.py"
    if not path.exists():
        raise ConfigError(f"no config file {path}: run this in the folder that has configs/")
    return command_line.load_config(f"{path}:{argument}")


def training(config, mesh) -> jax.stages.Lowered:
    """The step, a tokenizer's with patches in the place of the CNN and the losses on pixels."""
    if config.model.kind != "prior":
        config.model.update(stem="patch", patch_size=16)
        config.loss.update(perceptual=0.0, discriminator="none")
    return plan.program_of(config, mesh).lower(config.train.micro_batches)


def reconstruction(config, mesh) -> jax.stages.Lowered:
    """Pixels to pixels, the CNN included, 64 images."""
    module = tokenizer.make(config.model, jnp.bfloat16)
    size = config.model.image_size
    images = jax.ShapeDtypeStruct((64, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)
    given = parallel.with_shardings(shapes, whole), parallel.with_shardings(images, split)

    def forward(params, images):
        return module.apply(params, images)[1].images

    with jax.set_mesh(mesh):
        return jax.jit(forward, out_shardings=split).lower(*given)


FSDP = {"data": 1, "fsdp": -1}
DATA = {"data": -1, "fsdp": 1}
CASES = {
    "xlxxl_step": Case("xlxxl", "v5p:2x2x2", FSDP, training, {}),
    "bl_step": Case("bl", "v5e:2x4", DATA, training, {"global_batch": 64, "remat": "blocks"}),
    "bl_forward": Case("bl", "v5e:2x4", DATA, reconstruction, {}),
    "ar_xxl_step": Case("ar:size=xxl", "v6e:4x4", FSDP, training, {"remat": "blocks"}),
}


def measure(case: Case) -> dict[str, int]:
    """Bytes and FLOPs of one device, by name.

    Raises:
        ConfigError: the TPU's compiler is not here.
    """
    topology = hardware.parse(case.topology)
    devices = hardware.compiler(topology)
    if devices is None:
        raise ConfigError("no TPU compiler is here: install jax[tpu]")
    config = read(case.config)
    config.mesh.update(case.mesh)
    config.train.update(case.train)
    lowered = case.lower(config, parallel.make_mesh(config.mesh, devices))
    with compiled.ticking(f"compiling {case.config} for {topology}"):
        program = lowered.compile()
    costs = hlo.costs(program.as_text())
    assert not costs.unknown_loops, costs.unknown_loops
    sent = {f"{kind} bytes": one.bytes for kind, one in costs.collectives.items()}
    held = {f"{name} bytes": size for name, size in program_lib.memory_of(program).items()}
    return held | {"flops": costs.flops} | sent


def keep(path: pathlib.Path, names: list[str] | None) -> None:
    """Compiles cases, all without names, and writes what they cost and what compiled them.

    Raises:
        ConfigError: some of the cases, where the others were compiled by other versions.
    """
    kept = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    versions = {name: metadata.version(name) for name in PACKAGES}
    if names and kept["figures"] and kept["versions"] != versions:
        raise ConfigError(f"{path} was kept with other versions: leave --cases out")
    figures = kept["figures"] if kept.get("versions") == versions else {}
    for name in names or CASES:
        figures[name] = measure(CASES[name])
        print(name, figures[name], flush=True)
        path.write_text(json.dumps({"versions": versions, "figures": figures}, indent=1) + "\n")


def moved(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """What differs by more than `TOLERANCE`, a line for each figure."""
    lines = []
    for name in sorted(before | now):
        old, new = before.get(name, 0), now.get(name, 0)
        if abs(new - old) > TOLERANCE * max(old, SMALL):
            change = f"{new / old - 1:+.1%}" if old else "new"
            lines.append(f"{name}: {old:,} to {new:,} ({change})")
    return lines
