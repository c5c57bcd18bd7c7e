"""Registers the module of each kind of decoder."""

from __future__ import annotations

import flax.linen as nn

from llavamed_jax.config import DecoderConfig
from llavamed_jax.config.decoders.olmo import Olmo2Config
from llavamed_jax.config.decoders.qwen import Qwen3Config
from llavamed_jax.models.decoders import llama, olmo, qwen

# Config class -> module. A module is constructed with (cfg, dtype, scan, remat, attention) and has the methods of
# `llama.Decoder`: `embed`, `__call__` and `logits`, with caches as `cache.init_cache` makes them.
MODULES: dict[type[DecoderConfig], type[nn.Module]] = {
    DecoderConfig: llama.Decoder,
    Qwen3Config: qwen.Qwen3Decoder,
    Olmo2Config: olmo.Olmo2Decoder,
}


def decoder_module(cfg: DecoderConfig) -> type[nn.Module]:
    """Returns the module for a config: that of its class, else that of the nearest base class."""
    return next(MODULES[kind] for kind in type(cfg).__mro__ if kind in MODULES)
