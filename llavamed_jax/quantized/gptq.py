"""Rounds a kernel to int4 so that its output changes little on given inputs (GPTQ).

The inputs of a kernel are rounded one by one, in order. The error that rounding one of them makes in the output is made
up for, as far as the inputs vary together, by changing the weights of those that are not rounded yet.

Axis letters: D width of the input, F of the output, G groups of inputs, g inputs of a group.

Source: Frantar et al., 2022, without the order by activations.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.quantized.kernels import Int4Kernel
from llavamed_jax.quantized.rounding import nearest, symmetric_scales

DAMPING = 0.01  # of the mean of the diagonal, added to it
_BLOCK = 128  # inputs whose changes to the later ones are added together; a multiple of every width of a group


def gptq(kernel: np.ndarray, hessian: np.ndarray, group: int, dtype=np.float32) -> Int4Kernel:
    """Rounds a kernel [D,F] to int4 that is symmetric about 0, in groups of inputs.

    The scales of a group are those of its weights as they are when its first input is rounded. An input that was always
    0 is rounded to the nearest.

    Args:
      kernel: the kernel.
      hessian: [D,D], the sum of x xᵀ over the inputs x [D].
      group: g, which divides D.
      dtype: the scales are rounded to values of this dtype.

    Raises:
      UserError: the hessian has NaN or infinite values.
    """
    weights, inverse = np.array(kernel, np.float32), _inverse_factor(hessian)
    D, F = weights.shape
    values, scales = np.empty((D, F), np.float32), np.empty((D // group, F), np.float32)
    for start in range(0, D, _BLOCK):
        end = min(start + _BLOCK, D)
        errors = np.empty((end - start, F), np.float32)
        for i in range(start, end):
            if i % group == 0:
                scales[i // group] = symmetric_scales(weights[None, i:i + group], dtype)[0]
            values[i] = nearest(weights[i], scales[i // group])
            errors[i - start] = (weights[i] - values[i] * scales[i // group]) / inverse[i, i]
            weights[i + 1:end] -= inverse[i, i + 1:end, None] * errors[i - start]
        weights[end:] -= inverse[start:end, end:].T @ errors
    return Int4Kernel(values.astype(ml_dtypes.int4), scales)


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Returns the upper triangular U, float32 [D,D], with Uᵀ U the inverse of the damped hessian."""
    from scipy.linalg import solve_triangular
    damped = np.array(hessian, np.float64)
    if not np.isfinite(damped).all():
        raise UserError("the inputs of a kernel have NaN or infinite values on the calibration data; finite ones were "
                        "expected")
    places = np.arange(len(damped))
    diagonal = damped[places, places]
    damped[places, places] += DAMPING * diagonal.mean() + (diagonal <= 0)  # an input that was always 0 counts as 1
    # The lower factor of the reversed matrix, reversed, is an upper factor R of the matrix itself, R Rᵀ; U inverts it.
    factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(factor, np.eye(len(damped)), overwrite_b=True).astype(np.float32)
