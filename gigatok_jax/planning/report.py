"""Prints what `--dry_run` shows: parameters, their placement, and the plan of a training step."""

import jax
from ml_collections import ConfigDict

from gigatok_jax import parallel
from gigatok_jax.models import parameters
from gigatok_jax.planning import compiled, hardware, plan, shapes

SMALL = 1e10  # FLOPs; a CPU compiles smaller steps in seconds
WITHOUT_GPU = "with XLA's attention, since only a GPU tells the working memory of cuDNN's"
INSTALL = {  # how to get the compiler of a platform
    "tpu": 'no TPU compiler is here: pip install "jax[tpu]" in a separate environment has one',
    "gpu": (
        f"no GPU compiler is here: pip install jax-cuda13-plugin=={jax.__version__}, in a"
        " separate environment, has one that needs no GPU"
    ),
}


def show(config: ConfigDict) -> None:
    """Prints a config's parameters and, if it trains, its plan.

    The plan is for `mesh.topology`, or else for the devices of this process.

    Raises:
        ConfigError: the model, mesh, batch or topology cannot work.
    """
    if "topology" not in config.get("mesh", {}):
        print(parameters.report(config))
        return
    topology, table = _topology(config.mesh), parameters.report(config)
    traced = shapes.trace(config, topology.chip.platform)
    analysed = shapes.analyse(config, traced, topology)  # before any output, since it may raise
    print(table, *_placement(config, traced, topology), *lines(analysed), sep="\n", flush=True)
    devices, reason = _compiler(topology, analysed.flops, bool(config.mesh.topology))
    if devices is None:
        print(reason)
    else:
        print(*lines(compiled.compile_for(config, topology, devices)), sep="\n")
        if config.mesh.topology and topology.chip.platform == "gpu":
            print(f"compiled for {topology}: {WITHOUT_GPU}")


def _topology(mesh: ConfigDict) -> hardware.Topology:
    if not mesh.topology:
        return hardware.here()
    jax.config.update("jax_platforms", "cpu")  # leaves the devices of this machine alone
    return hardware.parse(mesh.topology, mesh.dcn)


def _compiler(topology: hardware.Topology, flops: float, planned: bool) -> tuple[list | None, str]:
    """Returns the devices to compile for, or None, and the reason to print if there are none."""
    platform = topology.chip.platform
    if planned:
        return hardware.compiler(topology), INSTALL[platform]
    if platform == "cpu" and flops > SMALL:
        return None, (
            "not compiled for this CPU, which takes minutes: name hardware with"
            " --config.mesh.topology=v5p:2x2x2 or h200x8"
        )
    return jax.devices(), ""


def _placement(config: ConfigDict, traced: shapes.Traced, topology: hardware.Topology) -> list[str]:
    sizes = parallel.axis_sizes(config.mesh, topology.devices)
    axes = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    state = shapes.placed(config, traced, shapes.abstract_mesh(sizes))
    head = (
        "arrays of more than a million elements, the mesh axis of each dimension, MiB per device:"
    )
    return ["", f"mesh: {axes}, on {topology}", head, *parallel.placement(state), ""]


def lines(step: plan.Plan) -> list[str]:
    """Returns lines of text that describe a plan; each says whether it is compiled or analysed."""
    texts = [_memory(step)]
    if step.flops:  # 0 for a program that the compiler refused
        left_out = ", those in kernels left out" if step.how == plan.COMPILED else ""
        texts += [f"{step.flops:.3g} FLOPs per step and device{left_out}", _traffic(step)]
    if step.flops and step.chip.peak:
        texts.append(_time(step))
    return [f"{step.how} {step.where}: {line}" for line in texts]


def _memory(step: plan.Plan) -> str:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in step.memory.items())
    batch = f"batch {step.batch}, micro-batches {step.micro_batches}"
    if step.limit is None:
        return f"{_size(step.needed)} per device ({parts}), {batch}"
    verdict = "fits" if step.fits else "does not fit"
    needed = f"{_size(step.needed)} of {_size(step.limit)} per device"
    return f"{needed} ({parts}), {verdict}, {batch}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _traffic(step: plan.Plan) -> str:
    if not step.traffic:
        return "no collectives"
    kinds = dict.fromkeys(group.kind for group in step.traffic)
    sums = {kind: sum(t.bytes for t in step.traffic if t.kind == kind) for kind in kinds}
    text = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in sums.items())
    more = "; what tensor sends is not counted" if step.how == plan.ANALYSED else ""
    return f"{text} per step and device{more if step.mesh['tensor'] > 1 else ''}"


def _time(step: plan.Plan) -> str:
    compute, sending = step.seconds()
    chip, best, worst = step.chip, max(compute, sending), compute + sending
    return (
        f"about {best:.3g} s per step, {step.batch / best:.0f} images/s, if all of {sending:.3g} s"
        f" of collectives hides behind {compute:.3g} s of computing, {worst:.3g} s if none does"
        f" (assumed: {plan.UTILISATION:.0%} of {chip.peak / 1e12:.0f} TFLOP/s, links of"
        f" {chip.link / 1e9:.0f} GB/s and a network of {chip.network / 1e9:.1f} GB/s per device,"
        " filled)"
    )
