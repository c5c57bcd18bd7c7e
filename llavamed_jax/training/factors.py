"""Checks that a recipe trains low-rank factors in place of their kernels, and all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llavamed_jax.config.adapter import FACTOR_A, FACTOR_B, KERNEL
from llavamed_jax.errors import UsageError, some
from llavamed_jax.training import layers

_EXPECTED = ("the factors alone were expected, such as 'decoder/.*_lora_[ab]' beside 'projector/.*', or a lora.rank of "
             "0 to train the kernels")


def check(params: Mapping[str, Any], trained: Mapping[str, Any], partly: Mapping[str, np.ndarray],
          are_fresh: bool) -> None:
    """Checks which factors and kernels are trained, layer by layer.

    Args:
      params: every parameter by name, arrays or shapes; layers stacked.
      trained: those that the recipe trains.
      partly: by name, which layers of a stack are trained, bool [L] (`layers.partly_trained`).
      are_fresh: whether the run begins with factors of its own, whose B is 0.

    Raises:
      UsageError: a kernel and its factors are trained; a fresh B is not, and stays 0.
    """
    sizes = layers.depths(params)

    def where(name: str) -> np.ndarray:
        return partly.get(name, np.full(sizes[name] or (), name in trained))

    modules = [name.removesuffix(FACTOR_B) for name in params if name.endswith(FACTOR_B)]
    both = [module + KERNEL for module in modules
            if (where(module + KERNEL) & (where(module + FACTOR_A) | where(module + FACTOR_B))).any()]
    if both:
        raise UsageError(f"the config key 'trainable' names {some(sorted(both), 3)} and the factors beside it too; "
                         f"{_EXPECTED}")
    idle = [module + FACTOR_B for module in modules if not where(module + FACTOR_B).all()] if are_fresh else []
    if idle:
        raise UsageError(f"the config key 'trainable' does not name {some(sorted(idle), 3)}, which 'lora.targets' adds "
                         "and which would stay 0 and do nothing; all factors that are added were expected in "
                         "'trainable', or fewer targets")
