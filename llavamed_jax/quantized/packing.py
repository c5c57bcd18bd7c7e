"""Packs values of 4 and 8 bits into words of 32 bits, as compressed-tensors does, and unpacks them.

A value v of b bits is stored as v + 2^(b-1), the first of a row in the lowest bits of its first word; a row ends with
zeros to a whole word.

Axis letters: R rows, N values of a row, W words of a row.

Source: `pack_to_int32` and `unpack_from_int32` of compressed-tensors 0.20.
"""

from __future__ import annotations

import numpy as np


def words(count: int, bits: int) -> int:
    """Returns the number of words that `count` values take."""
    return -(-count * bits // 32)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers [R,N] of `bits` (4 or 8) bits into int32 [R,W]."""
    R, N = values.shape
    stored = np.zeros((R, words(N, bits) * 32 // bits), np.uint8)
    stored[:, :N] = values.astype(np.int16) + 2**(bits - 1)
    if bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    return np.ascontiguousarray(stored).view("<i4")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Reverses `pack`: int32 [R,W] as int8 [R,`count`]."""
    stored = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(packed), -1)
    return (stored[:, :count].astype(np.int16) - 2**(bits - 1)).astype(np.int8)
