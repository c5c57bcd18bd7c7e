"""Rounds the kernels of the decoder's layers to int4 with calibration data (GPTQ), one layer after the other.

A layer's kernels are rounded for the inputs that they get behind the layers that are rounded already. Tower and
projector, which stay as they are, make the images' features.

Axis letters: T positions, D width of the decoder, P positions of an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.config import IMAGE_TOKEN, LlavaConfig
from llavamed_jax.errors import UserError
from llavamed_jax.models.attention.backend import AttentionMask
from llavamed_jax.models.decoders import decoder_module
from llavamed_jax.models.layers import Linear, rope_tables
from llavamed_jax.models.llava import Llava
from llavamed_jax.quantized import packing
from llavamed_jax.quantized.gptq import gptq
from llavamed_jax.quantized.kernels import Int4Kernel
from llavamed_jax.quantized.rounding import ROUNDED
from llavamed_jax.utils import signals

Row = tuple[Sequence[int], np.ndarray]  # token ids with P IMAGE_TOKENs for each image, and uint8 pixels [I,H,W,3]
_LENGTHS = 128  # rows are padded to a multiple of this


def calibrated(checkpoint: Checkpoint, rows: Sequence[Row], group: int, dtype: np.dtype | None = None,
               progress: Callable[[Iterable[str]], Iterable[str]] = iter) -> dict[str, Callable[[], Int4Kernel]]:
    """Rounds the kernels of the decoder's layers.

    Args:
      checkpoint: the checkpoint.
      rows: the calibration data.
      group: inputs of a group.
      dtype: the scales are rounded to values of this dtype; None for that of each kernel.
      progress: wraps the names of the layers.

    Returns:
      For each kernel's name, a function that returns the rounded kernel.

    Raises:
      UserError: there are no rows; weights or the inputs of a kernel are not finite.
    """
    if not rows:
        raise UserError("there are no rows to calibrate with; at least one was expected")
    cfg, rounded = checkpoint.config, {}
    own = [name for name in names.expected_shapes(cfg) if name.startswith("decoder/layers_")]
    with jax.default_matmul_precision("highest"):
        states, segments = _embedded(checkpoint, rows)
        layer = _Layer(cfg)
        for prefix in progress([f"decoder/layers_{i}" for i in range(cfg.decoder.num_layers)]):
            signals.check()
            names_here = [name for name in own if name.startswith(f"{prefix}/")]
            flat = flatten_dict(load_params(checkpoint, np.float32, only=names_here), sep="/")
            flat = {name.removeprefix(f"{prefix}/"): x for name, x in flat.items()}
            sums = layer.sums(flat, states, segments)
            for name in filter(ROUNDED.fullmatch, names_here):
                signals.check()
                key, stored = name.removeprefix(f"{prefix}/"), dtype or checkpoint.tensors[name].dtype
                kernel = gptq(flat[key], sums[key.removesuffix("/kernel")], group, stored)
                flat[key] = np.asarray(kernel.widened(np.float32))
                rounded[name] = _kept(kernel)
            states = layer.outputs(flat, states, segments)
    return rounded


def _kept(kernel: Int4Kernel) -> Callable[[], Int4Kernel]:
    """Returns a function that returns a kernel without zeros, of which half a byte a value is kept."""
    (D, _), packed, scales = kernel.shape, packing.pack(np.asarray(kernel.values).T, 4), kernel.scales
    return lambda: Int4Kernel(np.ascontiguousarray(packing.unpack(packed, 4, D).T).astype(ml_dtypes.int4), scales)


def _embedded(checkpoint: Checkpoint, rows: Sequence[Row]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the decoder's inputs, float32 [1,T,D] a row, and their segments, int32 [1,T], 0 for padding."""
    cfg = checkpoint.config
    used = [name for name in names.expected_shapes(cfg)
            if not name.startswith("decoder/") or name == "decoder/embed_tokens/embedding"]
    params = load_params(checkpoint, np.float32, only=used)
    if not any(len(pixels) for _, pixels in rows):
        params = {"decoder": params["decoder"]}
    model, T = Llava(cfg), -(-max(len(ids) for ids, _ in rows) // _LENGTHS) * _LENGTHS

    @jax.jit
    def embed(params, ids, pixels):
        features = None if pixels is None else model.apply({"params": params}, pixels, method="encode_images")
        return model.apply({"params": params}, ids, features, method="embed")

    states, segments = [], []
    for ids, pixels in rows:
        signals.check()
        padded = np.zeros((1, T), np.int32)
        padded[0, :len(ids)] = ids
        if np.count_nonzero(padded == IMAGE_TOKEN) != cfg.tokens_per_image * len(pixels):
            raise UserError(f"a row has {np.count_nonzero(padded == IMAGE_TOKEN)} image positions and {len(pixels)} "
                            f"images; {cfg.tokens_per_image} positions an image were expected")
        states.append(np.asarray(embed(params, padded, pixels[None] if len(pixels) else None)))
        segments.append((np.arange(T) < len(ids))[None].astype(np.int32))
    return states, segments


class _Layer:
    """Runs one layer of the decoder on every row.

    Args:
      cfg: the model's shapes.
    """

    def __init__(self, cfg: LlavaConfig):
        self._cfg, self._block = cfg.decoder, decoder_module(cfg.decoder).block(cfg.decoder, jnp.float32, "xla")
        self._run, self._add = jax.jit(self._output), jax.jit(self._added, donate_argnums=3)
        self._owners: dict[str, str] = {}  # a kernel's module -> the first module with the same input

    def sums(self, flat: Mapping[str, np.ndarray], states: Sequence[np.ndarray],
             segments: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the sum of x xᵀ over the inputs x of each kernel, float32 by the name of its module.

        Args:
          flat: the layer's parameters by name.
          states: the layer's inputs, [1,T,D] a row.
          segments: int32 [1,T] a row; 0 is padding, which does not count.
        """
        params, total = jax.device_put(unflatten_dict(dict(flat), sep="/")), None
        for x, held in zip(states, segments, strict=True):
            total = self._add(params, x, held, total)
        return {module: np.asarray(total[owner]) for module, owner in self._owners.items()}

    def outputs(self, flat: Mapping[str, np.ndarray], states: Sequence[np.ndarray],
                segments: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the layer's outputs, float32 [1,T,D] a row."""
        params = jax.device_put(unflatten_dict(dict(flat), sep="/"))
        return [np.asarray(self._run(params, x, held)) for x, held in zip(states, segments, strict=True)]

    def _output(self, params, x, segments):
        cfg, positions = self._cfg, jnp.arange(x.shape[1])[None]
        rope = rope_tables(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        mask = AttentionMask(positions, positions, segments, segments, window=cfg.sliding_window)
        return self._block.apply({"params": params}, x, (rope, mask), None)[0]

    def _added(self, params, x, segments, total):
        inputs: dict[str, jax.Array] = {}
        with nn.intercept_methods(functools.partial(_note, inputs)):
            self._output(params, x, segments)
        first: dict[int, str] = {}
        self._owners = {module: first.setdefault(id(x), module) for module, x in inputs.items()}
        sums = {}
        for module in first.values():
            x = jnp.where(segments[..., None] > 0, inputs[module], 0).reshape(-1, inputs[module].shape[-1])
            sums[module] = x.T @ x if total is None else total[module] + x.T @ x
        return sums


def _note(inputs: dict[str, jax.Array], call, args, kwargs, context):
    """Notes the input of each linear layer (an interceptor of flax)."""
    if isinstance(context.module, Linear) and context.method_name == "__call__":
        inputs["/".join(context.module.path)] = args[0]
    return call(*args, **kwargs)
