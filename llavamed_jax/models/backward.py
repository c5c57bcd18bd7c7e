"""The order of the backward pass: gradients of a block's kernels come before what lies in front of the block.

No gradient of a kernel is needed before the update, so XLA for GPUs computes those of a layer after all else, the
largest last. A scan's round then ends with a wait until the largest gradient is summed over the devices, and arrays
that only these products take are kept, or copied, until then.

Axis letters: D width of the input, F of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax

from llavamed_jax.config.adapter import FACTOR_A

_FACTOR = FACTOR_A.removeprefix("/")


def kernels_first(module: nn.Module, x, parts: Sequence[str]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the input of a block and its kernels; on a GPU their gradients are computed before that of the input.

    Args:
      module: the block, inside its compact method. It has `dtype`.
      x: the input [..., D].
      parts: names of linear layers in the block. One without a kernel of its own, as in `joined`, with one of few bits
        or with an adapter is left out: an adapter's kernel is frozen, and its gradient is not to be computed.

    Returns:
      x, and the kernels [D,F] in `dtype`, by part, for `Linear`.
    """
    given = {part: module.get_variable("params", part) or {} for part in parts}
    kernels = {part: leaves["kernel"].astype(module.dtype) for part, leaves in given.items()
               if isinstance(leaves.get("kernel"), jax.Array) and _FACTOR not in leaves}
    return _kernels_first(x, kernels) if kernels else (x, {})


@jax.custom_vjp
def _kernels_first(x, kernels):
    return x, kernels


def _forward(x, kernels):
    trained = {part: () if kernel.perturbed else None for part, kernel in kernels.items()}
    return (x.value, {part: kernel.value for part, kernel in kernels.items()}), trained


def _backward(trained, by):
    by_x, by_kernels = by
    wanted = {part: by_kernels[part] for part, mark in trained.items() if mark is not None}
    if wanted:
        by_x, wanted = jax.lax.platform_dependent(by_x, wanted, cuda=_at_once, default=_as_they_come)
    return by_x, {part: wanted.get(part) for part in by_kernels}


def _at_once(by_x, by_kernels: Mapping[str, jax.Array]):
    """Returns gradients of which none is used before all are computed."""
    return jax.lax.optimization_barrier((by_x, by_kernels))


def _as_they_come(by_x, by_kernels: Mapping[str, jax.Array]):
    return by_x, by_kernels


_kernels_first.defvjp(_forward, _backward, symbolic_zeros=True)
