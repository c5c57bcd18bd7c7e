"""How an export rounds the kernels of the decoder's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.load import refuse_few_bits
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.compressed import BITS
from llavamed_jax.errors import UsageError, short
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.quantized.rounding import ROUNDED, group_of, int4, int8


@dataclass(frozen=True)
class Rounding:
    """A rounding of a checkpoint's kernels.

    `int4` is symmetric about 0: transformers 5.24 does not load the zeros that compressed-tensors packs.

    Attributes:
      name: `int4` or `int8`.
      group: width of a group of `int4`, one for all kernels: readers take the width from a setting of the whole model.
        None for `int8`.
      dtype: of the scales; None for that of each kernel, which is the dtype that readers compute in.
      calibrate: rounds the kernels with data, and returns what loads each by name (`calibrate.calibrated`); an export
        calls it when it has checked all else. None rounds each to the nearest.
    """

    name: str
    group: int | None
    dtype: np.dtype | None = None
    calibrate: Callable[[], Mapping[str, Callable[[], Kernel]]] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, dtype: np.dtype | None = None) -> Rounding:
        """Checks that a checkpoint's kernels can be rounded for an export.

        Raises:
          UserError: compressed-tensors' format has no such kernels, the checkpoint has kernels of few bits, or no group
            divides every width.
        """
        if name not in BITS:
            raise UsageError(f"quantize is {short(name)}; {' or '.join(sorted(BITS))}, of which compressed-tensors has "
                             "a format, was expected")
        refuse_few_bits(checkpoint, name)
        widths = [shape[0] for key, shape in names.expected_shapes(checkpoint.config).items() if ROUNDED.fullmatch(key)]
        return cls(name, group_of(*widths) if name == "int4" else None, None if dtype is None else np.dtype(dtype))

    def nearest(self, tensor: Tensor) -> Kernel:
        """Returns the kernel that is the nearest to a tensor [D,F]."""
        dtype = self.dtype or tensor.dtype
        return int8(tensor.load(), dtype) if self.group is None else int4(tensor.load(), self.group, True, dtype)

    @property
    def words(self) -> str:
        """Describes the rounding for people."""
        where = "a scale for each output" if self.group is None else f"symmetric groups of {self.group} inputs"
        return f"{self.name} ({where}{', calibrated' * (self.calibrate is not None)})"
