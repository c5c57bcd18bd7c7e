"""Names of single layers in stacks, by which a recipe trains some layers of a stack or gives them a learning rate.

A stack of L layers is one array with a leading axis L (`vision_tower/layers/mlp/fc1/kernel`). A regular expression of a
recipe may match the stack's name, the name of one layer, as files have it (`vision_tower/layers_21/mlp/fc1/kernel`), or
the same counted from the end: `vision_tower/layers_-1/…` is the last layer.

A stack of which only some layers are trained stays one array. The loss has no gradient in its other layers, so that
the gradient's norm, clipping and moments exclude them, and they keep their bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_STACK = "/layers/"
# Name of a parameter -> its number of layers; 0 if it is not a stack.
Depths = Mapping[str, int]


def depths(params: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns the number of layers of each parameter, 0 for one that is not a stack.

    Args:
      params: arrays or shapes by name.
    """
    return {name: x.shape[0] if _STACK in name else 0 for name, x in params.items()}


def matched(regex: str, name: str, depth: int) -> np.ndarray:
    """Returns where a regular expression matches: bool [L] for a stack of L layers, bool [] for another parameter.

    Args:
      regex: has to match a whole name.
      name: the parameter's name.
      depth: L, or 0.
    """
    if re.fullmatch(regex, name):
        return np.ones(depth or (), bool)
    if not depth:
        return np.zeros((), bool)
    is_matched = lambda number: re.fullmatch(regex, name.replace(_STACK, f"/layers_{number}/")) is not None
    return np.array([is_matched(i) or is_matched(i - depth) for i in range(depth)])


def partly_trained(regexes: Iterable[str], sizes: Depths) -> dict[str, np.ndarray]:
    """Returns which layers are trained, bool [L], for each stack of which some layers are and others are not."""
    found = {}
    for name, depth in sizes.items():
        is_trained = np.zeros(depth or (), bool)
        for regex in regexes:
            is_trained = is_trained | matched(regex, name, depth)
        if is_trained.any() and not is_trained.all():
            found[name] = is_trained
    return found


def along_layers(values: np.ndarray, ndim: int) -> np.ndarray:
    """Returns values [L] with axes of 1 behind, [L,1,…] of `ndim` axes; a value [] as it is."""
    return values.reshape(values.shape + (1,) * (ndim - 1)) if values.ndim else values


def only_layers(loss_fn: Callable, trained: Mapping[str, np.ndarray]) -> Callable:
    """Returns the same loss without a gradient in the layers that are not trained.

    Args:
      loss_fn: the loss of nested parameters and a batch.
      trained: by name, bool [L] (`partly_trained`).
    """
    def loss(params, batch):
        flat = flatten_dict(params, sep="/")
        for name, is_trained in trained.items():
            x = flat[name]
            flat[name] = jnp.where(along_layers(is_trained, x.ndim), x, jax.lax.stop_gradient(x))
        return loss_fn(unflatten_dict(flat, sep="/"), batch)
    return loss
