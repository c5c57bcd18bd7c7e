"""GPTQ: equal to the textbook's update, robust, and better than rounding to the nearest on inputs that it has not seen."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.quantized.gptq import DAMPING, gptq
from llavamed_jax.quantized.rounding import int4


def inputs(rows, D, seed):
    """Inputs that vary together, in a quarter of the directions, as those of a decoder."""
    mixing, rng = np.random.default_rng(7).standard_normal((D // 4, D)), np.random.default_rng(seed)
    return rng.standard_normal((rows, D // 4)) @ mixing + 0.5 * rng.standard_normal((rows, D))


def textbook(kernel, hessian, group, dtype):
    """The input with the largest square is rounded, and the others change by -(error / H⁻¹[0,0]) H⁻¹[0,1:] of what is left.

    The scales, of seven, have the least squared error in the output by the diagonal alone. All in float64.
    """
    weights, H = kernel.astype(np.float64), hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    scales = np.empty((len(kernel) // group, kernel.shape[1]))
    for g in range(len(scales)):
        part, important = weights[g * group:(g + 1) * group], np.diag(H)[g * group:(g + 1) * group, None]
        several = [np.float64((np.abs(part).max(0) / number).astype(dtype)) for number in (6, 6.5, 7, 7.5, 8, 8.5, 9)]
        errors = [(important * (np.clip(np.round(part / s), -8, 7) * s - part) ** 2).sum(0) for s in several]
        scales[g] = np.choose(np.argmin(errors, 0), several)
    values, left = np.zeros_like(weights), list(np.argsort(-np.diag(H), kind="stable"))
    while left:
        i = left.pop(0)
        inverse = np.linalg.inv(H[np.ix_([i, *left], [i, *left])])
        values[i] = np.clip(np.round(weights[i] / scales[i // group]), -8, 7)
        weights[left] -= inverse[0, 1:, None] / inverse[0, 0] * (weights[i] - values[i] * scales[i // group])
    return values, scales


@pytest.mark.parametrize("D, group, dtype", [(64, 32, np.float32), (160, 32, ml_dtypes.bfloat16)])
def test_the_update_is_the_textbooks(D, group, dtype):
    kernel, x = np.random.default_rng(1).standard_normal((D, 24)).astype(np.float32), inputs(4 * D, D, 2)
    found, (values, scales) = gptq(kernel, x.T @ x, group, dtype), textbook(kernel, x.T @ x, group, dtype)
    assert found.zeros is None and found.values.dtype == ml_dtypes.int4 and found.scales.shape == (D // group, 24)
    # A value in the middle between two, or the choice between two scales, may fall the other way in float32.
    same = (found.values.astype(int) == values).all(0) & np.isclose(found.scales, scales, rtol=1e-5).all(0)
    assert same.mean() > 0.9, same.mean()


def test_less_error_on_other_inputs():
    kernel, x, other = np.random.default_rng(1).standard_normal((256, 40)).astype(np.float32), inputs(2000, 256, 2), inputs(500, 256, 3)
    error = lambda rounded: np.linalg.norm(other @ (np.asarray(rounded.widened(jnp.float32)) - kernel)) / np.linalg.norm(other @ kernel)
    assert error(gptq(kernel, x.T @ x, 64)) < 0.5 * error(int4(kernel, 64, True))


def test_inputs_that_do_not_vary_together_change_nothing():
    kernel = np.random.default_rng(1).standard_normal((128, 16)).astype(np.float32)
    found, plain = gptq(kernel, 3 * np.eye(128), 64), int4(kernel, 64, True)
    assert np.array_equal(found.values, plain.values) and np.array_equal(found.scales, plain.scales)


def test_inputs_that_were_always_0_and_few_rows():
    kernel, x = np.random.default_rng(1).standard_normal((128, 16)).astype(np.float32), inputs(3, 128, 2)
    x[:, 5:40] = 0
    found = gptq(kernel, x.T @ x, 64)
    plain = np.clip(np.rint(kernel[5] / found.scales[0]), -8, 7)
    changed = (found.values.astype(int) != np.asarray(int4(kernel, 64, True).values).astype(int)).mean()
    assert np.isfinite(found.scales).all() and np.array_equal(found.values[5].astype(np.float32), plain) and 0 < changed < 0.6
    nothing = gptq(kernel, np.zeros((128, 128)), 64)
    assert np.array_equal(nothing.values, int4(kernel, 64, True).values)
    zeros = gptq(np.zeros((64, 4), np.float32), np.eye(64), 32)
    assert not np.asarray(zeros.values).any() and (zeros.scales == 1).all()
    with pytest.raises(UserError, match="NaN or infinite values on the calibration data"):
        gptq(kernel, np.full((128, 128), np.nan), 64)
