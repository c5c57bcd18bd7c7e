"""From a checkpoint to the parameter tree of the model, and random weights in a checkpoint's place."""

from __future__ import annotations

import re
import zlib
from collections.abc import Container, Mapping

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.reader import Checkpoint, Tensor
from llavamed_jax.config import LlavaConfig
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


def nest(flat: Mapping[str, object]) -> dict:
    """`{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict:
    """The reverse of `nest`."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def random_checkpoint(cfg: LlavaConfig, seed: int = 0) -> Checkpoint:
    """Random float32 weights for training from scratch, each tensor drawn when it is read and from its own stream.

    Norm scales are 1 and biases 0. Kernels and tables are normal with standard deviation fan_in^-1/2, so that activations keep
    their size through any width (0.016 at LLaMA's 4,096, close to its 0.02; CLIP's own width^-1/2 for positions and class).
    The kernels that write into the residual stream are scaled by (2 x layers)^-1/2, as GPT-2 and CLIP do, so that the stream
    does not grow with depth.
    """
    def tensor(name, shape):
        return Tensor(shape, np.dtype(np.float32), lambda: _draw(cfg, name, shape, seed))
    tensors = {name: tensor(name, spec.shape) for name, spec in names.specs(cfg).items()}
    return Checkpoint(cfg, "preset", None, tensors, {}, "random weights")


def _draw(cfg: LlavaConfig, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    leaf = name.rsplit("/", 1)[1]
    if leaf in ("scale", "bias"):
        return np.full(shape, leaf == "scale", np.float32)
    fan_in = np.prod(shape[:-1]) if leaf == "kernel" else shape[-1]
    deviation = float(fan_in) ** -0.5
    if re.search(r"/(o_proj|out_proj|down_proj|fc2)/", name):
        deviation *= (2 * (cfg.vision if name.startswith("vision_tower/") else cfg.decoder).num_layers) ** -0.5
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)
