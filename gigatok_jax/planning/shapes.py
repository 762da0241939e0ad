"""Memory that a traced step holds at once, from its equations: what there is without a compiler.

An array lives from the equation that makes it to the last one that needs it. What is cheap to make
again from less (casts, sums, activations of one array) is not kept but its sources are, since
compilers fuse it into whatever uses it.
"""

from typing import Any

from jax.extend import core

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
