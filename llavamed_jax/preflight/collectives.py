"""What a compiled program sends between devices, read from its text, and the least that its sharding needs.

Bytes are those that one device receives in one run of the program, as a ring moves them: of a gathered or scattered array of S
bytes over n devices S (n - 1) / n, of a sum over all of them twice that.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

# Share of an array's bytes that a device receives, as a function of the number n of devices.
_SHARES = {
    "all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n, "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n, "ragged-all-to-all": lambda n: (n - 1) / n, "collective-permute": lambda n: 1.0,
}
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
           "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program: what it is, bytes a device receives each time, how often it runs, bytes of the whole array."""

    op: str
    bytes: float
    count: int
    array: float


def read(text: str) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), those in loops as often as they run.

    A loop that ends when it finds reason to counts as one round; ours of that kind, over the chunks of the head, sends nothing
    without tensor parallelism. An empty text, of a compiler that gave up, has none.
    """
    computations, entry = _computations(text)
    if not entry:
        return []
    all_devices = math.prod(int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n\n")[0]))
    found, chains = [], set()
    for name, times in _times(computations, entry).items():
        # XLA for TPUs writes a reduce-scatter as a fusion of a sum and the slice of it that is kept.
        is_scattered = name.startswith("all-reduce-scatter")
        for _, shape, op, rest in computations[name]:
            kind = op.removesuffix("-start")
            if kind not in _SHARES:
                continue
            # It also cuts one gather into a chain of steps, each of which names the whole.
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
    """{op: {count, bytes}}, the largest first."""
    out: dict = collections.defaultdict(lambda: dict(count=0, bytes=0.0))
    for each in found:
        out[each.op]["count"] += each.count
        out[each.op]["bytes"] += each.count * each.bytes
    return {op: dict(count=t["count"], bytes=round(t["bytes"])) for op, t in sorted(out.items(), key=lambda item: -item[1]["bytes"])}


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Instructions by computation, each (name, shape, op, rest of the line), and the entry's name."""
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
    """How often each computation runs, of those that the entry reaches. Callers stand before what they call."""
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
    """What a computation calls, and how often in one run of it."""
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
    """Rounds of a loop that counts from 0 up to a constant, as XLA for TPUs writes it; 1 of any other."""
    constants = {name: int(found[0]) for name, _, op, rest in condition if op == "constant" and (found := re.match(r"\d+(?=\))", rest))}
    for _, _, op, rest in condition:
        if op == "compare" and "direction=LT" in rest:
            return next((constants[name] for name in re.findall(r"%?([\w.-]+)", rest.split(")")[0]) if name in constants), 1)
    return 1


def _array(kind: str, shape: str, is_start: bool, n: int) -> float:
    """Bytes of the whole array: what a gather makes, a scatter takes. The shape of a start is (taken, made, …)."""
    if is_start and kind != "all-reduce":
        taken, made = _elements(shape)[:2]
        return _bytes(made if kind == "all-gather" else taken)
    return _bytes(shape) * (n if kind == "reduce-scatter" else 1)


def _elements(shape: str) -> list[str]:
    """The outermost elements of a tuple's shape."""
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
    """Devices that take part together, of `{{0,1},{2,3}}`, `[4,2]<=[8]` or `mesh['a'=2,'b'=4], device_ids=… {'b'}`; 0 of `{}`: all."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # 'a':(2)4 is a part of an axis: 4 after the first 2.
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 0
