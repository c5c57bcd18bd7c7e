"""Rounds kernels to few bits, to the nearest value, on the host.

Axis letters: D width of the input, F of the output, G groups of inputs, g inputs of a group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.quantized.kernels import NF4, Int4Kernel, Int8Kernel, Kernel, Nf4Kernel

ROUNDED = re.compile(r"decoder/layers(_\d+)?/.+/kernel")  # the parameters that are rounded, stacked or not
GROUPS = (128, 64, 32)  # the widths of a group, of which int4 takes the first that divides D
NF4_GROUP = 64  # as in bitsandbytes
_BOUNDS = (NF4[1:] + NF4[:-1]) / np.float32(2)  # between neighbours of nf4


def int8(kernel: np.ndarray) -> Int8Kernel:
    """Rounds a kernel [D,F] to 255 values from -127 to 127 of a scale for each output."""
    kernel = kernel.astype(np.float32)
    scale = _or_one(np.abs(kernel).max(axis=0) / np.float32(127))
    return Int8Kernel(np.rint(kernel / scale).astype(np.int8), scale)


def int4(kernel: np.ndarray, group: int | None = None, is_symmetric: bool = False) -> Int4Kernel:
    """Rounds a kernel [D,F] to 16 values for each group of inputs and each output.

    Args:
      kernel: the kernel.
      group: g; None takes the first of `GROUPS` that divides D.
      is_symmetric: whether the values are -8 to 7 times a scale; else they are spread from the least to the largest
        value of the group, with 0 among them.

    Raises:
      UserError: no group divides D.
    """
    groups = _grouped(kernel, group or _group_of(kernel.shape[0]))
    if is_symmetric:
        scales = _or_one(np.abs(groups).max(axis=1) / np.float32(7))
        values = np.clip(np.rint(groups / scales[:, None]), -8, 7)
        return Int4Kernel(values.reshape(kernel.shape).astype(ml_dtypes.int4), scales)
    least, most = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    scales = _or_one((most - least) / np.float32(15))
    zeros = np.clip(np.rint(-least / scales), 0, 15) - 8
    values = np.clip(np.rint(groups / scales[:, None]) + zeros[:, None], -8, 7)
    return Int4Kernel(values.reshape(kernel.shape).astype(ml_dtypes.int4), scales, zeros.astype(np.int8))


def nf4(kernel: np.ndarray, group: int = NF4_GROUP) -> Nf4Kernel:
    """Rounds a kernel [D,F] to nf4 in groups of inputs.

    Raises:
      UserError: the group does not divide D, so that bitsandbytes' blocks would cross from one output to the next.
    """
    groups = _grouped(kernel, group)
    absmax = np.abs(groups).max(axis=1)
    codes = np.searchsorted(_BOUNDS, groups / _or_one(absmax)[:, None], side="left")
    return Nf4Kernel(codes.reshape(kernel.shape).astype(ml_dtypes.uint4), absmax)


ROUNDINGS: Mapping[str, Callable[[np.ndarray], Kernel]] = {"int8": int8, "int4": int4, "nf4": nf4}


def shapes(name: str, shape: tuple[int, ...]) -> Kernel:
    """Returns the arrays of a rounded kernel [D,F] as zeros that take no memory, for their shapes and dtypes.

    Args:
      name: a key of `ROUNDINGS`.
      shape: [D,F], or [L,D,F] for a stack.

    Raises:
      UserError: no group divides D.
    """
    *L, D, F = shape
    empty = lambda dtype, *shape: np.broadcast_to(np.zeros((), dtype), (*L, *shape))
    if name == "int8":
        return Int8Kernel(empty(np.int8, D, F), empty(np.float32, F))
    group = _group_of(D) if name == "int4" else NF4_GROUP
    if D % group:
        raise UserError(f"a group of {group} inputs does not divide the width {D} of a kernel; int8 was expected")
    by_group = empty(np.float32, D // group, F)
    if name == "int4":
        return Int4Kernel(empty(ml_dtypes.int4, D, F), by_group, empty(np.int8, D // group, F))
    return Nf4Kernel(empty(ml_dtypes.uint4, D, F), by_group)


def with_shapes(params: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Returns parameter shapes by name, those of rounded kernels as `shapes` gives them; all as they are for None."""
    return {key: shapes(name, x.shape) if name is not None and ROUNDED.fullmatch(key) else x
            for key, x in params.items()}


def _group_of(width: int) -> int:
    for group in GROUPS:
        if width % group == 0:
            return group
    raise UserError(f"int4 rounds groups of {', '.join(map(str, GROUPS))} inputs, and none of them divides the width "
                    f"{width} of a kernel; int8 was expected")


def _grouped(kernel: np.ndarray, group: int) -> np.ndarray:
    """Returns the kernel as float32 [G,g,F]."""
    D, F = kernel.shape
    if D % group:
        raise UserError(f"a group of {group} inputs does not divide the width {D} of a kernel; int8 was expected")
    return kernel.astype(np.float32).reshape(D // group, group, F)


def _or_one(scale: np.ndarray) -> np.ndarray:
    """Replaces the scale of a group of zeros by 1."""
    return np.where(scale > 0, scale, np.float32(1))
