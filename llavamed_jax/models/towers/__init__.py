"""Registers the module of each kind of tower."""

from __future__ import annotations

import flax.linen as nn

from llavamed_jax.config import VisionConfig
from llavamed_jax.config.towers.siglip import SiglipConfig
from llavamed_jax.config.towers.vit import VitConfig
from llavamed_jax.models.towers import clip, siglip, vit

# Config class -> module. A module is constructed with (cfg, num_layers, dtype, scan, remat) and maps pixels
# [I,height,width,3] to the hidden state [I,T,D] after `num_layers` layers, T = `cfg.num_positions`, class tokens first.
MODULES: dict[type[VisionConfig], type[nn.Module]] = {
    VisionConfig: clip.VisionTower,
    SiglipConfig: siglip.SiglipTower,
    VitConfig: vit.VitTower,
}


def tower_module(cfg: VisionConfig) -> type[nn.Module]:
    """Returns the module for a config: that of its class, else that of the nearest base class."""
    return next(MODULES[kind] for kind in type(cfg).__mro__ if kind in MODULES)
