"""Pixels as a tower takes them, normalised on the device."""

from __future__ import annotations

import jax.numpy as jnp

from llavamed_jax.config import VisionConfig


def normalize(pixels, cfg: VisionConfig):
    """uint8 [...,3] as the tower takes it, float32: (x * scale - mean) / std. Floating-point pixels are so already.

    On the device, so that a quarter of the bytes goes there; equal to `images.load.normalize` to 1e-6.
    """
    if pixels.dtype != jnp.uint8:
        return pixels
    mean, std, scale = (jnp.array(x, jnp.float32) for x in cfg.normalization)
    return (pixels.astype(jnp.float32) * scale - mean) / std
