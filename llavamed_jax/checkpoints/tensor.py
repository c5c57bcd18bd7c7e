"""A tensor that is read from its file on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory yet.

    Attributes:
      shape: the tensor's shape.
      dtype: the dtype that `load` returns.
      load: reads the tensor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
