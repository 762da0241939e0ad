r"""Tells which slices and GPUs fit which config, and how fast a step could be; runs on a CPU.

    python -m gigatok_jax.benchmarks.plan --out /tmp/plans                     # shape analysis
    python -m gigatok_jax.benchmarks.plan --configs xlxxl ar:size=xxl --topologies v5p:4x4x4 h200x8
    python -m gigatok_jax.benchmarks.plan --configs xlxxl --topologies v5p:2x2x2 --compile
    python -m gigatok_jax.benchmarks.plan --keep tests/golden/plans.json     # the gate

Names of configs are those of `configs/`, `2*v5e:16x16` is two slices. The mesh of a row is data
alone where that fits, else the smallest fsdp that fits. On more devices than the recipe's batch has
images, the batch is one image for each device. `--compile` needs the compilers of those devices.
`--keep` writes the compiled costs that a test compares; it needs the TPU's compiler, and minutes.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gigatok_jax import parallel
from gigatok_jax.benchmarks import markdown
from gigatok_jax.errors import ConfigError
from gigatok_jax.models import tokenizer
from gigatok_jax.planning import compiled, hardware, hlo, plan, shapes
from gigatok_jax.run import command_line
from gigatok_jax.train import program as program_lib

CONFIGS = (
    "ss sb sl bl bl_dinodisc bl_simple xlxxl ss_2d sb_2d bl_2d"
    " ar:size=b ar:size=l ar:size=xl ar:size=xxl"
)
TOPOLOGIES = (
    "v5e:2x2 v5e:4x4 v5e:8x8 v5e:16x16 2*v5e:16x16 v5p:2x2x1 v5p:2x2x2 v5p:4x4x4 v5p:8x8x16"
    " 2*v5p:8x8x16 v6e:2x2 v6e:4x4 v6e:8x8 v6e:16x16 2*v6e:16x16 h100x8 h100x64 h200x1 h200x8"
    " h200x64 h200x1024"
)
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOLERANCE = 0.02  # relative change of a figure that the gate lets pass
SMALL = 2**20  # bytes or FLOPs: the tolerance of smaller figures is that of this one
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def main() -> None:
    """Plans each config on each topology and prints tables; with `--out` writes all figures too.

    With `--keep`, writes the costs of the gate instead.
    """
    options = _arguments()
    jax.config.update("jax_platforms", "cpu")
    with command_line.one_line_errors():
        if options.keep:
            return keep(pathlib.Path(options.keep), options.cases)
        topologies = [parse(text) for text in options.topologies]
        plans, smallest = [], {}
        for name in options.configs:
            config = read(name)
            traced = {platform: shapes.trace(config, platform) for platform in ("tpu", "gpu")}
            for topology in topologies:
                plans.append(best(config, traced, topology, options.compile)._replace(name=name))
                print(*row(plans[-1]), sep="  ", flush=True)
            smallest[name] = {chip: first_fit(config, traced, chip) for chip in hardware.CHIPS}
    text = markdown.table(HEAD, [row(step) for step in plans]) + "\n\n" + smallest_table(smallest)
    print(text)
    if options.out:
        folder = pathlib.Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plans.md").write_text(text + "\n")
        (folder / "plans.json").write_text(json.dumps([values(step) for step in plans], indent=1))


def _arguments() -> argparse.Namespace:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS.split(), help="ss ar:size=b ...")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES.split(), help="v5p:4x4x4 ...")
    parser.add_argument("--compile", action="store_true", help="compile, not only analyse")
    parser.add_argument("--keep", default="", help="file to keep the costs of the gate in")
    parser.add_argument(
        "--cases", nargs="*", choices=CASES, help="cases of the gate (default: all)"
    )
    parser.add_argument("--out", default="", help="folder for the tables and plans.json")
    return parser.parse_args()


def read(name: str) -> ConfigDict:
    """Loads the config of a name like "ss" or "ar:size=b".

    Raises:
        ConfigError: no config has that name.
    """
    file, _, argument = name.partition(":")
    path = pathlib.Path("configs") / f"{file}.py"
    if not path.exists():
        raise ConfigError(f"no config file {path}: run this in the folder that has configs/")
    return command_line.load_config(f"{path}:{argument}")


def parse(text: str) -> hardware.Topology:
    """Returns the topology of "v5p:4x4x4", "h200x8", or "2*v5e:16x16" for two slices.

    Raises:
        ConfigError: the topology is unknown.
    """
    slices, star, name = text.rpartition("*")
    if star and not slices.isdigit():
        raise ConfigError(f"topology {text!r}: expected a number of slices before the *")
    return hardware.parse(name, int(slices or 1))


def meshes(config: ConfigDict, topology: hardware.Topology) -> Iterator[ConfigDict]:
    """Yields copies of a config with the meshes to try, by rising fsdp: the first replicates most.

    The batch becomes at least one image for each device.
    """
    count = topology.devices
    for fsdp in (2**i for i in range(count.bit_length())):
        if (count // topology.slices) % fsdp == 0:
            own = config.copy_and_resolve_references()
            own.train.global_batch = max(own.train.global_batch, count)
            own.mesh.update(data=-1, fsdp=fsdp, tensor=1, dcn=topology.slices)
            yield own


def best(
    config: ConfigDict,
    traced: dict[str, shapes.Traced],
    topology: hardware.Topology,
    compiles: bool = False,
) -> plan.Plan:
    """Returns the plan of the first mesh on which a config fits, or of the last mesh tried.

    Args:
        config: of a run; the mesh in it is replaced.
        traced: the config's step on each platform.
        topology: devices to plan for.
        compiles: compile the plan that fits, rather than only analyse its shapes.

    Raises:
        ConfigError: no mesh suits the config, or the compiler of the devices is not installed.
    """
    step = None
    for own in meshes(config, topology):
        try:
            step = shapes.analyse(own, traced[topology.chip.platform], topology)
        except ConfigError:
            if step is None:
                raise
            break  # more fsdp than an array divides by
        if step.fits:
            break
    if not compiles or not step.fits:
        return step
    devices = hardware.compiler(topology)
    if devices is None:
        raise ConfigError(f"--compile needs the compiler for {topology}, which is not installed")
    return compiled.compile_for(own, topology, devices)


def first_fit(config: ConfigDict, traced: dict[str, shapes.Traced], chip: str) -> plan.Plan | None:
    """Returns the plan of a chip's smallest slice or GPU count that fits a config, or None."""
    names = [f"{chip}:{shape}" for shape in hardware.SLICES.get(chip, ())]
    for name in names or [f"{chip}x{count}" for count in GPU_COUNTS]:
        step = best(config, traced, hardware.parse(name))
        if step.fits:
            return step
    return None


HEAD = (
    "config", "devices", "mesh", "batch", "GiB per device", "TFLOP per step and device",
    "collectives, GB", "s per step", "images/s", "known by",
)  # fmt: skip


def row(step: plan.Plan) -> list[str]:
    """Returns the table cells of a plan, whose time is that of collectives hidden by computing."""
    axes = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items() if size > 1)
    cut = f" in {step.micro_batches}" if step.micro_batches > 1 else ""
    memory = f"{step.needed / 2**30:.1f} of {step.limit / 2**30:.1f}"
    start = [step.name, step.where, axes or "1", f"{step.batch}{cut}", memory]
    if not step.fits:
        return [*start, *["-"] * 3, "does not fit", step.how.removesuffix(" for")]
    sent = sum(group.bytes for group in step.traffic) / 1e9
    seconds = max(step.seconds())
    figures = [f"{step.flops / 1e12:.1f}", f"{sent:.1f}", f"{seconds:.3g}"]
    return [*start, *figures, f"{step.batch / seconds:.0f}", step.how.removesuffix(" for")]


def smallest_table(smallest: dict[str, dict[str, plan.Plan | None]]) -> str:
    """Returns a table of the smallest slice or GPU count of every chip that fits each config."""
    rows = [
        [
            name,
            *(
                f"{step.where} ({step.needed / 2**30:.0f} GiB)" if step else "-"
                for step in plans.values()
            ),
        ]
        for name, plans in smallest.items()
    ]
    return markdown.table(["shape analysis: smallest that fits", *hardware.CHIPS], rows)


def values(step: plan.Plan) -> dict[str, Any]:
    """Returns a plan as JSON values."""
    compute, sending = step.seconds()
    more = {"fits": step.fits, "compute_seconds": compute, "collective_seconds": sending}
    traffic = [group._asdict() for group in step.traffic]
    return step._asdict() | {"chip": step.chip._asdict(), "traffic": traffic} | more


# The gate: costs of programs by the TPU's compiler, kept in the repository; no TPU is needed. Steps
# contain the whole transformers. The compiler needs half an hour for the gradient of the CNN at 256
# pixels, so the CNN is compiled forwards alone.


class Case(NamedTuple):
    """Record of a program that the gate, a test of compiled costs, compiles."""

    config: str
    topology: str
    mesh: dict[str, int]
    lower: Callable[[ConfigDict, jax.sharding.Mesh], jax.stages.Lowered]
    train: dict  # keys that differ from the recipe, so that the step fits


def training(config: ConfigDict, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers a config's training step for a mesh; changes the config.

    A tokenizer's step has patches instead of a CNN, and no perceptual and adversarial losses.
    """
    if config.model.kind != "prior":
        config.model.update(stem="patch", patch_size=16)
        config.loss.update(perceptual=0.0, discriminator="none")
    return plan.program_of(config, mesh).lower(config.train.micro_batches)


def reconstruction(config: ConfigDict, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers the reconstruction of 64 images by a config's whole tokenizer, pixels to pixels."""
    module = tokenizer.make(config.model, jnp.bfloat16)
    size = config.model.image_size
    images = jax.ShapeDtypeStruct((64, size, size, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)
    whole, split = parallel.replicated(mesh), parallel.split_batch(mesh)
    inputs = parallel.with_shardings(params, whole), parallel.with_shardings(images, split)

    def forward(params, images):
        return module.apply(params, images)[1].images

    with jax.set_mesh(mesh):
        return jax.jit(forward, out_shardings=split).lower(*inputs)


FSDP = {"data": 1, "fsdp": -1}
DATA = {"data": -1, "fsdp": 1}
CASES = {
    "xlxxl_step": Case("xlxxl", "v5p:2x2x2", FSDP, training, {}),
    "bl_step": Case("bl", "v5e:2x4", DATA, training, {"global_batch": 64, "remat": "blocks"}),
    "bl_forward": Case("bl", "v5e:2x4", DATA, reconstruction, {}),
    "ar_xxl_step": Case("ar:size=xxl", "v6e:4x4", FSDP, training, {"remat": "blocks"}),
}


def measure(case: Case) -> dict[str, int]:
    """Compiles a case of the gate; returns numbers of bytes and FLOPs on one device, by name.

    Raises:
        ConfigError: the TPU's compiler is not installed.
    """
    topology = hardware.parse(case.topology)
    devices = hardware.compiler(topology)
    if devices is None:
        raise ConfigError('the gate needs the TPU\'s compiler: pip install "jax[tpu]"')
    config = read(case.config)
    config.mesh.update(case.mesh)
    config.train.update(case.train)
    lowered = case.lower(config, parallel.make_mesh(config.mesh, devices))
    with compiled.ticking(f"compiling {case.config} for {topology}"):
        program = lowered.compile()
    costs = hlo.costs(program.as_text())
    assert not costs.unknown_loops, costs.unknown_loops
    sent = {f"{kind} bytes": total.bytes for kind, total in costs.collectives.items()}
    held = {f"{name} bytes": size for name, size in program_lib.memory_of(program).items()}
    return held | {"flops": costs.flops} | sent


def keep(path: pathlib.Path, names: list[str] | None) -> None:
    """Compiles the named cases, or all, and writes their costs and compiler versions to a file.

    Raises:
        ConfigError: `names` leaves out cases that other versions compiled.
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
    """Returns a line of text for each figure that differs by more than `TOLERANCE`."""
    lines = []
    for name in sorted(before | now):
        old, new = before.get(name, 0), now.get(name, 0)
        if abs(new - old) > TOLERANCE * max(old, SMALL):
            change = f"{new / old - 1:+.1%}" if old else "new"
            lines.append(f"{name}: {old:,} to {new:,} ({change})")
    return lines


if __name__ == "__main__":
    main()
