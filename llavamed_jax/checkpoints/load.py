"""Loads the parameter tree of the model from a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Collection, Container

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import DROPOUT, FACTOR_A, SCALE
from llavamed_jax.errors import UserError
from llavamed_jax.models.stacking import in_stack, stack
from llavamed_jax.quantized.rounding import ROUNDED, ROUNDINGS
from llavamed_jax.utils import signals


def load_params(checkpoint: Checkpoint, dtype=None, scan: bool = False, only: Container[str] | None = None,
                quantize: str | None = None, as_stored: bool = False) -> dict:
    """Reads the parameters of a checkpoint that the model computes with.

    Args:
      checkpoint: the checkpoint.
      dtype: dtype of every array; None keeps each tensor's own.
      scan: stacked layers (`layers`, leading axis L), as in training; else `layers_{i}`.
      only: names of the tensors to read, one a layer; None reads all.
      quantize: rounds the kernels of the decoder's layers as they are read (`quantized.rounding.ROUNDINGS`), from each
        tensor's own dtype. None rounds nothing.
      as_stored: kernels that the files have in few bits stay so; else they are widened.

    Returns:
      Nested dicts of numpy arrays (bfloat16 through ml_dtypes), in the structure of `models.llava`; a rounded kernel is
      a `quantized.kernels.Kernel`.

    Raises:
      UserError: no group of inputs divides a kernel's width; kernels are to be rounded that the files have in few bits;
        the checkpoint is a delta, or has values that are not finite, in the file or in `dtype`.
    """
    refuse_few_bits(checkpoint, quantize)
    exact = None if quantize is None else checkpoint.sound()
    checkpoint = checkpoint.cast(dtype).sound()
    shapes = {name: shape for name, shape in names.expected_shapes(checkpoint.config).items()
              if only is None or name in only}
    places = {name: place for name in shapes if scan and (place := in_stack(name)) is not None}
    layers: dict[str, list[str]] = {}  # stacked name -> names, one a layer
    for name, (stacked, _) in places.items():
        layers.setdefault(stacked, []).append(name)
    flat: dict[str, np.ndarray] = {}
    for name in shapes:
        signals.check()
        few_bits = checkpoint.tensors[name].few_bits if as_stored and ROUNDED.fullmatch(name) else None
        is_rounded = few_bits is not None or quantize is not None and ROUNDED.fullmatch(name)
        if few_bits is not None:
            value = few_bits.load()
        else:
            value = ROUNDINGS[quantize](exact.read(name)) if is_rounded else checkpoint.read(name)
        if name not in places:
            flat[name] = value
            continue
        stacked, layer = places[name]
        if stacked not in flat:  # filled in place: stacking copies would hold the model in memory twice
            dtypes = [] if is_rounded else {checkpoint.tensors[other].dtype for other in layers[stacked]}
            flat[stacked] = jax.tree.map(functools.partial(_empty_stack, len(layers[stacked]), dtypes), value)
        for whole, part in zip(jax.tree.leaves(flat[stacked]), jax.tree.leaves(value), strict=True):
            whole[layer] = part
    checkpoint.tally.warn()
    if checkpoint.config.adapter is not None:
        flat |= _derived(checkpoint.config, scan, only)
    return unflatten_dict(flat, sep="/")


def refuse_few_bits(checkpoint: Checkpoint, quantize: str | None) -> None:
    """Raises UserError if kernels are to be rounded that the files have in few bits."""
    if quantize is not None and (stored := checkpoint.few_bits):
        raise UserError(f"{checkpoint.directory} is quantised already ({stored}, in compressed-tensors' format), so "
                        f"quantize {quantize} would round it twice; no quantize, or the model before it was quantised, "
                        "was expected")


def _empty_stack(depth: int, dtypes: Collection[np.dtype], part: np.ndarray) -> np.ndarray:
    """Returns room for `depth` arrays like `part`, in a dtype that holds all of `dtypes`; its own without any."""
    return np.empty((depth, *part.shape), np.result_type(*dtypes) if dtypes else part.dtype)


def _derived(config: LlavaConfig, scan: bool, only: Container[str] | None) -> dict[str, np.ndarray]:
    """Returns scale and dropout of the kernels that have factors: float32 [], or [L] for stacked layers."""
    adapter, flat = config.adapter, {}
    modules = [name.removesuffix(FACTOR_A) for name in names.expected_shapes(config) if name.endswith(FACTOR_A)]
    for module in modules:
        values = {SCALE: adapter.scale(adapter.rule(module))} | ({DROPOUT: adapter.dropout} if adapter.dropout else {})
        flat |= {module + leaf: np.array(value, np.float32) for leaf, value in values.items()
                 if only is None or module + leaf in only}
    if not scan:
        return flat
    return flatten_dict(stack(unflatten_dict(flat, sep="/")), sep="/")
