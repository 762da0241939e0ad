"""What `--dry_run` prints: parameters, placement, and the plan of a training step."""

import jax

from gigatok_jax import parallel
from gigatok_jax.models import parameters
from gigatok_jax.planning import compiled, hardware, plan, shapes

SMALL = 1e10  # FLOPs of a step that a CPU compiles in seconds
WITHOUT_GPU = "XLA's attention in the place of cuDNN's, whose working memory only a GPU tells"
INSTALL = {  # what brings the compiler of a platform
    "tpu": 'no TPU compiler is here: pip install "jax[tpu]" in an environment of its own has one',
    "gpu": (
        f"no GPU compiler is here: pip install jax-cuda13-plugin=={jax.__version__}, in an"
        " environment of its own, has one that needs no GPU"
    ),
}


def show(config) -> None:
    """Prints a config's parameters and, if it trains, its plan for `mesh.topology` or for the
    devices that are here.

    Raises:
        ConfigError: model, mesh, batch or topology cannot be.
    """
    if "topology" not in config.get("mesh", {}):
        print(parameters.report(config))
        return
    topology, table = _topology(config.mesh), parameters.report(config)
    traced = shapes.trace(config, topology.chip.platform)
    analysed = shapes.analyse(config, traced, topology)  # what is wrong is said before all else
    print(table, *_placement(config, traced, topology), *lines(analysed), sep="\n", flush=True)
    devices, reason = _compiler(topology, analysed.flops, bool(config.mesh.topology))
    if devices is None:
        print(reason)
    else:
        print(*lines(compiled.compile_for(config, topology, devices)), sep="\n")
        if config.mesh.topology and topology.chip.platform == "gpu":
            print(f"compiled for {topology}: {WITHOUT_GPU}")


def _topology(mesh) -> hardware.Topology:
    if not mesh.topology:
        return hardware.here()
    jax.config.update("jax_platforms", "cpu")  # what is here is left alone
    return hardware.parse(mesh.topology, mesh.dcn)


def _compiler(topology: hardware.Topology, flops: float, planned: bool) -> tuple[list | None, str]:
    """Devices to compile for, or why not."""
    platform = topology.chip.platform
    if planned:
        return hardware.compiler(topology), INSTALL[platform]
    if platform == "cpu" and flops > SMALL:
        return None, (
            "not compiled for this CPU, which takes minutes: name hardware with"
            " --config.mesh.topology=v5p:2x2x2 or h200x8"
        )
    return jax.devices(), ""


def _placement(config, traced: shapes.Traced, topology: hardware.Topology) -> list[str]:
    sizes = parallel.axis_sizes(config.mesh, topology.devices)
    axes = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    state = shapes.placed(config, traced, shapes.abstract_mesh(sizes))
    head = (
        "arrays of more than a million elements, the mesh axis of each dimension, MiB per device:"
    )
    return ["", f"mesh: {axes}, on {topology}", head, *parallel.placement(state), ""]


def lines(made: plan.Plan) -> list[str]:
    """A plan in words; each line says how it is known."""
    told = [_memory(made)]
    if made.flops:  # none of a program that the compiler refused
        left_out = ", those in kernels left out" if made.how == plan.COMPILED else ""
        told += [f"{made.flops:.3g} FLOPs per step and device{left_out}", _traffic(made)]
    if made.flops and made.chip.peak:
        told.append(_time(made))
    return [f"{made.how} {made.where}: {line}" for line in told]


def _memory(made: plan.Plan) -> str:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in made.memory.items())
    batch = f"batch {made.batch}, micro-batches {made.micro_batches}"
    if made.limit is None:
        return f"{_size(made.needed)} per device ({parts}), {batch}"
    verdict = "fits" if made.fits else "does not fit"
    needed = f"{_size(made.needed)} of {_size(made.limit)} per device"
    return f"{needed} ({parts}), {verdict}, {batch}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _traffic(made: plan.Plan) -> str:
    if not made.traffic:
        return "no collectives"
    kinds = dict.fromkeys(one.kind for one in made.traffic)
    sums = {kind: sum(t.bytes for t in made.traffic if t.kind == kind) for kind in kinds}
    text = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in sums.items())
    more = "; what tensor sends is not counted" if made.how == plan.ANALYSED else ""
    return f"{text} per step and device{more if made.mesh['tensor'] > 1 else ''}"


def _time(made: plan.Plan) -> str:
    compute, sending = made.seconds()
    chip, best, worst = made.chip, max(compute, sending), compute + sending
    return (
        f"about {best:.3g} s per step, {made.batch / best:.0f} images/s, if all of {sending:.3g} s"
        f" of collectives hides behind {compute:.3g} s of computing, {worst:.3g} s if none does"
        f" (assumed: {plan.UTILISATION:.0%} of {chip.peak / 1e12:.0f} TFLOP/s, links of"
        f" {chip.link / 1e9:.0f} GB/s and a network of {chip.network / 1e9:.1f} GB/s per device,"
        " filled)"
    )
