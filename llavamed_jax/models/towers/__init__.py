"""The module of each kind of tower."""

from __future__ import annotations

import flax.linen as nn

from llavamed_jax.config import VisionConfig
from llavamed_jax.models.towers import clip

# Config class -> module, which is built of (cfg, num_layers, dtype, scan, remat) and called with pixels [I,height,width,3]: the hidden
# state [I,T,D] after `num_layers` layers, T = `cfg.num_positions`, class tokens first.
MODULES: dict[type[VisionConfig], type[nn.Module]] = {
    VisionConfig: clip.VisionTower,
}


def tower_module(cfg: VisionConfig) -> type[nn.Module]:
    """The module for a config: its class's own, else that of the nearest class it is derived from."""
    return next(MODULES[kind] for kind in type(cfg).__mro__ if kind in MODULES)
