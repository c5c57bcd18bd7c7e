"""The projector: vision features to the decoder's width. Source: spec 1.4 (`linear`, `mlpNx_gelu`, `identity`)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from llavamed_jax.config import LlavaConfig, projector_depth
from llavamed_jax.models.layers import ACTIVATIONS, Linear, gelu

PARAM_AXES = [
    (r"projector/linear_\d+/kernel", ("embed", None)),
    (r"projector/linear_\d+/bias", (None,)),
]


class Projector(nn.Module):
    cfg: LlavaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features):  # [..., D of the tower] -> [..., D of the decoder]
        cfg = self.cfg
        activate = gelu if cfg.projector_act == "gelu" else ACTIVATIONS[cfg.projector_act]  # the originals have GELU alone
        for n in range(projector_depth(cfg.projector_type)):
            features = activate(features) if n else features
            features = Linear(cfg.decoder.hidden_size, ("embed", None), cfg.projector_bias, self.dtype, name=f"linear_{n}")(features)
        return features
