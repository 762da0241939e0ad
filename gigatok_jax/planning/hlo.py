"""Reads from HLO text what one run of a compiled program costs a device.

The compiler's own cost analysis counts the body of a loop once. Here bodies are multiplied by their
trip counts, and instructions inside fusions and asynchronous pairs count. Shapes are per device.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from gigatok_jax.planning import flops
from gigatok_jax.planning.hlo_text import Computation, Instruction, Module, Shape, groups, parse

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Transfer(NamedTuple):
    """Record of a collective instruction: what it transfers, among which devices, and how often."""

    kind: str  # one of KINDS
    shapes: tuple[Shape, ...]  # operands, or results of an all-gather; several where combined
    bytes: int  # of `shapes`, on one device in one execution
    times: int  # executions in one run of the program
    groups: tuple[tuple[int, ...], ...]  # devices that exchange data; or (source, target) pairs
    op_name: str  # of the traced operation, or of the caller's

    @property
    def group_size(self) -> int:
        """Number of devices in each group that exchanges data."""
        return len(self.groups[0])


class Collective(NamedTuple):
    """Record of the collectives of one kind in a program's run: numbers of bytes and executions."""

    bytes: int  # of all executions, on one device
    count: int  # executions


class Costs(NamedTuple):
    """Record of what one run of a program costs a device: FLOPs and collectives."""

    flops: int  # 2 per multiply-add of matrix products and convolutions, on one device
    collectives: dict[str, Collective]  # by kind, without kinds that do not occur
    unknown_loops: tuple[str, ...]  # op_names of loops without a trip count, which count once


def costs(text: str) -> Costs:
    """Counts the FLOPs and the traffic of one run of a program on one device.

    The branch with the most FLOPs counts for a conditional. FLOPs of a convolution are 2 x output
    elements x taps x input features: taps in the padding count, taps in holes of a dilation do not,
    so that a gradient counts as its forward pass does. Products that became calls of cuBLAS and
    cuDNN count, kernels in Pallas or Triton do not.

    Args:
        text: `compiled.as_text()`.
    """
    work = walk(text)
    totals = {}
    for kind in KINDS:
        own = [transfer for transfer in work.transfers if transfer.kind == kind]
        if own:
            total = sum(transfer.bytes * transfer.times for transfer in own)
            totals[kind] = Collective(total, sum(transfer.times for transfer in own))
    return Costs(work.flops, totals, work.unknown_loops)


def collectives(text: str) -> list[Transfer]:
    """Lists every collective instruction that a run of a program in HLO text reaches."""
    return list(walk(text).transfers)


# A computation and what it calls.


class Work(NamedTuple):
    """Record of what one run of a computation costs: FLOPs, and each collective by itself."""

    flops: int = 0
    transfers: tuple[Transfer, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    def times(self, n: int) -> "Work":
        """Returns the FLOPs and the collectives of `n` runs of the computation."""
        transfers = tuple(
            transfer._replace(times=transfer.times * n) for transfer in self.transfers
        )
        return Work(self.flops * n, transfers, self.unknown_loops)

    def weight(self) -> tuple[int, int]:
        """Returns a key to compare branches by: FLOPs, then number of bytes of collectives."""
        return self.flops, sum(transfer.bytes * transfer.times for transfer in self.transfers)


def _sum(works: list[Work]) -> Work:
    transfers = tuple(transfer for work in works for transfer in work.transfers)
    loops = tuple(loop for work in works for loop in work.unknown_loops)
    return Work(sum(work.flops for work in works), transfers, loops)


class _Frame(NamedTuple):
    """Record of a called HLO computation, with the arguments and the name of its caller."""

    module: Module
    computation: Computation
    argument: Callable  # (parameter, element of a tuple | None) -> its _Affine value | None
    op_name: str  # of the caller

    def call(self, name: str, op: Instruction) -> "_Frame":
        def argument(number, element):
            known = number < len(op.operands)
            return _value(self, op.operands[number], element) if known else None

        computation = self.module.computations[name]
        return _Frame(self.module, computation, argument, op.op_name or self.op_name)


def walk(text: str) -> Work:
    """Returns the cost of one run of a program in HLO text, with every collective that it executes.

    `costs` sums the collectives by kind.
    """
    module = parse(text)
    entry = module.computations[module.entry]
    return _frame_costs(_Frame(module, entry, lambda number, element: None, ""))


def _frame_costs(frame: _Frame) -> Work:
    return _sum([_costs(frame, op) for op in frame.computation.instructions.values()])


def _costs(frame: _Frame, op: Instruction) -> Work:
    kind = op.opcode.removesuffix("-start")  # of asynchronous pairs, whose second half is free
    if kind in KINDS:
        return Work(transfers=() if _continues(op) else (_transfer(frame, op, kind),))
    if op.opcode == "send" and "megascale" in op.rest:
        return Work(transfers=(_between_slices(frame, op),))
    if op.opcode in flops.OPCODES:
        return Work(flops=flops.OPCODES[op.opcode](frame.computation, op))
    if op.opcode == "while":
        return _loop(frame, op)
    if op.opcode == "conditional":
        attributes = ("branch_computations", "true_computation", "false_computation")
        names = [name for attribute in attributes for name in op.computations(attribute)]
        return max((_frame_costs(frame.call(n, op)) for n in names), key=Work.weight)
    attribute = {"fusion": "calls", "async": "calls", "call": "to_apply"}.get(kind)
    called = op.computations(attribute) if attribute else []
    return _scattered(called, _sum([_frame_costs(frame.call(n, op)) for n in called]))


def _scattered(called: list[str], work: Work) -> Work:
    """Returns the cost of a fusion or call, with the kind of its collectives corrected.

    The TPU's fusion of an all-reduce and a slice counts as a reduce-scatter.
    """
    if not any(name.startswith("all-reduce-scatter") for name in called):
        return work
    scattered = tuple(transfer._replace(kind="reduce-scatter") for transfer in work.transfers)
    return work._replace(transfers=scattered)


def _continues(op: Instruction) -> bool:
    """Returns whether a fusion of the TPU continues a collective that an earlier fusion began."""
    match = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', op.rest)
    return match is not None and int(match[1]) >= 0


def _between_slices(frame: _Frame, op: Instruction) -> Transfer:
    """Returns the transfer of a send between TPU slices.

    Each device exchanges data with the devices of the same place in the other slices.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)[1]
    kind = kind.lower().replace("_", "-")
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', op.rest)[1]
    ranges = (span.split(":") for span in target.split(","))
    slices = sum(int(span[-1]) - int(span[0]) + 1 for span in ranges)
    own = frame.module.devices  # of one slice
    together = tuple(tuple(i + own * j for j in range(slices)) for i in range(own))
    (shape, *_) = frame.computation.operand_shapes(op)
    shape = _widened(shape, 0, slices) if kind == "all-gather" else shape
    kind = kind if kind in KINDS else "collective-permute"
    return Transfer(kind, (shape,), shape.bytes, 1, together, op.op_name or frame.op_name)


def _transfer(frame: _Frame, op: Instruction, kind: str) -> Transfer:
    together = groups(op.rest, frame.module.devices)
    shapes = frame.computation.operand_shapes(op)
    if kind == "all-gather":
        (axis,) = op.numbers("dimensions")
        shapes = tuple(_widened(shape, axis, len(together[0])) for shape in shapes)
    total = sum(shape.bytes for shape in shapes)
    return Transfer(kind, shapes, total, 1, together, op.op_name or frame.op_name)


def _widened(shape: Shape, axis: int, factor: int) -> Shape:
    dims = list(shape.dims)
    dims[axis] *= factor
    return shape._replace(dims=tuple(dims))


# Loops.


def _loop(frame: _Frame, op: Instruction) -> Work:
    """Returns the cost of a loop: its body and condition, times its trips.

    A loop whose number of trips is unknown counts once and is listed in the result.
    """
    body, condition = (frame.call(op.computations(name)[0], op) for name in ("body", "condition"))
    moving = body._replace(argument=_carried)

    def constant(number, element):
        """Returns the value of a carried element that the loop does not change, or None."""
        if element is None or _value(moving, body.computation.root, element) != (0, element):
            return None
        return _value(frame, op.operands[0], element)

    def known(number, element):
        return constant(number, element) or _carried(number, element)

    frames = [inner._replace(argument=constant) for inner in (body, condition)]
    work = _sum([_frame_costs(inner) for inner in frames])
    trips = _trips(frame, op, *(inner._replace(argument=known) for inner in frames))
    if trips is None:
        return work._replace(unknown_loops=(*work.unknown_loops, op.op_name or op.name))
    return work.times(trips)


def _trips(frame: _Frame, op: Instruction, body: _Frame, condition: _Frame) -> int | None:
    """Returns how often a loop's body runs; None if that is unknown.

    The number is the compiler's note, or computed from the comparison in the loop's condition.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
        return int(match[1])

    def course(side):
        """Returns the first value of one side of the comparison, and its growth per trip."""
        if side is None or side.carried is None:
            return side and (side.offset, 0)
        start = _value(frame, op.operands[0], side.carried)
        end = _value(body, body.computation.root, side.carried)
        known = start and end and start.carried is None and end.carried == side.carried
        return (start.offset + side.offset, end.offset) if known else None

    direction, *sides = _comparison(condition) or ("", None, None)
    left, right = map(course, sides)
    if left is None or right is None:
        return None
    return _count(direction, right[0] - left[0], left[1] - right[1])


def _count(direction: str, distance: int, step: int) -> int | None:
    """Counts the trips of a loop until one side of its comparison has reached the other side.

    Args:
        direction: of the comparison, e.g. "LT": the loop goes on while left is less than right.
        distance: from the left side to the right side, before the first trip.
        step: change of the left side relative to the right side, per trip.

    Returns:
        Number of trips, or None if `direction` and `step` do not determine it.
    """
    if not step or (direction in ("LT", "LE", "GT", "GE") and (direction[0] == "L") != (step > 0)):
        return None
    if direction in ("LT", "GT", "NE"):
        return max(0, -(-distance // step))
    return max(0, distance // step + 1) if direction in ("LE", "GE") else None


class _Affine(NamedTuple):
    """Record of an integer: `offset` plus element `carried` of a loop's carry, or only `offset`."""

    offset: int
    carried: int | None = None


def _carried(number: int, element: int | None) -> _Affine | None:
    return None if element is None else _Affine(0, element)


def _comparison(frame: _Frame) -> tuple | None:
    """Returns direction and sides of the comparison that ends a computation.

    Returns None if the result of the computation is not a comparison.
    """
    op = frame.computation.instructions[frame.computation.root]
    if op.opcode in _CALLS:
        return _comparison(frame.call(op.computations(_CALLS[op.opcode])[0], op))
    match = re.search(r"direction=(\w+)", op.rest)
    if op.opcode != "compare" or not match:
        return None
    return match[1], *(_value(frame, name, None) for name in op.operands)


_CALLS = {"fusion": "calls", "call": "to_apply"}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


def _value(frame: _Frame, name: str, element: int | None) -> _Affine | None:
    """Returns the value of an integer, or of an integer in a tuple, that an instruction computes.

    The value is None if the text does not determine it.
    """
    op = frame.computation.instructions[name]
    if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.literal):
        return _Affine(int(op.literal))
    if op.opcode in _SAME:
        return _value(frame, op.operands[0], element)
    if op.opcode == "get-tuple-element":
        return _value(frame, op.operands[0], op.numbers("index")[0])
    if op.opcode == "tuple" and element is not None:
        return _value(frame, op.operands[element], None)
    if op.opcode == "parameter":
        return frame.argument(int(op.literal), element)
    if op.opcode in _CALLS:
        called = frame.call(op.computations(_CALLS[op.opcode])[0], op)
        return _value(called, called.computation.root, element)
    if op.opcode in ("add", "subtract"):
        return _added(*(_value(frame, operand, None) for operand in op.operands), op.opcode)
    return None


def _added(a: _Affine | None, b: _Affine | None, opcode: str) -> _Affine | None:
    if a is None or b is None:
        return None
    if opcode == "subtract":
        return _Affine(a.offset - b.offset, a.carried) if b.carried is None else None
    if a.carried is not None and b.carried is not None:
        return None
    return _Affine(a.offset + b.offset, b.carried if a.carried is None else a.carried)
