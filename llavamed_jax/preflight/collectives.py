"""Reads the collectives of a compiled program from its text, with the bytes that devices exchange.

Bytes are those that one device receives in one run of the program, for ring algorithms: S (n - 1) / n for a gather or
scatter of an array of S bytes over n devices, and twice that for a sum over all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

# Share of an array's bytes that a device receives, as a function of the number n of devices.
_SHARES = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
           "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      op: the operation, such as `all-gather`.
      bytes: bytes that a device receives each time.
      count: how often it runs in one run of the program.
      array: bytes of the complete array.
    """

    op: str
    bytes: float
    count: int
    array: float


def read(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program; in a loop, a collective counts once for each iteration.

    A loop without a known number of iterations counts as one. Our only such loop, over the chunks of the head, has no
    collectives without tensor parallelism.

    Args:
      text: the program (`compiled.as_text()`); empty if the compiler gave up.
    """
    computations, entry = _computations(text)
    if not entry:
        return []
    all_devices = math.prod(int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)",
                                                                 text.partition("\n\n")[0]))
    found, chains = [], set()
    for name, times in _times(computations, entry).items():
        # XLA for TPUs writes a reduce-scatter as a fusion of an all-reduce and a slice.
        is_scattered = name.startswith("all-reduce-scatter")
        for _, shape, op, rest in computations[name]:
            kind = op.removesuffix("-start")
            if kind not in _SHARES:
                continue
            # It also splits one gather into a chain of steps; each of them states the shape of the complete array.
            chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', rest)
            if chain is not None:
                if chain.groups() in chains:
                    continue
                chains.add(chain.groups())
            n = _group_size(rest) or all_devices
            array = _array(kind, shape, op != kind, n)
            kind = "reduce-scatter" if is_scattered and kind == "all-reduce" else kind
            if n > 1:
                found.append(Collective(kind, array * _SHARES[kind](n), times, array))
    return found


def totals(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Sums collectives by operation: {op: {count, bytes}}, in descending order of bytes."""
    out: dict = collections.defaultdict(lambda: dict(count=0, bytes=0.0))
    for each in found:
        out[each.op]["count"] += each.count
        out[each.op]["bytes"] += each.count * each.bytes
    return {op: dict(count=t["count"], bytes=round(t["bytes"]))
            for op, t in sorted(out.items(), key=lambda item: -item[1]["bytes"])}


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Parses a program.

    Returns:
      The instructions of each computation, as (name, shape, op, rest of the line), and the name of the entry
      computation.
    """
    computations: dict = {}
    current, entry = [], ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(instruction.groups())
    return computations, entry


def _times(computations, entry: str) -> dict[str, int]:
    """Returns how often each computation runs that the entry reaches; callers come before what they call."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for called, _ in _calls(computations, name):
            if called not in seen:
                visit(called)
        order.append(name)

    visit(entry)
    times = dict.fromkeys(reversed(order), 0)
    times[entry] = 1
    for name in times:
        for called, rounds in _calls(computations, name):
            times[called] += times[name] * rounds
    return times


def _calls(computations, name: str) -> Iterator[tuple[str, int]]:
    """Yields the computations that a computation calls, and how often each is called in one run of it."""
    for _, _, op, rest in computations[name]:
        rounds = 1
        if op == "while":
            known = re.search(r"known_trip_count[^0-9]*(\d+)", rest)
            rounds = int(known[1]) if known else _rounds(computations[re.search(r"condition=%?([\w.-]+)", rest)[1]])
        for called in _CALLED.findall(rest):
            if called in computations:
                yield called, rounds
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
            yield from ((branch.strip().lstrip("%"), 1) for branch in branches.split(","))


def _rounds(condition) -> int:
    """Returns the iterations of a loop that counts from 0 to a constant, as XLA for TPUs writes it; 1 for any other."""
    constants = {name: int(found[0]) for name, _, op, rest in condition if op == "constant"
                 and (found := re.match(r"\d+(?=\))", rest))}
    for _, _, op, rest in condition:
        if op == "compare" and "direction=LT" in rest:
            return next((constants[name] for name in re.findall(r"%?([\w.-]+)", rest.split(")")[0])
                         if name in constants), 1)
    return 1


def _array(kind: str, shape: str, is_start: bool, n: int) -> float:
    """Returns the bytes of the complete array: the output of a gather, or the input of a scatter.

    The shape of an asynchronous start is (input, output, …).
    """
    if is_start and kind != "all-reduce":
        taken, made = _elements(shape)[:2]
        return _bytes(made if kind == "all-gather" else taken)
    return _bytes(shape) * (n if kind == "reduce-scatter" else 1)


def _elements(shape: str) -> list[str]:
    """Returns the outermost elements of the shape of a tuple."""
    out, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            out.append("")
        else:
            out[-1] += letter
    return out


def _bytes(shape: str) -> float:
    return sum(_WIDTHS.get(dtype, 1) * math.prod(map(int, filter(None, sizes.split(",")))) for dtype, sizes in
               re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape))


def _group_size(rest: str) -> int:
    """Returns the number of devices in a group; 0 for `{}`, which means all devices.

    Groups are written as `{{0,1},{2,3}}`, `[4,2]<=[8]` or `mesh['a'=2,'b'=4], device_ids=… {'b'}`.
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # 'a':(2)4 is a part of an axis: size 4, after a part of size 2.
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 0
