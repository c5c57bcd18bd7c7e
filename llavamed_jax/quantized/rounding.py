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
LARGEST = (6, 6.5, 7, 7.5, 8, 8.5, 9)  # candidates for the largest magnitude of a symmetric group, in steps
NF4_GROUP = 64  # as in bitsandbytes
_BOUNDS = (NF4[1:] + NF4[:-1]) / np.float32(2)  # between neighbours of nf4


def int8(kernel: np.ndarray, dtype=np.float32) -> Int8Kernel:
    """Rounds a kernel [D,F] to 255 values from -127 to 127 of a scale for each output.

    Args:
      kernel: the kernel.
      dtype: the scales are rounded to values of this dtype.
    """
    kernel = kernel.astype(np.float32)
    scale = _scales(np.abs(kernel).max(axis=0) / np.float32(127), dtype)
    return Int8Kernel(np.clip(np.rint(kernel / scale), -127, 127).astype(np.int8), scale)


def int4(kernel: np.ndarray, group: int | None = None, is_symmetric: bool = False, dtype=np.float32) -> Int4Kernel:
    """Rounds a kernel [D,F] to 16 values for each group of inputs and each output.

    Args:
      kernel: the kernel.
      group: g; None takes the first of `GROUPS` that divides D.
      is_symmetric: whether the values are -8 to 7 times a scale (`symmetric_scales`); else they are spread from the
        least to the largest value of the group, with 0 among them.
      dtype: the scales are rounded to values of this dtype.

    Raises:
      UserError: no group divides D.
    """
    groups = _grouped(kernel, group or group_of(kernel.shape[0]))
    if is_symmetric:
        scales = symmetric_scales(groups, dtype)
        return Int4Kernel(nearest(groups, scales[:, None]).reshape(kernel.shape).astype(ml_dtypes.int4), scales)
    least, most = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    scales = _scales((most - least) / np.float32(15), dtype)
    zeros = np.clip(np.rint(-least / scales), 0, 15) - 8
    values = nearest(groups, scales[:, None], zeros[:, None])
    return Int4Kernel(values.reshape(kernel.shape).astype(ml_dtypes.int4), scales, zeros.astype(np.int8))


def symmetric_scales(groups: np.ndarray, dtype=np.float32, importance: np.ndarray | None = None) -> np.ndarray:
    """Returns the scales [G,F] with which the values -8 to 7 have the least squared error of groups [G,g,F].

    The largest magnitude of a group is one of `LARGEST` times its scale. Above 7 the largest values are cut, and the
    others have smaller steps.

    Args:
      groups: float32 [G,g,F].
      dtype: the scales are rounded to values of this dtype.
      importance: weights [G,g] of the squared errors; None weights all alike.
    """
    weights = np.float32(1) if importance is None else importance.astype(np.float32)[..., None]
    largest, best, least = np.abs(groups).max(axis=1), None, None
    for number in LARGEST:
        scales = _scales(largest / np.float32(number), dtype)
        error = (np.square(nearest(groups, scales[:, None]) * scales[:, None] - groups) * weights).sum(axis=1)
        best, least = (scales, error) if best is None else (
            np.where(error < least, scales, best), np.minimum(error, least))
    return best


def nearest(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | int = 0) -> np.ndarray:
    """Returns the nearest number of -8 to 7 to each of `values`, given their scales and zeros, as float32."""
    return np.clip(np.rint(values / scales) + zeros, -8, 7)


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
    group = group_of(D) if name == "int4" else NF4_GROUP
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


def group_of(*widths: int) -> int:
    """Returns the first of `GROUPS` that divides every width. Raises UserError if none does."""
    for group in GROUPS:
        if not any(width % group for width in widths):
            return group
    wrong = next((width for width in widths if width % GROUPS[-1]), widths[0])
    raise UserError(f"int4 rounds groups of {', '.join(map(str, GROUPS))} inputs, and none of them divides the width "
                    f"{wrong} of a kernel; int8 was expected")


def _grouped(kernel: np.ndarray, group: int) -> np.ndarray:
    """Returns the kernel as float32 [G,g,F]."""
    D, F = kernel.shape
    if D % group:
        raise UserError(f"a group of {group} inputs does not divide the width {D} of a kernel; int8 was expected")
    return kernel.astype(np.float32).reshape(D // group, group, F)


def _scales(wanted: np.ndarray, dtype) -> np.ndarray:
    """Returns float32 scales that `dtype` has too; 1 for a group of zeros, and never 0 for another."""
    least = np.float32(ml_dtypes.finfo(dtype).smallest_subnormal)
    return np.where(wanted > 0, np.maximum(wanted.astype(dtype).astype(np.float32), least), np.float32(1))


def _or_one(scale: np.ndarray) -> np.ndarray:
    """Replaces the scale of a group of zeros by 1."""
    return np.where(scale > 0, scale, np.float32(1))
