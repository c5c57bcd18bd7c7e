"""Counts the FP8 products of a program that was compiled for a GPU: calls of cuBLASLt's FP8 matmul.

XLA rewrites a product of FP8 arrays to such a call; where it does not, it widens the arrays and multiplies in bfloat16.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from llavamed_jax.preflight import hlo
from llavamed_jax.preflight.programs import Training
from llavamed_jax.training import fp8

PASSES = ("forward", "recomputed", "backward")
TARGET = "__cublas$lt$matmul$f8"
_MODULE = re.compile(r"/decoder/.*\blayers/(self_attn/[qkvo]|mlp/(gate|up|down))_proj/")


def read(text: str) -> dict[str, int]:
    """Counts the products of the decoder's projections: those in FP8 by pass, and as `wide` the others.

    FP8 products of other modules count as `elsewhere`, and those of a rematerialised forward pass as `recomputed`. In a
    loop, a product counts once for each iteration.

    Args:
      text: the program (`compiled.as_text()`).
    """
    found: Counter[str | None] = Counter()
    module = hlo.Module.parse(text)
    for computation, times in module.times().items() if module.entry else ():
        for each in module.computations[computation]:
            if each.op == "dot" or each.target.startswith("__cublas"):
                kind = _pass(each.op_name)
                if each.target != TARGET:
                    kind = None if kind == "elsewhere" else "wide"
                found[kind] += times
    return {name: found[name] for name in (*PASSES, "wide", "elsewhere")}


def _pass(name: str) -> str:
    """Returns the pass of a product by its name in the program, a path of transformations and modules."""
    if not _MODULE.search(name):
        return "elsewhere"
    return "recomputed" if "rematted_computation" in name else "backward" if "transpose(" in name else "forward"


def of(training: Training, text: str) -> dict[str, int] | None:
    """Returns the counts of an update's program with `projections`, how many products a forward pass has.

    Args:
      training: the update.
      text: its program, compiled for a GPU.

    Returns:
      The counts by name; None for a recipe without FP8.
    """
    model = training.program.model
    if not training.program.is_fp8:
        return None
    return {"projections": fp8.expected(model) * training.micro_batches, **read(text)}


def sentence(found: Mapping[str, int]) -> str:
    """Says how many FP8 products an update has, with a warning if they are not those of the decoder's projections.

    XLA makes one product of two or three with the same operand, such as those of q, k and v.

    Args:
      found: as `of` returns it.
    """
    is_other = found["wide"] or found["elsewhere"] or not (found["forward"] and found["backward"])
    least = {"forward": found["projections"], "backward": 2 * found["projections"]}
    counts = [f"{name} {found[name]:,}" + (f" for {least[name]:,}" if name in least else "") for name in PASSES]
    return (f"{'warning: ' * bool(is_other)}FP8 products of an update: {', '.join(counts)}; in bfloat16 "
            f"{found['wide']:,}, elsewhere {found['elsewhere']:,}")
