r"""Which slices and GPUs fit which config, and how fast a step could be; needs no accelerator.

    python -m gigatok_jax.benchmarks.plan --out /tmp/plans                     # shape analysis
    python -m gigatok_jax.benchmarks.plan --configs xlxxl ar:size=xxl --topologies v5p:4x4x4 h200x8
    python -m gigatok_jax.benchmarks.plan --configs xlxxl --topologies v5p:2x2x2 --compile
    python -m gigatok_jax.benchmarks.plan --keep tests/golden/plans.json     # the gate

Names of configs are those of `configs/`, `2*v5e:16x16` is two slices. The mesh of a cell is data
alone where that fits, else as few fsdp as fit. Where there are more devices than images in the
recipe's batch, the batch is one image of each. `--compile` wants the compilers of those devices;
`--keep` wants the TPU's, and minutes.
"""

import json
import pathlib
from collections.abc import Iterator

import jax

from gigatok_jax.benchmarks import plan_gate
from gigatok_jax.errors import ConfigError
from gigatok_jax.planning import compiled, hardware, plan, shapes
from gigatok_jax.run import command_line

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


def main() -> None:
    """Prints the tables; writes them, and every figure as JSON, with `--out`."""
    given = _arguments()
    jax.config.update("jax_platforms", "cpu")
    with command_line.one_line_errors():
        if given.keep:
            return plan_gate.keep(pathlib.Path(given.keep), given.cases)
        topologies = [parse(text) for text in given.topologies]
        plans, smallest = [], {}
        for name in given.configs:
            config = plan_gate.read(name)
            traced = {platform: shapes.trace(config, platform) for platform in ("tpu", "gpu")}
            for topology in topologies:
                plans.append(best(config, traced, topology, given.compile)._replace(name=name))
                print(*row(plans[-1]), sep="  ", flush=True)
            smallest[name] = {chip: first_fit(config, traced, chip) for chip in hardware.CHIPS}
    text = table(HEAD, [row(one) for one in plans]) + "\n\n" + smallest_table(smallest)
    print(text)
    if given.out:
        folder = pathlib.Path(given.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plans.md").write_text(text + "\n")
        (folder / "plans.json").write_text(json.dumps([values(one) for one in plans], indent=1))


def _arguments():
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS.split(), help="ss ar:size=b ...")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES.split(), help="v5p:4x4x4 ...")
    parser.add_argument("--compile", action="store_true", help="instead of shape analysis")
    parser.add_argument("--keep", default="", help="compiles the gate's cases into this file, ends")
    parser.add_argument("--cases", nargs="*", choices=plan_gate.CASES, help="of the gate; or all")
    parser.add_argument("--out", default="", help="folder for the tables and plans.json")
    return parser.parse_args()


def parse(text: str) -> hardware.Topology:
    """Of "v5p:4x4x4", "h200x8", or "2*v5e:16x16" for slices."""
    slices, star, one = text.rpartition("*")
    if star and not slices.isdigit():
        raise ConfigError(f"topology {text!r}: expected a number of slices before the *")
    return hardware.parse(one, int(slices or 1))


def meshes(config, topology: hardware.Topology) -> Iterator:
    """Configs with the meshes to try, fewest fsdp first, which replicate most."""
    count = topology.devices
    for fsdp in (2**i for i in range(count.bit_length())):
        if (count // topology.slices) % fsdp == 0:
            made = config.copy_and_resolve_references()
            made.train.global_batch = max(made.train.global_batch, count)
            made.mesh.update(data=-1, fsdp=fsdp, tensor=1, dcn=topology.slices)
            yield made


def best(config, traced: dict, topology: hardware.Topology, compiles=False) -> plan.Plan:
    """The plan of the first mesh that fits, or of the last one tried; traced by platform."""
    made = None
    for laid in meshes(config, topology):
        try:
            made = shapes.analyse(laid, traced[topology.chip.platform], topology)
        except ConfigError:
            if made is None:
                raise
            break  # more fsdp than an array divides by
        if made.fits:
            break
    if not compiles or not made.fits:
        return made
    devices = hardware.compiler(topology)
    if devices is None:
        raise ConfigError(f"there is no compiler for {topology} here")
    return compiled.compile_for(laid, topology, devices)


def first_fit(config, traced: dict, chip: str) -> plan.Plan | None:
    """The smallest slice, or number of GPUs, that fits a config."""
    names = [f"{chip}:{one}" for one in hardware.SLICES.get(chip, ())]
    for name in names or [f"{chip}x{count}" for count in GPU_COUNTS]:
        made = best(config, traced, hardware.parse(name))
        if made.fits:
            return made
    return None


HEAD = (
    "config", "devices", "mesh", "batch", "GiB per device", "TFLOP per step and device",
    "collectives, GB", "s per step", "images/s", "known by",
)  # fmt: skip


def row(made: plan.Plan) -> list[str]:
    """A line of the table; times are of a step whose collectives hide behind computing."""
    axes = " x ".join(f"{axis} {size}" for axis, size in made.mesh.items() if size > 1)
    cut = f" in {made.micro_batches}" if made.micro_batches > 1 else ""
    memory = f"{made.needed / 2**30:.1f} of {made.limit / 2**30:.1f}"
    start = [made.name, made.where, axes or "1", f"{made.batch}{cut}", memory]
    if not made.fits:
        return [*start, *["-"] * 3, "does not fit", made.how.removesuffix(" for")]
    sent = sum(one.bytes for one in made.traffic) / 1e9
    seconds = max(made.seconds())
    figures = [f"{made.flops / 1e12:.1f}", f"{sent:.1f}", f"{seconds:.3g}"]
    return [*start, *figures, f"{made.batch / seconds:.0f}", made.how.removesuffix(" for")]


def smallest_table(smallest: dict) -> str:
    """The smallest slice of every chip that fits every config, by shape analysis."""
    rows = [
        [
            name,
            *(f"{one.where} ({one.needed / 2**30:.0f} GiB)" if one else "-" for one in of.values()),
        ]
        for name, of in smallest.items()
    ]
    return table(["shape analysis: smallest that fits", *hardware.CHIPS], rows)


def table(head, rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def values(made: plan.Plan) -> dict:
    """A plan as JSON values."""
    compute, sending = made.seconds()
    more = {"fits": made.fits, "compute_seconds": compute, "collective_seconds": sending}
    traffic = [one._asdict() for one in made.traffic]
    return made._asdict() | {"chip": made.chip._asdict(), "traffic": traffic} | more


if __name__ == "__main__":
    main()
