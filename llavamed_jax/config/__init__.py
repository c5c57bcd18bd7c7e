"""Shapes and constants of a model, read from and written to checkpoints' `config.json`."""

from llavamed_jax.config.checks import ACTIVATIONS, as_object, channels, token_ids
from llavamed_jax.config.decoders.llama import DecoderConfig
from llavamed_jax.config.images import MAX_EDGE, RESAMPLE, ImageSettings
from llavamed_jax.config.model import (
    IGNORE,
    IMAGE_TOKEN,
    KV_CACHES,
    MOST_BEAMS,
    OURS,
    PAD_TOKEN,
    QUANTIZED,
    LlavaConfig,
    projector_depth,
)
from llavamed_jax.config.presets import PRESET, PRESETS, preset
from llavamed_jax.config.rope import RopeScaling
from llavamed_jax.config.towers import KNOWN_TOWERS
from llavamed_jax.config.towers.clip import CLIP_MEAN, CLIP_STD, VisionConfig

__all__ = [
    "ACTIVATIONS", "CLIP_MEAN", "CLIP_STD", "IGNORE", "IMAGE_TOKEN", "KNOWN_TOWERS", "KV_CACHES", "MAX_EDGE",
    "MOST_BEAMS", "OURS", "PAD_TOKEN", "PRESET", "PRESETS", "QUANTIZED", "RESAMPLE", "DecoderConfig", "ImageSettings",
    "LlavaConfig", "RopeScaling", "VisionConfig", "as_object", "channels", "preset", "projector_depth", "token_ids",
]
