"""What one run of a compiled program costs a device, read from its HLO text.

The compiler's own cost analysis counts the body of a loop once. Here bodies are multiplied by their
trip counts, and what fusions and asynchronous pairs wrap is found. Shapes are those of one device.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from gigatok_jax.planning import flops
from gigatok_jax.planning.hlo_text import Computation, Instruction, Module, Shape, groups, parse

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Transfer(NamedTuple):
    """One collective instruction."""

    kind: str  # of KINDS
    shapes: tuple[Shape, ...]  # operands, or results of an all-gather; several where combined
    bytes: int  # of `shapes`, on one device in one execution
    times: int  # executions in one run of the program
    groups: tuple[tuple[int, ...], ...]  # devices that take part together; (source, target) pairs
    op_name: str  # of the operation that it was made for, or of what calls it

    @property
    def group_size(self) -> int:
        return len(self.groups[0])


class Collective(NamedTuple):
    bytes: int  # of all executions, on one device
    count: int  # executions


class Costs(NamedTuple):
    flops: int  # 2 per multiply-add of matrix products and convolutions, on one device
    collectives: dict[str, Collective]  # by kind; those that do not occur are not there
    unknown_loops: tuple[str, ...]  # op_names of loops without a trip count, which count once


def costs(text: str) -> Costs:
    """FLOPs and traffic of one run of a program on one device.

    Of a conditional the branch with the most FLOPs counts. FLOPs of a convolution are 2 x output
    elements x taps x input features: taps in the padding count, those in holes of a dilation do
    not, so that a gradient counts as its forward pass does. Products that became calls of cuBLAS
    and cuDNN count, kernels in Pallas or Triton do not.

    Args:
        text: `compiled.as_text()`.
    """
    done = walk(text)
    totals = {}
    for kind in KINDS:
        own = [one for one in done.transfers if one.kind == kind]
        if own:
            total = sum(one.bytes * one.times for one in own)
            totals[kind] = Collective(total, sum(one.times for one in own))
    return Costs(done.flops, totals, done.unknown_loops)


def collectives(text: str) -> list[Transfer]:
    """Every collective instruction that a run of the program reaches."""
    return list(walk(text).transfers)


def largest(text: str, kind: str) -> Transfer | None:
    """The collective of a kind with the most bytes in one execution; None without one."""
    own = [one for one in collectives(text) if one.kind == kind]
    return max(own, key=lambda one: one.bytes, default=None)


# A computation and what it calls.


class Work(NamedTuple):
    """What running something once comes to, as `Costs` with every collective by itself."""

    flops: int = 0
    transfers: tuple[Transfer, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    def times(self, n: int) -> "Work":
        transfers = tuple(one._replace(times=one.times * n) for one in self.transfers)
        return Work(self.flops * n, transfers, self.unknown_loops)

    def weight(self) -> tuple[int, int]:
        return self.flops, sum(one.bytes * one.times for one in self.transfers)


def _sum(parts: list[Work]) -> Work:
    transfers = tuple(one for part in parts for one in part.transfers)
    loops = tuple(one for part in parts for one in part.unknown_loops)
    return Work(sum(part.flops for part in parts), transfers, loops)


class _Frame(NamedTuple):
    """A computation where it is called."""

    module: Module
    computation: Computation
    argument: Callable  # (parameter, element of it | None) -> what is known of it
    op_name: str  # of the caller

    def call(self, name: str, one: Instruction) -> "_Frame":
        def argument(number, element):
            known = number < len(one.operands)
            return _value(self, one.operands[number], element) if known else None

        computation = self.module.computations[name]
        return _Frame(self.module, computation, argument, one.op_name or self.op_name)


def walk(text: str) -> Work:
    """All that a run of the program reaches; `costs` sums it up."""
    module = parse(text)
    entry = module.computations[module.entry]
    return _frame_costs(_Frame(module, entry, lambda number, element: None, ""))


def _frame_costs(frame: _Frame) -> Work:
    return _sum([_costs(frame, one) for one in frame.computation.instructions.values()])


def _costs(frame: _Frame, one: Instruction) -> Work:
    kind = one.opcode.removesuffix("-start")  # of asynchronous pairs; what ends one is free
    if kind in KINDS:
        return Work(transfers=() if _goes_on(one) else (_transfer(frame, one, kind),))
    if one.opcode == "send" and "megascale" in one.rest:
        return Work(transfers=(_between_slices(frame, one),))
    if one.opcode in flops.OPCODES:
        return Work(flops=flops.OPCODES[one.opcode](frame.computation, one))
    if one.opcode == "while":
        return _loop(frame, one)
    if one.opcode == "conditional":
        attributes = ("branch_computations", "true_computation", "false_computation")
        names = [name for attribute in attributes for name in one.computations(attribute)]
        return max((_frame_costs(frame.call(n, one)) for n in names), key=Work.weight)
    attribute = {"fusion": "calls", "async": "calls", "call": "to_apply"}.get(kind)
    called = one.computations(attribute) if attribute else []
    return _scattered(called, _sum([_frame_costs(frame.call(n, one)) for n in called]))


def _scattered(called: list[str], done: Work) -> Work:
    """The TPU's fusion of a sum and the slice that each device keeps is a reduce-scatter."""
    if not any(name.startswith("all-reduce-scatter") for name in called):
        return done
    made = tuple(one._replace(kind="reduce-scatter") for one in done.transfers)
    return done._replace(transfers=made)


def _goes_on(one: Instruction) -> bool:
    """Whether a fusion of the TPU only goes on with a collective that an earlier one began."""
    match = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', one.rest)
    return match is not None and int(match[1]) >= 0


def _between_slices(frame: _Frame, one: Instruction) -> Transfer:
    """Of TPU slices: a host sends its device's part to the same place in other slices."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)[1]
    kind = kind.lower().replace("_", "-")
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', one.rest)[1]
    ranges = (part.split(":") for part in target.split(","))
    slices = sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)
    own = frame.module.devices  # of one slice
    together = tuple(tuple(i + own * j for j in range(slices)) for i in range(own))
    (shape, *_) = frame.computation.operand_shapes(one)
    shape = _widened(shape, 0, slices) if kind == "all-gather" else shape
    kind = kind if kind in KINDS else "collective-permute"
    return Transfer(kind, (shape,), shape.bytes, 1, together, one.op_name or frame.op_name)


def _transfer(frame: _Frame, one: Instruction, kind: str) -> Transfer:
    together = groups(one.rest, frame.module.devices)
    shapes = frame.computation.operand_shapes(one)
    if kind == "all-gather":
        (axis,) = one.numbers("dimensions")
        shapes = tuple(_widened(shape, axis, len(together[0])) for shape in shapes)
    total = sum(shape.bytes for shape in shapes)
    return Transfer(kind, shapes, total, 1, together, one.op_name or frame.op_name)


def _widened(shape: Shape, axis: int, factor: int) -> Shape:
    dims = list(shape.dims)
    dims[axis] *= factor
    return shape._replace(dims=tuple(dims))


# Loops.


def _loop(frame: _Frame, one: Instruction) -> Work:
    """A loop's body, and condition, times its trips."""
    body, condition = (frame.call(one.computations(name)[0], one) for name in ("body", "condition"))
    moving = body._replace(argument=_carried)

    def constant(number, element):
        """What the loop leaves as it was."""
        if element is None or _value(moving, body.computation.root, element) != (0, element):
            return None
        return _value(frame, one.operands[0], element)

    def known(number, element):
        return constant(number, element) or _carried(number, element)

    parts = [part._replace(argument=constant) for part in (body, condition)]
    done = _sum([_frame_costs(part) for part in parts])
    trips = _trips(frame, one, *(part._replace(argument=known) for part in parts))
    if trips is None:
        return done._replace(unknown_loops=(*done.unknown_loops, one.op_name or one.name))
    return done.times(trips)


def _trips(frame: _Frame, one: Instruction, body: _Frame, condition: _Frame) -> int | None:
    """How often a loop runs: as the compiler noted, or from its condition's comparison."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest):
        return int(match[1])

    def course(side):
        """First value and growth in a trip of one side of the comparison."""
        if side is None or side.carried is None:
            return side and (side.offset, 0)
        start = _value(frame, one.operands[0], side.carried)
        end = _value(body, body.computation.root, side.carried)
        known = start and end and start.carried is None and end.carried == side.carried
        return (start.offset + side.offset, end.offset) if known else None

    direction, *sides = _comparison(condition) or ("", None, None)
    left, right = map(course, sides)
    if left is None or right is None:
        return None
    return _count(direction, right[0] - left[0], left[1] - right[1])


def _count(direction: str, distance: int, step: int) -> int | None:
    """Trips until a side that gains `step` in each has made up the distance to the other."""
    if not step or (direction in ("LT", "LE", "GT", "GE") and (direction[0] == "L") != (step > 0)):
        return None
    if direction in ("LT", "GT", "NE"):
        return max(0, -(-distance // step))
    return max(0, distance // step + 1) if direction in ("LE", "GE") else None


class _Affine(NamedTuple):
    """An integer: `offset` more than element `carried` of what a loop carries, or than 0."""

    offset: int
    carried: int | None = None


def _carried(number: int, element: int | None) -> _Affine | None:
    return None if element is None else _Affine(0, element)


def _comparison(frame: _Frame) -> tuple | None:
    """Direction and sides of the comparison that a computation ends in."""
    one = frame.computation.instructions[frame.computation.root]
    if one.opcode in _CALLS:
        return _comparison(frame.call(one.computations(_CALLS[one.opcode])[0], one))
    match = re.search(r"direction=(\w+)", one.rest)
    if one.opcode != "compare" or not match:
        return None
    return match[1], *(_value(frame, name, None) for name in one.operands)


_CALLS = {"fusion": "calls", "call": "to_apply"}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


def _value(frame: _Frame, name: str, element: int | None) -> _Affine | None:
    """What the text says of an integer, or of an element of a tuple; None is nothing."""
    one = frame.computation.instructions[name]
    if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.literal):
        return _Affine(int(one.literal))
    if one.opcode in _SAME:
        return _value(frame, one.operands[0], element)
    if one.opcode == "get-tuple-element":
        return _value(frame, one.operands[0], one.numbers("index")[0])
    if one.opcode == "tuple" and element is not None:
        return _value(frame, one.operands[element], None)
    if one.opcode == "parameter":
        return frame.argument(int(one.literal), element)
    if one.opcode in _CALLS:
        called = frame.call(one.computations(_CALLS[one.opcode])[0], one)
        return _value(called, called.computation.root, element)
    if one.opcode in ("add", "subtract"):
        return _added(*(_value(frame, operand, None) for operand in one.operands), one.opcode)
    return None


def _added(a: _Affine | None, b: _Affine | None, opcode: str) -> _Affine | None:
    if a is None or b is None:
        return None
    if opcode == "subtract":
        return _Affine(a.offset - b.offset, a.carried) if b.carried is None else None
    if a.carried is not None and b.carried is not None:
        return None
    return _Affine(a.offset + b.offset, b.carried if a.carried is None else a.carried)
