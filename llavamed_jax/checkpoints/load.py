"""Loads the parameter tree of the model from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Container

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.nested import nest
from llavamed_jax.utils import signals


def load_params(checkpoint: Checkpoint, dtype=None, scan: bool = False, only: Container[str] | None = None) -> dict:
    """The parameters of a checkpoint that the model computes with.

    Args:
      dtype: of every array; None keeps each tensor's own.
      scan: stacked layers (`layers`, leading axis L) as training has them; else `layers_{i}`.
      only: names of what is read, one a layer; None: all.
    Returns:
      Nested dicts of numpy arrays (bfloat16 through ml_dtypes), in the form of `models.llava`.
    Raises:
      UserError: a delta in a model's place, or values that are not finite, in the file or in `dtype`.
    """
    checkpoint = checkpoint.cast(dtype).sound()
    shapes = {name: shape for name, shape in names.expected_shapes(checkpoint.config).items() if only is None or name in only}
    flat: dict[str, np.ndarray] = {}
    for name in signals.checked(shapes):
        layer = re.fullmatch(r"(.*/)layers_(\d+)(/.*)", name) if scan else None
        if layer is None:
            flat[name] = checkpoint.read(name)
            continue
        stacked = f"{layer[1]}layers{layer[3]}"
        if stacked not in flat:  # filled in place: a stack of copies would hold the model twice
            length = sum(re.sub(r"layers_\d+", "layers", other) == stacked for other in shapes)
            dtypes = {checkpoint.tensors[f"{layer[1]}layers_{i}{layer[3]}"].dtype for i in range(length)}
            flat[stacked] = np.empty((length, *shapes[name]), np.result_type(*dtypes))
        flat[stacked][int(layer[2])] = checkpoint.read(name)
    checkpoint.tally.warn()
    return nest(flat)








