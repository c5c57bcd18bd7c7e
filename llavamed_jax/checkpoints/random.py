"""Makes random weights that serve as a checkpoint, for training from scratch."""

from __future__ import annotations

import re
import zlib

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import LlavaConfig


def random_checkpoint(cfg: LlavaConfig, seed: int = 0) -> Checkpoint:
    """Returns random float32 weights for training from scratch; each tensor is drawn at reading, from its own stream.

    Norm scales are 1 and biases 0. Kernels and tables are normal with standard deviation fan_in^-1/2, so that
    activations keep their size at any width (0.016 at LLaMA's 4,096, close to its 0.02; CLIP's own width^-1/2 for
    positions and class). The kernels that write into the residual stream are scaled by (2 x layers)^-1/2, as in GPT-2
    and CLIP, so that the stream does not grow with depth.
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
