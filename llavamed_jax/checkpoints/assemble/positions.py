"""Interpolates a tower's position table for images of another size, as transformers' `interpolate_pos_encoding` does.

Axis letters: P patches, T positions, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UsageError

_TABLE = "position_embedding"
_CUBIC = -0.75  # the parameter of torch's bicubic kernel


def with_image_size(config: LlavaConfig, tensors: Mapping[str, Tensor],
                    size: int) -> tuple[LlavaConfig, dict[str, Tensor]]:
    """Returns a model whose tower takes images of `size` x `size` pixels, with its position table interpolated.

    Args:
      config: the model's config.
      tensors: its tensors by canonical name.
      size: edge of the new input in pixels.

    Returns:
      The new config and tensors.

    Raises:
      UsageError: the size is smaller than a patch.
    """
    old = config.vision
    if size < old.patch_size:
        raise UsageError(f"the image size is {size}; a whole number of at least {old.patch_size}, the tower's patch, "
                         "was expected")
    resize = (size,) * len(old.images.resize) if old.images.resize in ((old.image_size,), (old.image_size,) * 2) else (
        old.images.resize)
    vision = dataclasses.replace(old, image_size=size, images=dataclasses.replace(old.images, resize=resize))
    name = next(name for name in tensors if name.startswith("vision_tower/") and _TABLE in name)
    table = tensors[name]
    shape = (*table.shape[:-2], vision.num_positions, table.shape[-1])

    def load() -> np.ndarray:
        return interpolated(table.load(), old.class_tokens, size // old.patch_size)

    return config.replace(vision=vision), {**tensors, name: Tensor(shape, table.dtype, load)}


def interpolated(table: np.ndarray, class_tokens: int, side: int) -> np.ndarray:
    """Returns a position table for `side` x `side` patches; positions of class tokens stay as they are.

    Args:
      table: [...,T,D].
      class_tokens: positions before the patches.
      side: patches along an edge.

    Returns:
      [...,class_tokens + side * side,D], computed in float64 and returned in the table's dtype.

    Source: torch's `interpolate(mode="bicubic", align_corners=False)`.
    """
    tokens, patches = table[..., :class_tokens, :], table[..., class_tokens:, :]
    old = math.isqrt(patches.shape[-2])
    if old == side:
        return table
    weights = _weights(old, side)
    grid = patches.reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("yh,xw,hwd->yxd", weights, weights, grid, optimize=True)
    return np.concatenate([tokens, grid.reshape(*table.shape[:-2], side * side, -1).astype(table.dtype)], axis=-2)


def _weights(old: int, new: int) -> np.ndarray:
    """Returns the weight of each old point in each new one, float64 [new,old]; beyond the edge the edge is repeated."""
    out = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        first = math.floor(place)
        for j in range(first - 1, first + 3):
            out[i, min(max(j, 0), old - 1)] += _kernel(abs(place - j))
    return out


def _kernel(x: float) -> float:
    """Returns the value of the cubic kernel at a distance from 0 to 2."""
    a = _CUBIC
    return ((a + 2) * x - (a + 3)) * x * x + 1 if x <= 1 else ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
