"""What one instruction of a compiled program computes and moves: FLOPs of its products, bytes of memory it must touch.

A kernel reads each of its inputs and writes its outputs once, except that

- of an input that is only sliced, it reads the slices;
- an update in place reads and writes the part that is updated;
- an input that several parts of a fusion use is read once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llavamed_jax.models.attention import flash
from llavamed_jax.preflight.hlo import Array, Instruction, Module, width

# Instructions that name values and do no work, and calls that only give memory.
FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
                  "replica-id", "add-dependency", "opt-barrier", "domain", "AllocateBuffer"})
# The number of a result that shares its memory with an operand.
_UPDATED = re.compile(r"\{(\d+)\}: \(\d+, \{\}")
_IN_PLACE = ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Cost:
    """The work of one kernel.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: read from and written to memory.
    """

    flops: float
    bytes: float


def cost(module: Module, computation: Mapping[str, Instruction], each: Instruction, attended: float) -> Cost:
    """Returns the work of an instruction that is a kernel.

    Args:
      module: the program.
      computation: the instructions of its computation, by name.
      each: the instruction; its op is not in `FREE`, nor a loop, a call or a collective.
      attended: keys that a query attends to on average, for the kernels of attention.
    """
    if each.op == "custom-call" and (declared := _declared(each)) is not None:
        return declared
    if each.op == "custom-call" and (kernel := re.search(r"/(\w+)/pallas_call$", each.op_name)):
        arrays = each.arrays if _UPDATED.search(each.rest) else computation[each.operands[0]].arrays  # the queries
        # An array that a kernel updates in place is read once; the kernel writes only one position of each row there.
        updated = sum(each.arrays[int(i)].bytes for i in _UPDATED.findall(each.rest))
        return Cost(flash.flops(kernel[1], arrays[0].dimensions, attended), _alone(computation, each) - updated)
    called = [name for name in each.called if name in module.computations] if each.op == "fusion" else []
    if called:
        flops = sum(_flops(module, name) for name in called)
        read, written = _fusion(module, called[0], computation, each)
        return Cost(flops, read + written)
    flops = _product(computation, each)
    return Cost(flops, _alone(computation, each))


def _alone(computation: Mapping[str, Instruction], each: Instruction) -> float:
    """Returns the bytes of an instruction that is a kernel by itself."""
    operands = [computation[name] for name in dict.fromkeys(each.operands) if name in computation]
    sizes = [sum(array.bytes for array in operand.arrays) for operand in operands]
    out = sum(array.bytes for array in _results(each))
    if each.op in ("dynamic-slice", "slice", "gather"):
        return 2 * out + sum(sizes[1:])
    if each.op == "dynamic-update-slice":
        return 2 * sizes[1] + sum(sizes[2:])
    if each.op == "scatter":
        return sizes[1] + 2 * sum(sizes[2:])
    return out + sum(sizes)


def _results(each: Instruction):
    """Returns the arrays of a value without the scratch memory that a library's product is given."""
    if each.op == "custom-call" and len(each.arrays) > 1 and each.arrays[-1].dtype == "s8":
        return each.arrays[:-1]
    return each.arrays


def _fusion(module: Module, name: str, outside: Mapping[str, Instruction], each: Instruction) -> tuple[float, float]:
    """Returns the bytes that a fusion reads and writes."""
    inside = module.named(name)
    root = next(x for x in reversed(module.computations[name]) if x.is_root)
    written, demand = 0.0, dict.fromkeys(inside, 0.0)
    for part in ([inside[x] for x in root.operands] if root.op == "tuple" else [root]):
        source = part
        while source.op in ("bitcast", "copy", "reshape") and source.operands[0] in inside:
            source = inside[source.operands[0]]
        if source.op in _IN_PLACE:
            # A scatter adds to what is there.
            times, first = (1, 1) if source.op == "dynamic-update-slice" else (2, len(source.operands) // 2 + 1)
            last = 2 if source.op == "dynamic-update-slice" else None
            written += times * sum(array.bytes for x in source.operands[first:last] for array in inside[x].arrays)
            for x in source.operands[1:]:
                demand[x] += _size(inside[x])
        else:
            written += sum(array.bytes for array in part.arrays)
            demand[part.name] += _size(part)
    return _demanded(module, name, demand, outside, each), written


def _demanded(module: Module, name: str, demand: dict[str, float], outside, each: Instruction) -> float:
    """Returns the bytes that a computation reads of its parameters.

    Args:
      module: the program.
      name: the computation.
      demand: elements that are needed of each instruction, by name; those of the results are given.
      outside: the instructions of the caller's computation.
      each: the caller.
    """
    inside, read = module.named(name), 0.0
    for x in reversed(module.computations[name]):
        wanted = min(demand[x.name], _size(x)) if x.arrays else 0.0
        if wanted == 0:
            continue
        if x.op == "parameter":
            number = int(x.rest.partition(")")[0])
            given = outside.get(each.operands[number], x) if number < len(each.operands) else x
            read += wanted * width((given.arrays or x.arrays)[0].dtype)
        for i, operand in enumerate(x.operands):
            if operand in inside:
                demand[operand] += _needed(inside, x, i, inside[operand], wanted)
    return read


def _needed(inside: Mapping[str, Instruction], x: Instruction, i: int, operand: Instruction, wanted: float) -> float:
    """Returns the elements of operand i that `wanted` elements of an instruction need."""
    size = _size(operand)
    if x.op in ("dynamic-slice", "gather") and i > 0 or x.op == "dynamic-update-slice" and i > 1:
        return size  # indices
    if x.op == "dynamic-update-slice":
        update = _size(inside[x.operands[1]])
        return min(update, wanted) if i == 1 else max(0.0, wanted - update)
    if x.op in ("reduce", "reduce-window", "concatenate", "sort"):
        return size * min(1.0, wanted / max(_size(x), 1))
    if x.op in ("dot", "convolution", "custom-call", "fusion", "while", "call", "scatter"):
        return size
    return min(size, wanted)


def _size(x: Instruction) -> float:
    return max((array.size for array in x.arrays), default=0)


def _flops(module: Module, name: str) -> float:
    """Returns the FLOPs of the products in a fused computation."""
    inside, total = module.named(name), 0.0
    for x in module.computations[name]:
        total += _product(inside, x)
        if x.op == "fusion":
            total += sum(_flops(module, called) for called in x.called if called in module.computations)
    return total


def _product(computation: Mapping[str, Instruction], x: Instruction) -> float:
    """Returns the FLOPs of a product: 2 for each element of the output and each element that is summed over."""
    target = re.search(r'custom_call_target="([^"]*)"', x.rest) if x.op == "custom-call" else None
    is_library = target is not None and re.search("matmul|gemm", target[1])
    is_convolution = x.op == "convolution" or target is not None and "conv" in target[1].lower()
    if not (x.op == "dot" or is_library or is_convolution) or not x.operands or x.operands[0] not in computation:
        return 0.0
    out = x.arrays[0].size
    if is_convolution:
        return _convolution(x, computation[x.operands[0]].arrays[0], computation[x.operands[1]].arrays[0]
                            if x.operands[1] in computation else None)
    left = computation[x.operands[0]].arrays[0].dimensions
    summed = x.numbers("lhs_contracting_dims") or x.numbers("lhs_contracting_dimensions")
    return 2.0 * out * math.prod(left[i] for i in summed)


def _convolution(x: Instruction, image: Array, kernel: Array | None) -> float:
    """Returns the FLOPs of a convolution, those with padding left out.

    XLA for TPUs writes products as convolutions. Some split heads by a window as wide as their number, of which all but
    one position lie in padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
    if labels is None or kernel is None:
        return 0.0
    out = x.arrays[0]
    found = 2.0 * out.size * kernel.dimensions[labels[2].index("i")]
    given = re.search(r"window=\{([^}]*)\}", x.rest)
    window = {key: words.split("x") for key, words in re.findall(r"(\w+)=([\w-]+)", given[1])} if given else {}
    for axis in sorted(set(labels[1]) - {"b", "f"}):
        read, taken, made = (array.dimensions[names.index(axis)]
                             for array, names in zip((image, kernel, out), labels.groups()))
        stride, spread, apart = (int(window[key][int(axis)]) if key in window else 1
                                 for key in ("stride", "lhs_dilate", "rhs_dilate"))
        first = -int(window["pad"][int(axis)].split("_")[0]) if "pad" in window else 0
        width = (read - 1) * spread + 1
        found *= sum(_taken(first + n * stride, taken, apart, width, spread) for n in range(made)) / made
    return found


def _taken(start: int, number: int, apart: int, width: int, spread: int) -> int:
    """Returns how many of the positions start, start + apart, … lie in a row of that width on one of its values."""
    if spread > 1:
        return sum(0 <= at < width and at % spread == 0 for at in range(start, start + number * apart, apart))
    return max(0, min(number, -((start - width) // apart)) - max(0, -(start // apart)))


def _declared(x: Instruction) -> Cost | None:
    """Returns the cost that a Pallas kernel declares; None if there is none."""
    flops = re.search(r'"?flops"?\s*[:=]\s*"?(\d+)', x.rest)
    moved = re.search(r'"?bytes_accessed"?\s*[:=]\s*"?(\d+)', x.rest)
    return Cost(float(flops[1]), float(moved[1])) if flops and moved else None
