"""Reads the text of a compiled program: computations, instructions, shapes, and how often each computation runs.

The text is what `compiled.as_text()` returns. Source: XLA's HLO text format.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_WIDTHS = {"pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
           "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a shape: its dtype, such as `bf16`, and its dimensions."""

    dtype: str
    dimensions: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> float:
        """Bytes of the elements."""
        return self.size * width(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      name: its name, unique in the program.
      shape: the text of its shape.
      op: the operation, such as `dot`.
      rest: the line behind `op(`: operands and attributes.
      is_root: whether its value is that of its computation.
    """

    name: str
    shape: str
    op: str
    rest: str
    is_root: bool = False

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%([\w.-]+)", self.rest[: _closing(self.rest)]))

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Arrays of the value, those of a tuple one after the other."""
        return arrays(self.shape)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, branches left out."""
        return tuple(_CALLED.findall(self.rest))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Names of the computations of which a conditional runs one."""
        listed = re.findall(r"branch_computations=\{([^}]*)\}", self.rest)
        named = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", self.rest)
        return (*named, *(each.strip().lstrip("%") for text in listed for each in text.split(",")))

    @property
    def op_name(self) -> str:
        """The operation of the JAX program that it comes from, such as `jit(f)/dot_general`; "" if it is unknown."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a `custom-call` calls, such as `__cublas$lt$matmul`; "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Returns the numbers of an attribute, as of `lhs_contracting_dims={1,2}` or of JSON's `"name":["1"]`."""
        found = re.search(rf'{attribute}"?[=:][\[{{]([\d,"]*)[\]}}]', self.rest)
        return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: the instructions of each computation.
      entry: name of the computation that runs first; "" for an empty text.
      devices: number of devices that the program runs on.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> Module:
        """Parses the text of a program; an empty text gives a module without computations."""
        computations: dict[str, list[Instruction]] = {}
        current, entry = [], ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif found := _INSTRUCTION.match(line):
                root, name, shape, op, rest = found.groups()
                current.append(Instruction(name, shape, op, rest, root is not None))
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n\n")[0])
        return cls(computations, entry, math.prod(map(int, counts)))

    def named(self, computation: str) -> dict[str, Instruction]:
        """Returns the instructions of a computation by name; {} for one that the text does not have."""
        return {each.name: each for each in self.computations.get(computation, ())}

    def times(self) -> dict[str, int]:
        """Returns how often each computation runs that the entry reaches; callers come before what they call.

        A loop without a known number of rounds counts as one.
        """
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            seen.add(name)
            for called, _ in self._calls(name):
                if called not in seen:
                    visit(called)
            order.append(name)

        visit(self.entry)
        times = dict.fromkeys(reversed(order), 0)
        times[self.entry] = 1
        for name in times:
            for called, rounds in self._calls(name):
                times[called] += times[name] * rounds
        return times

    def _calls(self, name: str) -> Iterator[tuple[str, int]]:
        """Yields the computations that a computation calls, and how often each is called in one run of it."""
        for each in self.computations[name]:
            rounds = (self.rounds(each) or 1) if each.op == "while" else 1
            yield from ((called, rounds) for called in dict.fromkeys((*each.called, *each.branches))
                        if called in self.computations)

    def rounds(self, loop: Instruction) -> int | None:
        """Returns the rounds of a `while`; None if the data decide.

        XLA for TPUs states no number, but counts from 0 to a constant.
        """
        if known := re.search(r"known_trip_count[^0-9]*(\d+)", loop.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]
        constants = {each.name: int(found[0]) for each in condition if each.op == "constant"
                     and (found := re.match(r"\d+(?=\))", each.rest))}
        for each in condition:
            if each.op == "compare" and "direction=LT" in each.rest:
                return next((constants[name] for name in each.operands if name in constants), None)
        return None


def width(dtype: str) -> float:
    """Returns the bytes of an element; 1 for an unknown dtype, such as those of 8 bits."""
    return _WIDTHS.get(dtype, 1)


def arrays(shape: str) -> tuple[Array, ...]:
    """Returns the arrays in the text of a shape, those of a tuple one after the other."""
    return tuple(Array(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n))
                 for dtype, sizes in _ARRAY.findall(shape))


def _closing(text: str) -> int:
    """Returns the position of the bracket that closes the operands of an instruction."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)
