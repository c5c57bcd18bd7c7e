"""Adds fresh low-rank factors to a checkpoint, and merges a checkpoint's factors into its kernels."""

from __future__ import annotations

import zlib

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import FACTOR_A, FACTOR_B, KERNEL, AdapterConfig, AdapterRule, is_factor
from llavamed_jax.errors import UserError


def adapter_of(recipe: ConfigDict) -> AdapterConfig | None:
    """Returns the adapter that a recipe's `lora` asks for; None for a rank of 0."""
    lora = recipe.lora
    if not lora.rank:
        return None
    rules = tuple(AdapterRule(target, lora.rank, float(lora.alpha)) for target in lora.targets)
    return AdapterConfig(rules, lora.rslora, float(lora.dropout))


def config_with(config: LlavaConfig, adapter: AdapterConfig) -> LlavaConfig:
    """Returns the config with an adapter.

    Raises:
      UserError: the config has an adapter; a rule of the adapter matches no kernel of the model.
    """
    if config.adapter is not None:
        raise UserError("the model has an adapter already; `convert merge-lora` merges it, and a model without an "
                        "adapter was expected")
    config = config.replace(adapter=adapter)
    names.specs(config)  # raises for a rule without a kernel
    return config


def attach(checkpoint: Checkpoint, adapter: AdapterConfig, seed: int) -> Checkpoint:
    """Returns the checkpoint with fresh factors, which leave its outputs as they are: B is 0.

    A is uniform in ±in^-1/2, as PEFT and torch's Linear draw it, in float32; each factor has its own stream.

    Args:
      checkpoint: a checkpoint without an adapter.
      adapter: the adapter.
      seed: seed of the random numbers.

    Raises:
      UserError: as `config_with`.
    """
    config = config_with(checkpoint.config, adapter)
    shapes = {name: spec.shape for name, spec in names.specs(config).items() if is_factor(name)}
    fresh = {name: Tensor(shape, np.dtype(np.float32), lambda name=name, shape=shape: _draw(name, shape, seed))
             for name, shape in shapes.items()}
    return checkpoint.replace(config=config, tensors={**checkpoint.tensors, **fresh})


def _draw(name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    if name.endswith(FACTOR_B):
        return np.zeros(shape, np.float32)
    bound = shape[0] ** -0.5
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).uniform(-bound, bound, shape).astype(np.float32)


def merged(checkpoint: Checkpoint, dtype=None) -> Checkpoint:
    """Returns the checkpoint without its adapter, `kernel + scale A B` in place of each kernel that has factors.

    The sum is computed in float32 and rounded once.

    Args:
      checkpoint: a checkpoint with an adapter.
      dtype: dtype of every tensor of the result; None keeps each tensor's own.

    Raises:
      UserError: the checkpoint has no adapter.
    """
    adapter = checkpoint.config.adapter
    if adapter is None:
        raise UserError(f"{checkpoint.directory} has no adapter to merge; an adapter, or a run that trains one, was "
                        "expected")
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_factor(name)}
    for name, factor in checkpoint.tensors.items():
        module = name.removesuffix(FACTOR_A)
        if module != name:
            scale = np.float32(adapter.scale(adapter.rule(module)))
            kernel = tensors[module + KERNEL]
            tensors[module + KERNEL] = _sum(kernel, factor, checkpoint.tensors[module + FACTOR_B], scale,
                                            kernel.dtype if dtype is None else np.dtype(np.float32))
    return checkpoint.replace(config=checkpoint.config.replace(adapter=None), tensors=tensors).cast(dtype)


def _sum(kernel: Tensor, a: Tensor, b: Tensor, scale: np.float32, dtype: np.dtype) -> Tensor:
    def load() -> np.ndarray:
        change = scale * (a.load().astype(np.float32) @ b.load().astype(np.float32))
        return (kernel.widened().load().astype(np.float32) + change).astype(dtype)
    return Tensor(kernel.shape, dtype, load)
