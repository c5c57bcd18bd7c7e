"""Reads the collectives of a compiled program from its text, with the bytes that devices exchange.

Bytes are those that one device receives in one run of the program, for ring algorithms: S (n - 1) / n for a gather or
scatter of an array of S bytes over n devices, and twice that for a sum over all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from llavamed_jax.preflight import hlo

# Share of an array's bytes that a device receives, as a function of the number n of devices.
_SHARES = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      op: the operation, such as `all-gather`.
      bytes: bytes that a device receives each time.
      count: how often it runs in one run of the program.
      array: bytes of the complete array.
      group: number of devices that take part.
    """

    op: str
    bytes: float
    count: int
    array: float
    group: int


def read(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program; in a loop, a collective counts once for each iteration.

    A loop without a known number of iterations counts as one. Our only such loop, over the chunks of the head, has no
    collectives without tensor parallelism.

    Args:
      text: the program (`compiled.as_text()`); empty if the compiler gave up.
    """
    module = hlo.Module.parse(text)
    if not module.entry:
        return []
    found, chains = [], set()
    for name, times in module.times().items():
        for each in module.computations[name]:
            sent = of(each, name, times, module.devices)
            # XLA for TPUs splits one gather into a chain of steps; each of them states the shape of the complete array.
            chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', each.rest)
            if sent is None or chain is not None and chain.groups() in chains:
                continue
            if chain is not None:
                chains.add(chain.groups())
            found.append(sent)
    return found


def of(instruction: hlo.Instruction, computation: str, times: int, devices: int) -> Collective | None:
    """Returns the collective that an instruction is or starts; None for others and for groups of one device.

    Args:
      instruction: the instruction.
      computation: the name of its computation.
      times: how often it runs.
      devices: number of devices of the program.
    """
    kind = instruction.op.removesuffix("-start")
    if kind not in _SHARES:
        return None
    n = _group_size(instruction.rest) or devices
    if n == 1:
        return None
    array = _array(kind, instruction.shape, instruction.op != kind, n)
    # XLA for TPUs writes a reduce-scatter as a fusion of an all-reduce and a slice.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, array * _SHARES[kind](n), times, array, n)


def totals(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Sums collectives by operation: {op: {count, bytes}}, in descending order of bytes."""
    out: dict = collections.defaultdict(lambda: dict(count=0, bytes=0.0))
    for each in found:
        out[each.op]["count"] += each.count
        out[each.op]["bytes"] += each.count * each.bytes
    return {op: dict(count=t["count"], bytes=round(t["bytes"]))
            for op, t in sorted(out.items(), key=lambda item: -item[1]["bytes"])}


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
    return sum(each.bytes for each in hlo.arrays(shape))


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
