"""Rounds a kernel to int4 so that its output changes little on given inputs (GPTQ).

The inputs of a kernel are rounded one by one, those with the largest squares first. The error that rounding one of them
makes in the output is made up for, as far as the inputs vary together, by changing the weights of those that are not
rounded yet. The scales of the groups are chosen before.

Axis letters: D width of the input, F of the output, G groups of inputs, g inputs of a group.

Source: Frantar et al., 2022; the order and the scales are those of its code with `act_order` and `static_groups`.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.quantized.kernels import Int4Kernel
from llavamed_jax.quantized.rounding import nearest, symmetric_scales

DAMPING = 0.01  # of the mean of the diagonal, added to it
_BLOCK = 128  # inputs whose changes to the later ones are added together


def gptq(kernel: np.ndarray, hessian: np.ndarray, group: int, dtype=np.float32) -> Int4Kernel:
    """Rounds a kernel [D,F] to int4 that is symmetric about 0, in groups of inputs.

    An input that was always 0 is rounded to the nearest.

    Args:
      kernel: the kernel.
      hessian: [D,D], the sum of x xᵀ over the inputs x [D].
      group: g, which divides D.
      dtype: the scales are rounded to values of this dtype.

    Raises:
      UserError: the hessian has NaN or infinite values.
    """
    D, F = kernel.shape
    damped = _damped(hessian)
    squares, groups = damped.diagonal(), kernel.astype(np.float32).reshape(D // group, group, F)
    scales = symmetric_scales(groups, dtype, squares.reshape(D // group, group) / squares.max())
    order = np.argsort(-squares, kind="stable")
    inverse = _inverse_factor(damped[np.ix_(order, order)])
    weights, steps = kernel.astype(np.float32)[order], scales[order // group]
    values = np.empty((D, F), ml_dtypes.int4)
    for start in range(0, D, _BLOCK):
        end = min(start + _BLOCK, D)
        errors = np.empty((end - start, F), np.float32)
        for i in range(start, end):
            rounded = nearest(weights[i], steps[i])
            values[order[i]] = rounded.astype(ml_dtypes.int4)
            errors[i - start] = (weights[i] - rounded * steps[i]) / inverse[i, i]
            weights[i + 1:end] -= inverse[i, i + 1:end, None] * errors[i - start]
        weights[end:] -= inverse[start:end, end:].T @ errors
    return Int4Kernel(values, scales)


def _damped(hessian: np.ndarray) -> np.ndarray:
    """Returns the damped hessian in float64, which has an inverse though inputs were always 0."""
    damped = np.array(hessian, np.float64)
    if not np.isfinite(damped).all():
        raise UserError("the inputs of a kernel have NaN or infinite values on the calibration data; finite ones were "
                        "expected")
    places, diagonal = np.arange(len(damped)), damped.diagonal().copy()
    mean = diagonal.mean()
    damped[places, places] += DAMPING * mean if mean > 0 else 1
    return damped


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Returns the upper triangular U, float32 [D,D], with Uᵀ U the inverse of a hessian."""
    from scipy.linalg import solve_triangular
    # The lower factor of the reversed matrix, reversed, is an upper factor R of the matrix itself, R Rᵀ; U inverts it.
    factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(factor, np.eye(len(hessian)), overwrite_b=True).astype(np.float32)
