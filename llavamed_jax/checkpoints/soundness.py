"""Whether weights are such as a training could leave, and what another type of number loses of them.

Everything that computes with weights or writes them (`load`, `eval`, a run's start, `import`, `export`, `build`) reads them through
`Checkpoint.sound`; `inspect` and `verify` read them as they are, so that damaged weights can be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import DTYPES
from llavamed_jax.errors import UserError, some, warn

# The bits of each type's infinity without the sign: above it lies NaN, below it every number.
_INFINITY = {DTYPES["F64"]: 0x7FF0000000000000, DTYPES["F32"]: 0x7F800000, DTYPES["F16"]: 0x7C00, DTYPES["BF16"]: 0x7F80}
_CHUNK = 2**16  # elements that are looked at together: they stay in the processor's cache
_NORMS = re.compile(r"decoder/(layers_\d+/(input|post_attention)_layernorm|norm)/scale")
# Scales of RMSNorm begin at 1. In LLaMA, Vicuna and Mistral they are 0.3 to 5 on average, in what fine-tuning changes of them 0.001.
_SMALL_NORM, _SMALL_LAST_NORM = 0.05, 0.2


def _magnitudes(array: np.ndarray) -> Iterable[np.ndarray]:
    """The bits of an array without their signs, shifted by one place, chunk by chunk: they compare as magnitudes do."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    buffer = np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start:start + _CHUNK]
        yield np.left_shift(chunk, 1, out=buffer[:chunk.size])


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is infinite or NaN. As fast as memory, for bfloat16 too, which numpy's own `isfinite` is not."""
    limit = _INFINITY[array.dtype] << 1
    return all(chunk.max() < limit for chunk in _magnitudes(array))


def is_zero(array: np.ndarray) -> bool:
    """Whether every element is 0, of either sign."""
    return not any(chunk.any() for chunk in _magnitudes(array))


def what_is_not_finite(array: np.ndarray) -> str:
    """How many elements are NaN and how many infinite, in words."""
    wide = array.astype(np.float64)
    counts = {"NaN": np.count_nonzero(np.isnan(wide)), "infinite": np.count_nonzero(np.isinf(wide))}
    return " and ".join(f"{count} {word}" for word, count in counts.items() if count) + f" among {array.size} values"


def _can_lose(source: np.dtype, target: np.dtype) -> bool:
    """Whether a finite value of one type may be infinite or 0 in the other."""
    import ml_dtypes  # numpy's finfo does not know bfloat16
    old, new = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return float(new.max) < float(old.max) or float(new.smallest_subnormal) > float(old.smallest_subnormal)


class Tally:
    """Counts what a passage of weights loses, and says it once at the end (`warn`).

    Attributes:
      vanished: by type of number and tensor, how many values other than 0 became 0.
      zeros: kernels and tables that hold zeros alone.
    """

    def __init__(self):
        self.vanished: dict[str, dict[str, int]] = {}
        self.zeros: dict[str, None] = {}

    def cast(self, name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The array in another type of number, each value the nearest one.

        Rounding is what a cast is for and is not counted. A value too small for the type becomes 0, which is counted.

        Raises:
          UserError: a value is beyond the type's largest.
        """
        array, dtype = np.asarray(array), np.dtype(dtype)
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # said below
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
            raise UserError(f"{name} has {beyond} of {out.size} values beyond {float(ml_dtypes.finfo(dtype).max):.5g}, the largest of "
                            f"{dtype.name}; {array.dtype.name} holds them{', bfloat16 too' * (dtype == np.float16)}")
        if lost:
            self.vanished.setdefault(dtype.name, {})[name] = lost
        return out

    def look(self, name: str, array: np.ndarray, where: str = "") -> np.ndarray:
        """The array as it is. Raises UserError where it holds NaN or infinity; notes kernels and tables of zeros."""
        if not is_finite(array):
            raise UserError(f"{where}{name} holds {what_is_not_finite(array)}; weights that are numbers were expected")
        if name.endswith(("/kernel", "/embedding")) and array.size and not array.flat[0] and is_zero(array):
            self.zeros[name] = None
        return array

    def warn(self) -> None:
        """Says what was counted since the last call."""
        for dtype, tensors in self.vanished.items():
            warn(f"{sum(tensors.values())} values are too small for {dtype} and became 0, in {len(tensors)} tensors: "
                 f"{some(list(tensors), 3)}")
        if self.zeros:
            warn(f"{len(self.zeros)} kernels hold zeros alone, as weights that were never filled do: {some(list(self.zeros), 3)}")
        self.vanished, self.zeros = {}, {}


def norms_are_small(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the decoder's norms scale by about 0, as in the difference of two models; no model's do."""
    scales = {name: tensor.load().astype(np.float64) for name, tensor in tensors.items() if _NORMS.fullmatch(name)}
    if "decoder/norm/scale" not in scales:  # a run's base has what is not trained alone
        return False
    everywhere = np.concatenate(list(scales.values())).mean()
    return bool(abs(everywhere) < _SMALL_NORM and abs(scales["decoder/norm/scale"].mean()) < _SMALL_LAST_NORM)
