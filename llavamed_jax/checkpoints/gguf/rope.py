"""Reads the scaling of rotary frequencies from GGUF.

llama.cpp writes `linear` as metadata. Llama 3's scaling it writes as a tensor, `rope_freqs.weight`, which holds a
divisor for every frequency and not the four numbers that `config.json` has. They follow from the divisors: with the
wavelength w of a frequency in tokens, its divisor d, and s = (original / w - low) / (high - low), 1/d is
(1 - s) / factor + s, with s limited to 0 to 1 (`convert_hf_to_gguf.py`, transformers' `_compute_llama3_parameters`).
Only the ratios of `original`, `low` and `high` change anything, so `low` is 1 if `original` is then a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.errors import UserError, short

TENSOR = "rope_freqs.weight"
_TOLERANCE = 2e-6  # of 1/d, computed in float32 by the converter
_HIGH, _ORIGINAL = 4.0, 8192  # Llama 3's own, where the divisors leave a choice


def rope_settings(file: GgufFile, architecture: str, head_dim: int, theta: float) -> dict[str, Any]:
    """Returns `rope_scaling` as in a `config.json`; {} without a scaling.

    Args:
      file: the GGUF file.
      architecture: the prefix of the metadata.
      head_dim: width H of a head.
      theta: base of the frequencies.

    Raises:
      UserError: a scaling that is neither `linear` nor Llama 3's.
    """
    prefix = f"{architecture}.rope."
    kind = file.get(f"{prefix}scaling.type", str, "none")
    # Before the type had a key, a factor alone stood for `linear`.
    old = file.get(f"{prefix}scale_linear", float, 1.0)
    factor = file.get(f"{prefix}scaling.factor", float, old)
    if kind not in ("none", "linear"):
        raise UserError(f"{file.path} has {prefix}scaling.type {short(kind)}; none or linear was expected")
    if not 0 < factor < math.inf:
        raise UserError(f"{file.path} has {prefix}scaling.factor {factor}; a number above 0 was expected")
    is_linear = (kind == "linear" or f"{prefix}scaling.type" not in file.keys) and factor != 1
    if TENSOR not in file.tensors:
        return {"rope_type": "linear", "factor": factor} if is_linear else {}
    if is_linear:
        raise UserError(f"{file.path} has {prefix}scaling.factor {factor} beside {TENSOR}; one of them was expected")
    divisors = file.tensors[TENSOR].load().astype(np.float64)
    if divisors.shape != (head_dim // 2,):
        raise UserError(f"{TENSOR} in {file.path} is {list(divisors.shape)}; [{head_dim // 2}] was expected")
    return _of_divisors(file, divisors, theta)


def _of_divisors(file: GgufFile, divisors: np.ndarray, theta: float) -> dict[str, Any]:
    error = UserError(f"{TENSOR} in {file.path} is {short(divisors.tolist())}; the divisors of Llama 3's scaling were "
                      "expected")
    if not (np.isfinite(divisors).all() and (divisors >= 1).all()):
        raise error
    factor = float(str(np.float32(divisors.max())))
    if factor == 1:
        return {}
    if (divisors == divisors[0]).all():
        return {"rope_type": "linear", "factor": factor}
    frequencies = theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)  # waves a token
    for low, high, original in _candidates(1 / divisors, frequencies, factor):
        smooth = np.clip((original * frequencies - low) / (high - low), 0, 1) if high > low > 0 else np.nan
        if np.abs((1 - smooth) / factor + smooth - 1 / divisors).max() <= _TOLERANCE:
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": original}
    raise error


def _candidates(kept: np.ndarray, frequencies: np.ndarray, factor: float) -> Iterator[tuple[float, float, int]]:
    """Yields (low, high, original) that may give 1/divisors `kept`, from the frequencies between the two limits."""
    smooth = (kept - 1 / factor) / (1 - 1 / factor)
    between = (smooth > _TOLERANCE) & (smooth < 1 - _TOLERANCE)
    if between.sum() > 1:  # s is linear in the frequency: its zero is low / original, and its one high / original
        slope, start = np.polyfit(frequencies[between], smooth[between], 1)
        if not (slope > 0 > start):
            return
        at_zero, at_one = -start / slope, (1 - start) / slope
    elif between.any():
        (frequency,), (value,) = frequencies[between], smooth[between]
        at_zero = frequency / (1 + (_HIGH - 1) * value)
        at_one = _HIGH * at_zero
    else:  # any limits between the last frequency that is kept and the first that is divided
        above, below = frequencies[smooth >= 0.5].min(initial=math.inf), frequencies[smooth < 0.5].max(initial=0.0)
        lowest, highest = _HIGH / above, 1 / below
        powers = [2**n for n in range(31) if lowest <= 2**n <= highest]
        for original in ([_ORIGINAL] if _ORIGINAL in powers else []) + powers + [math.ceil(lowest)]:
            yield 1.0, _HIGH, original
        return
    for low in (1.0, 2.0, 4.0, 8.0, 16.0):
        original = round(float(low / at_zero))
        # A fit from rounded values: the published limits are whole numbers or have few digits.
        for digits in (0, 2, 4, 6):
            yield low, round(float(at_one / at_zero * low), digits), original
