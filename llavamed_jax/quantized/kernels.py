"""Kernels of 8 and 4 bits: pytrees that stand in place of a kernel among the parameters, and their product.

    Int8Kernel   W = values * scale            a scale for each output
    Int4Kernel   W = (values - zero) * scale   a scale, and a zero or none, for each group of inputs and each output
    Nf4Kernel    W = NF4[codes] * absmax       an absmax for each group of inputs and each output

The kernel is widened where it is multiplied, and only there: the arrays that a program is given are those of few bits.

Axis letters: D width of the input, F of the output, G groups of inputs.

Source: nf4 is that of QLoRA (Dettmers et al., 2023) and bitsandbytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# The quantiles of a normal distribution that nf4 stands for, as bitsandbytes has them.
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
                1.0], np.float32)


class Kernel:
    """A kernel of few bits; the first of its arrays has the kernel's shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[D,F], or [L,D,F] for a stack of L layers."""
        return jax.tree.leaves(self)[0].shape

    def widened(self, dtype):
        """Returns the kernel [D,F] in `dtype`."""
        raise NotImplementedError

    def product(self, x, dtype, out_dtype=None):
        """Returns x [..., D] times the kernel: [..., F].

        Args:
          x: the input.
          dtype: dtype of the operands.
          out_dtype: dtype of the product; None for `dtype`.
        """
        return dot(x.astype(dtype), self.widened(dtype), out_dtype)


@flax.struct.dataclass
class Int8Kernel(Kernel):
    """A kernel with a scale for each output.

    Attributes:
      values: int8 [D,F].
      scale: float32 [F].
    """

    values: jax.Array
    scale: jax.Array

    def widened(self, dtype):
        """Returns the kernel [D,F] in `dtype`."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

    def product(self, x, dtype, out_dtype=None):
        """Implements `Kernel.product`: int8 is exact in bfloat16, and the scale may follow the product."""
        y = dot(x.astype(dtype), self.values.astype(dtype), jnp.float32)
        return (y * self.scale).astype(out_dtype or dtype)


@flax.struct.dataclass
class Int4Kernel(Kernel):
    """A kernel with a scale for each group of inputs and each output.

    Attributes:
      values: int4 [D,F].
      scales: float32 [G,F].
      zeros: int8 [G,F], in the values' units; None for a kernel that is symmetric about 0.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None

    def widened(self, dtype):
        """Returns the kernel [D,F] in `dtype`."""
        values = _grouped(self.values.astype(jnp.float32), self.scales)
        values = values if self.zeros is None else values - self.zeros[:, None].astype(jnp.float32)
        return (values * self.scales[:, None]).reshape(self.shape).astype(dtype)


@flax.struct.dataclass
class Nf4Kernel(Kernel):
    """A kernel of nf4 codes.

    Attributes:
      codes: uint4 [D,F], indices into `NF4`.
      absmax: float32 [G,F].
    """

    codes: jax.Array
    absmax: jax.Array

    def widened(self, dtype):
        """Returns the kernel [D,F] in `dtype`."""
        values = jnp.take(jnp.asarray(NF4), self.codes.astype(jnp.int32), axis=0)
        return (_grouped(values, self.absmax) * self.absmax[:, None]).reshape(self.shape).astype(dtype)


def axes_of(rules: Sequence[tuple[str, tuple[str | None, ...]]]) -> list[tuple[str, tuple[str | None, ...]]]:
    """Returns the logical axes of the arrays of a kernel of few bits, for those of the kernels it may stand in for.

    Args:
      rules: pairs of a name pattern and logical axes; those of matrices under `…/kernel` count.
    """
    out = []
    for pattern, axes in rules:
        if pattern.endswith("/kernel") and len(axes) == 2:
            out += [(f"{pattern}/(values|codes)", axes), (f"{pattern}/scale", axes[1:]),
                    (f"{pattern}/(scales|zeros|absmax)", (None, axes[1]))]
    return out


def dot(x, kernel, out_dtype=None):  # [..., D], [D,F] -> [..., F]
    """Returns the product over the last axis of `x`, in `out_dtype`; None for the operands' dtype."""
    is_wider = out_dtype is not None and jnp.dtype(out_dtype) != x.dtype
    if math.prod(x.shape[:-1]) == 1 and (is_wider or kernel.size < _LIBRARY):
        return jax.lax.platform_dependent(x, kernel, cuda=functools.partial(_of_one_row, out_dtype=out_dtype),
                                          default=functools.partial(_product, out_dtype=out_dtype))
    return _product(x, kernel, out_dtype)


# Numbers of a kernel from which on XLA gives the product of one row to cuBLAS. It computes smaller ones by an
# elementwise product that it writes out and then sums, and converts a kernel whose product is wider.
_LIBRARY = 2**24


def _of_one_row(x, kernel, out_dtype):
    """Computes the product of one row on a GPU as that of two rows, which XLA gives to cuBLAS as it is."""
    two = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    return _product(two, kernel, out_dtype)[:1].reshape(*x.shape[:-1], -1)


def _product(x, kernel, out_dtype):
    # Not `jnp.matmul`: it is jitted, and quantisers that intercept `dot_general` would miss its cached trace.
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)


def _grouped(values, by_group):
    """Splits [D,F] into [G,D/G,F]."""
    G, F = by_group.shape
    return values.reshape(G, -1, F)
