"""Parses HLO text, as jax 0.10 to 0.12 print compiled programs."""

import math
import re
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "f8e8m0fnu": 8}  # types whose first digits are not their bits
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Shape(NamedTuple):
    """Record of an array's dtype and dimensions in HLO."""

    dtype: str  # as HLO spells it, e.g. "bf16"
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements of the array."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Number of bytes of the array, rounded up."""
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+|$", self.dtype)[0] or 0)
        return -(-self.elements * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """Record of an HLO instruction: name, shapes of its result, opcode, operands and attributes."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; a tuple's are flat
    opcode: str
    operands: tuple[str, ...]  # names
    literal: str  # between the parentheses, e.g. "3" of constant(3)
    rest: str  # attributes

    def computations(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute; [] without the attribute."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", match[1]) if match else []

    def numbers(self, attribute: str) -> list[int]:
        """Returns the numbers in an attribute such as dimensions={0,1}; [] if it is missing."""
        match = re.search(rf"\b{attribute}=(\{{[\d,]*\}}|\d+)", self.rest)
        return [int(n) for n in re.findall(r"\d+", match[1])] if match else []

    @property
    def op_name(self) -> str:
        """Name of the traced operation that the instruction stems from; "" if the name is lost."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""


class Computation(NamedTuple):
    """Record of an HLO computation: instructions by name, and the name of the result's one."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operand_shapes(self, op: Instruction) -> tuple[Shape, ...]:
        """Returns the shapes of an instruction's operands; a tuple's shapes follow each other."""
        return tuple(shape for name in op.operands for shape in self.instructions[name].shapes)


class Module(NamedTuple):
    """Record of a compiled program: its computations and the number of devices that run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Parses the HLO text of a program, from `compiled.as_text()`; returns its `Module`.

    Raises:
        ValueError: the text has no entry computation.
    """
    bodies, entry, current = {}, "", []
    for line in text.splitlines():
        if line[:1].isspace():
            if match := _LINE.match(line):
                current.append(match)
        elif (match := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError("no entry computation: expected the text of a compiled program")
    counts = re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])
    computations = {name: _computation(name, lines) for name, lines in bodies.items()}
    return Module(computations, entry, math.prod(map(int, counts)))


def _computation(name: str, lines: list[re.Match]) -> Computation:
    instructions, root = {}, ""
    for match in lines:
        first, own, shape, opcode, tail = match.groups()
        inside, _, rest = tail.partition("), ") if "), " in tail else tail.partition(")")
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        shapes = tuple(
            Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in _SHAPE.findall(shape)
        )
        instructions[own] = Instruction(own, shapes, opcode, operands, inside, rest)
        root = own if first else root
    return Computation(name, instructions, root)


def groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Reads a collective's groups of devices, or its (source, target) pairs, from its attributes.

    XLA has three spellings: {{0,1},{2,3}}, [2,2]<=[4] with an order of axes, and axes of a mesh.
    Without any of them, all devices are one group.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})?\}", rest):
        listed = re.findall(r"\{([\d,]+)\}", match[1] or "")
        rows = tuple(tuple(int(n) for n in ids.split(",")) for ids in listed)
        return rows or (tuple(range(devices)),)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\S*?\]\S*?)(?:,\s|$)", rest):
        return _rows(_iota(match[2]).reshape(_sizes(match[1])))
    match = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", rest)
    if not match:
        return (tuple(range(devices)),)
    return _rows(_of_mesh(*match.groups()))


def _of_mesh(axes: str, order: str | None, chosen: str) -> np.ndarray:
    """Returns device ids [groups, members] of a collective over axes of a mesh.

    Args:
        axes: names and sizes of all axes of the mesh, "'a'=2,'b'=4".
        order: device ids of the mesh, as `_iota` reads them; None for 0, 1, 2, ...
        chosen: axes that a group spans, "'b'", or part of an axis, "'b':(2)2".
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes)}
    ids = _iota(order) if order else np.arange(math.prod(sizes.values()))
    shape, members = [], []  # an axis that is used partly becomes three
    used = {name: (pre, size) for name, pre, size in _AXIS.findall(chosen)}
    for name, n in sizes.items():
        pre, size = used.get(name, ("", ""))
        split = [int(pre), int(size), n // int(pre) // int(size)] if pre else [n]
        if name in used:
            members.append(len(shape) + (len(split) == 3))
        shape += split
    last = range(len(shape) - len(members), len(shape))
    grouped = np.moveaxis(ids.reshape(shape), members, list(last))
    return grouped.reshape(-1, math.prod(shape[i] for i in members))


_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


def _iota(text: str) -> np.ndarray:
    """Returns the device ids that HLO writes as "[2,4]T(1,0)", or as a list of ids.

    "[2,4]T(1,0)" means the ids 0, 1, 2, ... in shape [2, 4], with the axes then transposed.
    """
    sizes, _, order = text.partition("T")
    if not sizes.startswith("["):
        return np.array(_sizes(sizes))
    ids = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return ids.transpose(_sizes(order)) if order else ids


def _sizes(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in row) for row in ids)
