"""A tensor that is read from its file on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # imports jax, which a processor does without
    from llavamed_jax.quantized.kernels import Kernel


class FewBits(NamedTuple):
    """A kernel that its file has in few bits.

    Attributes:
      name: how it was rounded, `int8` or `int4`.
      load: reads the kernel, in this project's orientation.
    """

    name: str
    load: Callable[[], Kernel]


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory yet.

    Attributes:
      shape: the tensor's shape.
      dtype: the dtype that `load` returns.
      load: reads the tensor; a kernel of few bits is widened to `dtype`.
      few_bits: the kernel as its file has it; None for a tensor that is not of few bits.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    few_bits: FewBits | None = None

    def widened(self) -> "Tensor":
        """Returns a kernel of few bits as float32, its exact values, which `dtype` may round; others as they are."""
        if self.few_bits is None:
            return self
        return Tensor(self.shape, np.dtype(np.float32), lambda: self.few_bits.load().widened(np.float32), self.few_bits)
