"""Plans by shape analysis: from shapes, shardings and traced equations, without a compiler.

Activations are counted from the equations. An array lives from the equation that makes it to the
last equation that needs it. Arrays that are cheap to compute from smaller arrays (casts, sums,
activations of one array) are not counted but their sources are, since compilers fuse them.
"""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ml_collections import ConfigDict

from gigatok_jax import parallel
from gigatok_jax.planning import flops, hardware, plan

TRACED_BATCH = 256  # large, so that costs which do not grow with the batch are negligible
CNN_ON_TPU = (
    2.1  # ratio of compiled temporaries to counted ones: XL-XXL on v5p:2x2x2, commit d447d54
)


class Traced(NamedTuple):
    """Record of the shapes and costs of a config's traced training step, for any mesh."""

    state: Any  # shapes of the training state
    frozen: Any  # shapes of the parameters of frozen networks
    flops: float  # per image
    activations: float  # bytes per image


def trace(config: ConfigDict, platform: str) -> Traced:
    """Traces the training step of a config for one device, which need not exist, in seconds.

    Args:
        config: of a run that trains.
        platform: "cpu", "gpu" or "tpu"; attention and kernels depend on it.
    """
    config = config.copy_and_resolve_references()
    config.train.global_batch, config.train.micro_batches = TRACED_BATCH, 1
    mesh = abstract_mesh(dict.fromkeys(parallel.AXES, 1), platform)
    program = plan.program_of(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        step = program.make_step(1).trace(
            program.abstract, program.batch, program.frozen, *program.phase
        )
    products, held = flops.of_jaxpr(step.jaxpr), peak(step.jaxpr)
    if platform == "tpu" and config.model.get("stem") == "cnn":
        held *= CNN_ON_TPU
    return Traced(program.abstract, program.frozen, products / TRACED_BATCH, held / TRACED_BATCH)


def abstract_mesh(sizes: dict[str, int], platform: str = "cpu") -> AbstractMesh:
    """Makes a mesh with axes of given sizes, by name, that has no devices."""
    device = AbstractDevice(platform, None, platform)
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, abstract_device=device
    )


def analyse(config: ConfigDict, traced: Traced, topology: hardware.Topology) -> plan.Plan:
    """Estimates the plan of a training step from its shapes, without compiling.

    The number of micro-batches is doubled until the step fits or the batch divides no further.

    Args:
        config: of a run that trains; its mesh spans the topology.
        traced: from `trace` of that config.
        topology: devices to plan for.

    Raises:
        ConfigError: the mesh does not fit the topology, the batch or the arrays.
    """
    sizes = parallel.axis_sizes(config.mesh, topology.devices)
    mesh = abstract_mesh(sizes)
    batch, parts = config.train.global_batch, config.train.micro_batches
    parallel.check_batch(mesh, batch, parts)
    state = placed(config, traced, mesh)
    limit = topology.limit
    share = batch // parallel.batch_shards(mesh)
    while True:
        memory = _shape_memory(state, traced, share / parts, parts)
        if plan.fits(memory, limit, plan.ANALYSED) or share % (2 * parts):
            break
        parts *= 2
    return plan.Plan(
        config.name, str(topology), plan.ANALYSED, topology.chip, sizes, batch, parts, memory,
        limit, int(traced.flops * batch / topology.devices),
        _shape_traffic(config.train, state, mesh, topology, parts),
    )  # fmt: skip


def placed(config: ConfigDict, traced: Traced, mesh: AbstractMesh) -> Any:
    """Returns the shapes of a training state, with their shardings on a mesh."""
    return parallel.with_shardings(
        traced.state, parallel.state_shardings(traced.state, mesh, config)
    )


def _trained(state: Any) -> list:
    """Lists the shapes of all trained parameters of a training state, discriminator included."""
    return jax.tree.leaves((state.params, getattr(state, "discriminator", None)))


def _shape_memory(state, traced: Traced, images: float, parts: int) -> dict[str, int]:
    gradients = parallel.bytes_per_device(_trained(state))
    return {
        "state": parallel.bytes_per_device(state),
        "frozen": parallel.bytes_per_device(traced.frozen),
        "gradients": gradients
        * (1 if parts == 1 else 2),  # with micro-batches, a sum and its next term
        "activations": int(traced.activations * images),
    }


def _shape_traffic(
    train, state, mesh, topology: hardware.Topology, parts: int
) -> tuple[plan.Traffic, ...]:
    """Estimates the collectives of a training step: gathers of parameters and sums of gradients.

    Both are in the compute dtype, as the TPU's compiler sends them. Collectives over the mesh axis
    `tensor` cannot be seen from shapes.
    """
    groups, total = _groups(mesh.shape, topology.neighbours), collections.Counter()
    gathers = 2 if train.remat == "none" else 3  # forwards, again, backwards
    for leaf in _trained(state):
        shard = parallel.bytes_per_device([leaf]) * jnp.dtype(train.dtype).itemsize // 4
        divided = "fsdp" in leaf.sharding.spec and mesh.shape["fsdp"] > 1
        if divided:
            whole = shard * mesh.shape["fsdp"]
            total["all-gather", groups["fsdp"]] += parts * gathers * whole
            total["reduce-scatter", groups["fsdp"]] += parts * whole
        others = groups["data"] if divided else groups["data+fsdp"]
        if others != (1, 1):
            total["all-reduce", others] += parts * shard
    return tuple(plan.Traffic(kind, count, *group) for (kind, group), count in total.items())


def _groups(shape, neighbours: int) -> dict[str, tuple[int, int]]:
    """Returns how groups along mesh axes lie, by axis: `near` and `far` of `plan.Traffic`.

    Devices are in the order of the axes; "data+fsdp" is both axes together.
    """
    forms, stride = {}, 1
    for axis in reversed(parallel.AXES):
        near = math.gcd(shape[axis], max(1, neighbours // stride))
        forms[axis] = (near, shape[axis] // near)
        stride *= shape[axis]
    (a, b), (c, d) = forms["data"], forms["fsdp"]
    return forms | {"data+fsdp": (a * c, b * d)}


# Activations of a traced step.

# Elementwise operations and changes of shape, which compilers fuse into their users.
_FUSED = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy",
    "copy_p", "cos", "div", "eq", "erf", "exp", "exp2", "expand_dims", "ge", "gt", "integer_pow",
    "iota", "is_finite", "layout_constraint", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "name", "ne", "neg", "not", "or", "pow", "reduce_precision", "reshape", "rev", "round",
    "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "slice", "sqrt", "square", "squeeze",
    "stop_gradient", "sub", "tanh", "transpose", "xor",
}  # fmt: skip
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip


def peak(jaxpr: Any) -> int:
    """Estimates the most bytes that results of a traced program's equations hold at once.

    Arguments are not counted. Bytes are of all devices together. Compilers reorder, pad and share
    buffers; tests/test_plan.py holds the measured error.

    Args:
        jaxpr: from `jax.make_jaxpr(function)(*shapes)` or `jax.jit(function).trace(*shapes)`.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    program = _Flat()
    results = program.add(jaxpr, [None] * len(jaxpr.invars))
    return program.peak(results)


class _Flat:
    """Traced program in which calls and unrolled loops are inlined, to find its peak memory.

    A value is a number, its place in `sizes`; an argument or constant is None, and a stack of an
    unrolled loop is a list of values.
    """

    def __init__(self):
        self.equations, self.sizes = [], []

    def add(self, jaxpr, arguments: list) -> list:
        """Appends the equations of a jaxpr that is called with `arguments`; returns its results."""
        names = dict(zip(jaxpr.invars, arguments, strict=True))
        for equation in jaxpr.eqns:
            inputs = [
                None if isinstance(x, core.Literal) else names.get(x) for x in equation.invars
            ]
            names.update(zip(equation.outvars, self._results(equation, inputs), strict=True))
        return [None if isinstance(x, core.Literal) else names.get(x) for x in jaxpr.outvars]

    def _results(self, equation, inputs: list) -> list:
        """Appends an equation, or the equations that it calls; returns its results."""
        if inner := _called(equation):
            return self.add(inner, inputs)
        params = equation.params
        if equation.primitive.name == "scan" and params["unroll"] == params["length"]:
            return self._unrolled(equation, inputs)
        outputs = [self._new(x.aval) for x in equation.outvars]
        self.equations.append((equation, _pieces(inputs), outputs))
        return outputs

    def _unrolled(self, equation, inputs: list) -> list:
        """Appends the equations of all turns of a loop; returns its results, stacks as lists."""
        body, turns = equation.params["jaxpr"].jaxpr, equation.params["length"]
        carried = _alike(equation.outvars, body.outvars)
        constant = _alike(equation.invars, body.invars) - carried
        constants, carry = inputs[:constant], inputs[constant : constant + carried]
        stacks, pieces = inputs[constant + carried :], []
        for turn in reversed(range(turns)) if equation.params["reverse"] else range(turns):
            own = [x[turn] if isinstance(x, list) else x for x in stacks]
            out = self.add(body, [*constants, *carry, *own])
            carry = out[:carried]
            pieces.append(out[carried:])
        if equation.params["reverse"]:
            pieces.reverse()
        return [*carry, *(list(stack) for stack in zip(*pieces, strict=True))]

    def _new(self, aval) -> int:
        dtype = getattr(aval, "dtype", None)
        self.sizes.append(0 if dtype is None else aval.size * getattr(dtype, "itemsize", 0))
        return len(self.sizes) - 1

    def peak(self, results: list) -> int:
        """Returns the most bytes that the program's values hold at once if it returns `results`."""
        kept, last = self._lives(results)
        dying = [[] for _ in range(len(self.equations) + 1)]
        for value, end in last.items():
            dying[end].append(value)
        live = most = 0
        for step, (equation, _, outputs) in enumerate(self.equations):
            freed = sum(self.sizes[value] for value in dying[step])
            born = sum(self.sizes[value] for value in outputs if value in kept)
            in_place = freed if equation.primitive.name in _FUSED else 0
            most = max(most, live + born - in_place + _inside(equation))
            unused = sum(self.sizes[v] for v in outputs if v in kept and v not in last)
            live += born - freed - unused
        return max(most, live)

    def _lives(self, results: list) -> tuple[set, dict]:
        """Returns the set of values kept in memory, and by value the last equation needing it."""
        sources, kept, last = {None: frozenset()}, set(), {}
        for step, (equation, inputs, outputs) in enumerate(self.equations):
            needed = frozenset().union(*(sources[value] for value in inputs))
            last.update(dict.fromkeys(needed, step))
            recomputed = equation.primitive.name in _FUSED and self._total(outputs) >= self._total(
                needed
            )
            for value in outputs:
                sources[value] = needed if recomputed else frozenset([value])
            if not recomputed:
                kept.update(outputs)
        for value in _pieces(results):
            last.update(dict.fromkeys(sources[value], len(self.equations)))
        return kept, last

    def _total(self, values) -> int:
        return sum(self.sizes[value] for value in values)


def _called(equation) -> Any | None:
    """Returns the jaxpr of an equation that only calls a jaxpr; None for other equations."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = next(
        (p for p in equation.params.values() if isinstance(p, core.ClosedJaxpr | core.Jaxpr)), None
    )
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


def _pieces(values: list) -> list:
    """Returns a list of values with each stack of an unrolled loop replaced by its pieces."""
    return [piece for x in values for piece in (x if isinstance(x, list) else [x])]


def _alike(outside: list, inside: list) -> int:
    """Counts a loop's arrays that its body sees whole, rather than one turn's slice of them."""
    pairs = zip(outside, inside, strict=True)
    return sum(x.aval.shape == y.aval.shape for x, y in pairs)


def _inside(equation) -> int:
    """Returns the most bytes that the body of a loop or branch holds at once, arguments apart.

    The number is 0 for other equations.
    """
    if equation.primitive.name not in ("scan", "while", "cond"):
        return 0
    bodies = equation.params.get("branches") or [
        equation.params[name] for name in ("jaxpr", "body_jaxpr") if name in equation.params
    ]
    return max(peak(body) for body in bodies)
