"""Checks that weights are finite and plausible, and counts what a cast loses.

Everything that computes with weights or writes them (`load`, `eval`, a run's start, `import`, `export`, `build`) reads
them through `Checkpoint.sound`; `inspect` and `verify` read them unchecked, so that damaged weights can be examined. An
adapter's tensors are checked by `adapters.peft` wherever they are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import DTYPES
from llavamed_jax.errors import UserError, count_of, some, warn

if TYPE_CHECKING:  # imports jax
    from llavamed_jax.quantized.kernels import Kernel

# The bits of each dtype's infinity without the sign: NaN is above it, every number below.
_INFINITY = {DTYPES["F64"]: 0x7FF0000000000000, DTYPES["F32"]: 0x7F800000, DTYPES["F16"]: 0x7C00,
             DTYPES["BF16"]: 0x7F80}
_CHUNK = 2**16  # elements that are checked together: they stay in the processor's cache
_NORMS = re.compile(r"decoder/(layers_\d+/(input|post_attention)_layernorm|norm)/scale")
# Scales of RMSNorm begin at 1. In LLaMA, Vicuna and Mistral their mean is 0.3 to 5; fine-tuning changes them by about
# 0.001.
_SMALL_NORM, _SMALL_LAST_NORM = 0.05, 0.2


def _magnitudes(array: np.ndarray) -> Iterable[np.ndarray]:
    """Yields an array's bits without the signs, shifted by one place, in chunks; the bits compare as magnitudes do."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    buffer = np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start:start + _CHUNK]
        yield np.left_shift(chunk, 1, out=buffer[:chunk.size])


def is_finite(array: np.ndarray) -> bool:
    """Returns whether no element is infinite or NaN, at memory speed also for bfloat16, unlike numpy's `isfinite`."""
    limit = _INFINITY[array.dtype] << 1
    return all(chunk.max() < limit for chunk in _magnitudes(array))


def is_zero(array: np.ndarray) -> bool:
    """Returns whether every element is 0, of either sign."""
    return not any(chunk.any() for chunk in _magnitudes(array))


def what_is_not_finite(array: np.ndarray) -> str:
    """Returns the numbers of NaN and infinite elements in words."""
    wide = array.astype(np.float64)
    counts = {"NaN": np.count_nonzero(np.isnan(wide)), "infinite": np.count_nonzero(np.isinf(wide))}
    return " and ".join(f"{count} {word}" for word, count in counts.items() if count) + f" among {array.size} values"


def _can_lose(source: np.dtype, target: np.dtype) -> bool:
    """Returns whether a finite value of one dtype may be infinite or 0 in the other."""
    import ml_dtypes  # numpy's finfo does not know bfloat16
    old, new = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return float(new.max) < float(old.max) or float(new.smallest_subnormal) > float(old.smallest_subnormal)


class Tally:
    """Counts the losses while weights are read, and warns of them once at the end (`warn`).

    Attributes:
      vanished: dtype -> tensor -> number of nonzero values that became 0.
      zeros: kernels and tables that hold only zeros.
      widened: dtype -> kernels that the files have in few bits and that were read in this dtype.
    """

    def __init__(self):
        self.vanished: dict[str, dict[str, int]] = {}
        self.zeros: dict[str, None] = {}
        self.widened: dict[str, set[str]] = {}

    def cast(self, name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Casts an array to another dtype, each value to the nearest one.

        Rounding is expected and not counted. Values that are too small for the dtype become 0 and are counted.

        Args:
          name: the tensor's name, for messages.
          array: the array.
          dtype: the dtype to cast to.

        Raises:
          UserError: a value exceeds the dtype's largest.
        """
        array, dtype = np.asarray(array), np.dtype(dtype)
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # reported below
            out = array.astype(dtype)
        if dtype not in _INFINITY or array.dtype not in _INFINITY or not _can_lose(array.dtype, dtype):
            return out
        limit, source, lost, beyond = _INFINITY[dtype] << 1, array.reshape(-1), 0, 0
        for start, chunk in zip(range(0, out.size, _CHUNK), _magnitudes(out)):
            if np.count_nonzero(chunk) < chunk.size:
                lost += np.count_nonzero(source[start:start + _CHUNK][chunk == 0])
            if chunk.max() >= limit:
                beyond += np.count_nonzero(np.isfinite(source[start:start + _CHUNK][chunk >= limit].astype(np.float64)))
        if beyond:
            import ml_dtypes
            raise UserError(f"{name} has {beyond} of {out.size} values beyond {float(ml_dtypes.finfo(dtype).max):.5g}, "
                            f"the largest {dtype.name}; {array.dtype.name} can hold them"
                            f"{', and so can bfloat16' * (dtype == np.float16)}")
        if lost:
            self.vanished.setdefault(dtype.name, {})[name] = lost
        return out

    def look(self, name: str, array: np.ndarray, where: str = "") -> np.ndarray:
        """Checks an array and returns it unchanged; notes kernels and tables of zeros.

        Args:
          name: the tensor's name.
          array: the array.
          where: the beginning of an error's sentence.

        Raises:
          UserError: the array has NaN or infinite values.
        """
        if not is_finite(array):
            raise UserError(f"{where}{name} holds {what_is_not_finite(array)}; finite weights were expected")
        if name.endswith(("/kernel", "/embedding")) and array.size and not array.flat[0] and is_zero(array):
            self.zeros[name] = None
        return array

    def look_scales(self, name: str, kernel: Kernel, where: str = "") -> Kernel:
        """Checks the scales of a kernel of few bits as `look` checks an array, and returns the kernel."""
        for array in vars(kernel).values():
            if array is not None and array.dtype == np.float32 and not is_finite(array):
                raise UserError(f"{where}{name} has scales with {what_is_not_finite(array)}; finite weights were "
                                "expected")
        return kernel

    def warn(self) -> None:
        """Warns of the losses since the last call."""
        for dtype, tensors in self.vanished.items():
            warn(f"{sum(tensors.values())} values are too small for {dtype} and became 0, in {len(tensors)} tensors: "
                 f"{some(list(tensors), 3)}")
        if self.zeros:
            warn(f"{len(self.zeros)} kernels hold only zeros, like weights that were never filled: "
                 f"{some(list(self.zeros), 3)}")
        for dtype, kernels in self.widened.items():
            warn(f"{count_of(len(kernels), 'kernel')} of few bits {'was' if len(kernels) == 1 else 'were'} widened to "
                 f"{dtype}")
        self.vanished, self.zeros, self.widened = {}, {}, {}


def norms_are_small(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether the decoder's norm scales are about 0, as in the difference of two models and in no model."""
    scales = {name: tensor.load().astype(np.float64) for name, tensor in tensors.items() if _NORMS.fullmatch(name)}
    if "decoder/norm/scale" not in scales:  # a run's base has only the frozen tensors
        return False
    everywhere = np.concatenate(list(scales.values())).mean()
    return bool(abs(everywhere) < _SMALL_NORM and abs(scales["decoder/norm/scale"].mean()) < _SMALL_LAST_NORM)
