"""The plain vision transformer: pixels to the hidden state that LLaVA reads, the class token first.

The layers are CLIP's. Axis letters: B images, T = P + 1 with the class token, D model width.

Source: transformers' ViTModel, which timm's VisionTransformer (BiomedCLIP's) equals.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from llavamed_jax.config import VisionConfig
from llavamed_jax.models.stacking import run_layers
from llavamed_jax.models.towers.clip import PatchEmbedding, VisionTower
from llavamed_jax.models.towers.pixels import normalize


class Embeddings(nn.Module):
    """Patch, class and position embeddings.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
    """

    cfg: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels):  # [B,height,width,C] -> [B,T,D], the class token first
        """Maps pixels [B,height,width,C] to [B,T,D], the class token first."""
        cfg, init = self.cfg, nn.initializers.normal(0.02)
        cls = self.param("cls_token", init, (1, 1, cfg.hidden_size)).astype(self.dtype)
        positions = self.param("position_embeddings", init, (1, cfg.num_positions, cfg.hidden_size))
        patches = PatchEmbedding(cfg, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        x = jnp.concatenate([jnp.broadcast_to(cls, (patches.shape[0], 1, cfg.hidden_size)), patches], axis=1)
        return x + positions.astype(self.dtype)


class VitTower(VisionTower):
    """The first `num_layers` blocks of a ViT; attributes as in `VisionTower`."""

    def setup(self):
        """Creates the submodules."""
        self.embeddings = Embeddings(self.cfg, self.dtype)
        self.layers = self.blocks()

    def __call__(self, pixels):
        """Returns the hidden state [B,T,D] after the last block, before the last norm; the class token is at 0.

        Args:
          pixels: float32 (normalised) or uint8 [B,height,width,C].
        """
        return run_layers(self.layers, self.embeddings(normalize(pixels, self.cfg)), None)[0]
