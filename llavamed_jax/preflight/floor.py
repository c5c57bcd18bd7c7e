"""The least time that a compiled program can take, from its text: a floor, never a prediction.

Each kernel takes at least the time of its products at the machine's peak, or of its bytes at the memory's, whichever
is longer. Collectives run beside the kernels that the compiler's schedule puts between their start and their end. Loops
are multiplied by their rounds. Launches, tails and everything that a kernel does twice come on top.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from llavamed_jax.preflight import collectives, fp8_matmuls
from llavamed_jax.preflight.costs import FREE, cost
from llavamed_jax.preflight.hlo import Instruction, Module
from llavamed_jax.preflight.peaks import Peaks

LINES = 10  # dearest parts that are listed


@dataclasses.dataclass
class Part:
    """The work of one part of the model, in one run of the program.

    Attributes:
      seconds: time of its kernels, or of its collectives.
      flops: of its products.
      bytes: that its kernels read and write, or that its collectives receive.
    """

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def add(self, other: Part, times: float) -> None:
        """Adds the work of another part, `times` times."""
        self.seconds += times * other.seconds
        self.flops += times * other.flops
        self.bytes += times * other.bytes


@dataclasses.dataclass
class Floor:
    """The floor of a program, or of one run of a computation.

    Attributes:
      seconds: the least time.
      matmul_seconds: of kernels that their products bound.
      memory_seconds: of kernels that their bytes bound.
      network_seconds: in which a device waits for others and computes nothing.
      matmul_flops: of all products.
      memory_bytes: that kernels read and write.
      kernels: number of kernels that are launched.
      parts: the work of each part of the model.
    """

    seconds: float = 0.0
    matmul_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    matmul_flops: float = 0.0
    memory_bytes: float = 0.0
    kernels: float = 0.0
    parts: dict[str, Part] = dataclasses.field(default_factory=lambda: collections.defaultdict(Part))

    def add(self, other: Floor, times: float = 1.0) -> None:
        """Adds another floor `times` times, run after this one."""
        for field in dataclasses.fields(self):
            if field.name != "parts":
                setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))
        for name, part in other.parts.items():
            self.parts[name].add(part, times)

    def to_json(self, peaks: Peaks, model_flops: float | None, peak_flops: float | None) -> dict[str, Any]:
        """Returns the object `floor` of preflight's JSON.

        Args:
          peaks: of the devices.
          model_flops: FLOPs that the model asks of one device; None if no ceiling is wanted.
          peak_flops: the data sheet's FLOP/s of one device, to which MFU relates.
        """
        ceiling = model_flops / self.seconds / peak_flops if model_flops and peak_flops and self.seconds else None
        dearest = sorted(self.parts.items(), key=lambda item: -item[1].seconds)[:LINES]
        return dict(
            milliseconds=1e3 * self.seconds, matmul_milliseconds=1e3 * self.matmul_seconds,
            memory_milliseconds=1e3 * self.memory_seconds, network_milliseconds=1e3 * self.network_seconds,
            mfu_ceiling=ceiling, matmul_flops=round(self.matmul_flops), memory_bytes=round(self.memory_bytes),
            kernels=round(self.kernels),
            peaks=dict(flops=peaks.flops, bytes_per_second=peaks.bytes_per_second,
                       link_bytes_per_second=peaks.link_bytes_per_second),
            dearest=[dict(part=name, milliseconds=1e3 * part.seconds, flops=round(part.flops), bytes=round(part.bytes))
                     for name, part in dearest])


def floor_of(text: str, peaks: Peaks, near: int, rounds: float, attended: float = 0.0) -> Floor | None:
    """Reads a program.

    Args:
      text: the program (`compiled.as_text()`); empty if the compiler gave up.
      peaks: of the devices.
      near: devices that fast links join.
      rounds: rounds of a loop whose rounds the data decide.
      attended: keys that a query attends to on average.

    Returns:
      The floor of one run of the program; None for an empty text.
    """
    module = Module.parse(text)
    return _Reader(module, peaks, near, rounds, attended).run(module.entry) if module.entry else None


def one_round(text: str, peaks: Peaks, near: int, rounds: float = 1.0, attended: float = 0.0) -> Floor | None:
    """Returns the floor of `rounds` rounds of the loop whose rounds the data decide, without what is outside of it.

    The other arguments are those of `floor_of`.
    """
    whole, outside = (floor_of(text, peaks, near, each, attended) for each in (rounds, 0.0))
    if whole is not None:
        whole.add(outside, -1.0)
    return whole


_FP8 = 2  # times as many FLOP/s in FP8 as in bfloat16, by the data sheets of Ada and Hopper


class _Reader:
    def __init__(self, module: Module, peaks: Peaks, near: int, rounds: float, attended: float):
        self.module, self.peaks, self.near, self.rounds, self.attended = module, peaks, near, rounds, attended
        self._known: dict[str, Floor] = {}

    def run(self, name: str) -> Floor:
        """Returns the floor of one run of a computation.

        Two clocks go over its schedule: that of the kernels, and that of the network, which a kernel waits for at the
        end of a collective whose result it needs.
        """
        if name in self._known:
            return self._known[name]
        out, network, ends = Floor(), 0.0, {}
        inside = self.module.named(name)
        for each in inside.values():
            if each.op in FREE or each.op.endswith("-update") or each.target in FREE:
                continue
            if each.op.endswith("-done"):
                self._wait(out, ends.get(each.operands[0] if each.operands else "", 0.0))
            elif (sent := self._sent(each, name)) is not None:
                seconds = sent.bytes / self.peaks.link(sent.group, self.near)
                network = max(network, out.seconds) + seconds
                out.parts[f"network: {part_of(each)}"].add(Part(seconds, 0.0, sent.bytes), 1.0)
                ends[each.name] = network
                if not each.op.endswith("-start"):
                    self._wait(out, network)
            elif each.op == "while":
                known = self.module.rounds(each)
                times = self.rounds if known is None else known
                for called in each.called:
                    out.add(self.run(called), times)
            elif each.op == "conditional":
                branches = [self.run(branch) for branch in each.branches if branch in self.module.computations]
                out.add(max(branches, key=lambda floor: floor.seconds, default=Floor()))
            elif each.op in ("call", "async-start"):
                for called in each.called:
                    out.add(self.run(called))
                ends[each.name] = 0.0
            else:
                self._kernel(out, inside, each)
        self._known[name] = out
        return out

    def _sent(self, each: Instruction, computation: str) -> collectives.Collective | None:
        """Returns the collective that an instruction is or starts, those that TPUs write as fusions included."""
        if (sent := collectives.of(each, computation, 1, self.module.devices)) is not None:
            return sent
        if each.op in ("fusion", "async-start"):
            for called in each.called:
                for inner in self.module.computations.get(called, ()):
                    if (sent := collectives.of(inner, called, 1, self.module.devices)) is not None:
                        return sent
        return None

    def _kernel(self, out: Floor, inside, each: Instruction) -> None:
        work = cost(self.module, inside, each, self.attended)
        faster = _FP8 if each.target == fp8_matmuls.TARGET else 1
        product, moved = work.flops / (self.peaks.flops * faster), work.bytes / self.peaks.bytes_per_second
        out.seconds += max(product, moved)
        if product > moved:
            out.matmul_seconds += product
        else:
            out.memory_seconds += moved
        out.matmul_flops += work.flops
        out.memory_bytes += work.bytes
        out.kernels += 1
        out.parts[part_of(each)].add(Part(max(product, moved), work.flops, work.bytes), 1.0)

    @staticmethod
    def _wait(out: Floor, until: float) -> None:
        waited = max(0.0, until - out.seconds)
        out.network_seconds += waited
        out.seconds += waited


# Words of JAX's transformations in the path of an operation.
_WRAPPING = re.compile(r"(jit|jvp|transpose|vmap|checkpoint|remat|shard_map|closed_call|rematted_computation|while|"
                       r"body|cond|branch_\d+_fun)(\(.*\))?|")


def part_of(each: Instruction) -> str:
    """Returns the part of the model that an instruction belongs to, such as `decoder/layers/mlp/up_proj backward`."""
    path = each.op_name
    if not path:
        return each.op
    way = " backward" if "transpose(" in path else ""
    way = " again" if "rematted_computation" in path else way
    words = [re.sub(r"[_.]\d+$", "", word).removeprefix("Llava.") for word in path.split("/")]
    words = [word for word in words if not _WRAPPING.fullmatch(word)]
    return ("/".join(words[:-1]) or (words[-1] if words else each.op)) + way
