"""Plans from shapes alone: shardings and the traced equations, without any compiler."""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gigatok_jax import parallel
from gigatok_jax.planning import flops, hardware, plan

TRACED_BATCH = 256  # large, so that what does not grow with it is lost beside what does
CNN_ON_TPU = 2.1  # compiled temporaries to those counted: XL-XXL on v5p:2x2x2, commit d447d54


class Traced(NamedTuple):
    """What a config's step is on any mesh."""

    state: Any  # shapes
    frozen: Any
    flops: float  # of an image
    activations: float  # bytes of an image


def trace(config, platform: str) -> Traced:
    """Traces the step of a config on one device that need not be there; seconds for any size.

    Args:
        config: of the run.
        platform: "cpu", "gpu" or "tpu", on which attention and kernels depend.
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
    """A mesh of devices that nobody asks for."""
    device = AbstractDevice(platform, None, platform)
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, abstract_device=device
    )


def analyse(config, traced: Traced, topology: hardware.Topology) -> plan.Plan:
    """Plan from shapes alone.

    Args:
        config: of the run; its mesh is laid over the topology.
        traced: from `trace` of that config.
        topology: to plan for.

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


def placed(config, traced: Traced, mesh) -> Any:
    """Shapes of a state with their shardings on a mesh."""
    return parallel.with_shardings(
        traced.state, parallel.state_shardings(traced.state, mesh, config)
    )


def _trained(state) -> list:
    """Shapes of all trained parameters."""
    judge = getattr(state, "discriminator", None)
    return jax.tree.leaves((state.params, judge))


def _shape_memory(state, traced: Traced, images: float, parts: int) -> dict[str, int]:
    gradients = parallel.bytes_per_device(_trained(state))
    return {
        "state": parallel.bytes_per_device(state),
        "frozen": parallel.bytes_per_device(traced.frozen),
        "gradients": gradients * (1 if parts == 1 else 2),  # a sum, and those that are added
        "activations": int(traced.activations * images),
    }


def _shape_traffic(
    train, state, mesh, topology: hardware.Topology, parts: int
) -> tuple[plan.Traffic, ...]:
    """Gathered parameters and summed gradients, both in the type that is computed with, as the
    TPU's compiler sends them; what `tensor` sends is not in the shapes."""
    groups, total = _groups(mesh.shape, topology.neighbours), collections.Counter()
    gathers = 2 if train.remat == "none" else 3  # forwards, again, backwards
    for leaf in _trained(state):
        own = parallel.bytes_per_device([leaf]) * jnp.dtype(train.dtype).itemsize // 4
        divided = "fsdp" in leaf.sharding.spec and mesh.shape["fsdp"] > 1
        if divided:
            whole = own * mesh.shape["fsdp"]
            total["all-gather", groups["fsdp"]] += parts * gathers * whole
            total["reduce-scatter", groups["fsdp"]] += parts * whole
        others = groups["data"] if divided else groups["data+fsdp"]
        if others != (1, 1):
            total["all-reduce", others] += parts * own
    return tuple(plan.Traffic(kind, count, *group) for (kind, group), count in total.items())


def _groups(shape, neighbours: int) -> dict[str, tuple[int, int]]:
    """Near and far parts of the groups along axes; devices lie in the order of the axes."""
    made, stride = {}, 1
    for axis in reversed(parallel.AXES):
        near = math.gcd(shape[axis], max(1, neighbours // stride))
        made[axis] = (near, shape[axis] // near)
        stride *= shape[axis]
    (a, b), (c, d) = made["data"], made["fsdp"]
    return made | {"data+fsdp": (a * c, b * d)}


# Memory of a traced step.

# Elementwise or only another shape: fused into their users.
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
    """Most bytes of intermediate results and results that are there at once, arguments not counted.

    Shapes are the traced ones, so of all devices together. An estimate: compilers choose an order
    of their own, pad, and share buffers; see tests/test_plan.py for how far off it was.

    Args:
        jaxpr: from `jax.make_jaxpr(function)(*shapes)` or `jax.jit(function).trace(*shapes)`.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    program = _Flat()
    results = program.add(jaxpr, [None] * len(jaxpr.invars))
    return program.peak(results)


class _Flat:
    """A program with its calls, and loops that are unrolled, written out.

    Values are numbers, arguments and constants None, what an unrolled loop stacks a list of them.
    """

    def __init__(self):
        self.equations, self.sizes = [], []

    def add(self, jaxpr, arguments: list) -> list:
        """Appends the equations of a jaxpr of known arguments; its results."""
        names = dict(zip(jaxpr.invars, arguments, strict=True))
        for one in jaxpr.eqns:
            given = [None if isinstance(x, core.Literal) else names.get(x) for x in one.invars]
            names.update(zip(one.outvars, self._results(one, given), strict=True))
        return [None if isinstance(x, core.Literal) else names.get(x) for x in jaxpr.outvars]

    def _results(self, one, given: list) -> list:
        """Appends an equation, or what it stands for."""
        if inner := _called(one):
            return self.add(inner, given)
        if one.primitive.name == "scan" and one.params["unroll"] == one.params["length"]:
            return self._unrolled(one, given)
        made = [self._new(x.aval) for x in one.outvars]
        self.equations.append((one, _pieces(given), made))
        return made

    def _unrolled(self, one, given: list) -> list:
        """A loop's turns one after the other; what they stack stays in pieces, a list."""
        body, turns = one.params["jaxpr"].jaxpr, one.params["length"]
        carried = _alike(one.outvars, body.outvars)
        constant = _alike(one.invars, body.invars) - carried
        constants, carry = given[:constant], given[constant : constant + carried]
        stacks, pieces = given[constant + carried :], []
        for turn in reversed(range(turns)) if one.params["reverse"] else range(turns):
            own = [x[turn] if isinstance(x, list) else x for x in stacks]
            out = self.add(body, [*constants, *carry, *own])
            carry = out[:carried]
            pieces.append(out[carried:])
        if one.params["reverse"]:
            pieces.reverse()
        return [*carry, *(list(stack) for stack in zip(*pieces, strict=True))]

    def _new(self, aval) -> int:
        self.sizes.append(_bytes(aval))
        return len(self.sizes) - 1

    def peak(self, results: list) -> int:
        kept, last = self._lives(results)
        dying = [[] for _ in range(len(self.equations) + 1)]
        for value, end in last.items():
            dying[end].append(value)
        live = most = 0
        for step, (one, _, made) in enumerate(self.equations):
            freed = sum(self.sizes[value] for value in dying[step])
            born = sum(self.sizes[value] for value in made if value in kept)
            in_place = freed if one.primitive.name in _FUSED else 0
            most = max(most, live + born - in_place + _inside(one))
            unused = sum(self.sizes[v] for v in made if v in kept and v not in last)
            live += born - freed - unused
        return max(most, live)

    def _lives(self, results: list) -> tuple[set, dict]:
        """Values that are kept, and the last equation that needs each."""
        sources, kept, last = {None: frozenset()}, set(), {}
        for step, (one, given, made) in enumerate(self.equations):
            needed = frozenset().union(*(sources[value] for value in given))
            last.update(dict.fromkeys(needed, step))
            again = one.primitive.name in _FUSED and self._total(made) >= self._total(needed)
            for value in made:
                sources[value] = needed if again else frozenset([value])
            if not again:
                kept.update(made)
        for value in _pieces(results):
            last.update(dict.fromkeys(sources[value], len(self.equations)))
        return kept, last

    def _total(self, values) -> int:
        return sum(self.sizes[value] for value in values)


def _called(one) -> Any | None:
    """The jaxpr of a call that happens once, just here."""
    if one.primitive.name not in _CALLS:
        return None
    inner = next(
        (p for p in one.params.values() if isinstance(p, core.ClosedJaxpr | core.Jaxpr)), None
    )
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


def _pieces(values: list) -> list:
    """With those of every stack in its place."""
    return [piece for x in values for piece in (x if isinstance(x, list) else [x])]


def _alike(outside: list, inside: list) -> int:
    """Arrays of a loop that its body sees whole; of the others it sees one turn's."""
    pairs = zip(outside, inside, strict=True)
    return sum(x.aval.shape == y.aval.shape for x, y in pairs)


def _inside(one) -> int:
    """What a loop or a branch holds while it runs, besides its arguments and results."""
    if one.primitive.name not in ("scan", "while", "cond"):
        return 0
    parts = one.params.get("branches") or [
        one.params[name] for name in ("jaxpr", "body_jaxpr") if name in one.params
    ]
    return max(peak(part) for part in parts)


def _bytes(aval) -> int:
    dtype = getattr(aval, "dtype", None)
    return aval.size * getattr(dtype, "itemsize", 0) if dtype is not None else 0
