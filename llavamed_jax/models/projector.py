"""The projector from vision features to the decoder's width: `linear`, `mlpNx_gelu` or `identity`.

Source: `llava/model/multimodal_projector/builder.py` of LLaVA-Med v1.5 and of LLaVA.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from llavamed_jax.config import LlavaConfig, projector_depth
from llavamed_jax.models.layers import ACTIVATIONS, Linear

PARAM_AXES = [
    (r"projector/linear_\d+/kernel", ("embed", None)),
    (r"projector/linear_\d+/bias", (None,)),
]


class Projector(nn.Module):
    """A stack of dense layers with activations between them.

    Attributes:
      cfg: the model's shapes.
      dtype: dtype of the computation.
    """

    cfg: LlavaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features):  # [..., D of the tower] -> [..., D of the decoder]
        """Maps features [..., width of the tower] to [..., width of the decoder]."""
        cfg = self.cfg
        for n in range(projector_depth(cfg.projector_type)):
            # The originals use GELU alone.
            features = ACTIVATIONS[cfg.projector_act](features) if n else features
            features = Linear(cfg.decoder.hidden_size, ("embed", None), cfg.projector_bias, self.dtype,
                              name=f"linear_{n}")(features)
        return features
