"""SigLIP's vision transformer: pixels to the hidden state that LLaVA reads. There is no class token.

The layers are CLIP's. Axis letters: B images, P patches, D model width.

Source: transformers' SiglipVisionModel.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from llavamed_jax.config import VisionConfig
from llavamed_jax.models.stacking import run_layers
from llavamed_jax.models.towers.clip import PatchEmbedding, PositionEmbedding, VisionTower
from llavamed_jax.models.towers.pixels import normalize


class Embeddings(nn.Module):
    """Patch and position embeddings.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
    """

    cfg: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels):  # [B,height,width,C] -> [B,P,D]
        """Maps pixels [B,height,width,C] to [B,P,D]."""
        patches = PatchEmbedding(self.cfg, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        positions = PositionEmbedding(self.cfg.num_positions, self.cfg.hidden_size, name="position_embedding")()
        return patches + positions.astype(self.dtype)


class SiglipTower(VisionTower):
    """The first `num_layers` blocks of a SigLIP tower; attributes as in `VisionTower`."""

    def setup(self):
        """Creates the submodules."""
        self.embeddings = Embeddings(self.cfg, self.dtype)
        self.layers = self.blocks()

    def __call__(self, pixels):
        """Returns the hidden state [B,P,D] after the last block, before `post_layernorm`.

        Args:
          pixels: float32 (normalised) or uint8 [B,height,width,C].
        """
        return run_layers(self.layers, self.embeddings(normalize(pixels, self.cfg)), None)[0]
