"""The shapes of released models, by name."""

from __future__ import annotations

import dataclasses

from llavamed_jax.config.decoders.llama import DecoderConfig
from llavamed_jax.config.model import LlavaConfig
from llavamed_jax.config.towers import KNOWN_TOWERS
from llavamed_jax.config.towers.clip import VisionConfig
from llavamed_jax.config.towers.vit import BIOMEDCLIP
from llavamed_jax.errors import UserError


def _decoder(arch, hidden, ffn, layers, heads, kv, vocab=32000, eps=1e-5, theta=1e4, positions=4096) -> DecoderConfig:
    return DecoderConfig(vocab, hidden, ffn, layers, heads, kv, hidden // heads, eps, theta, positions,
                         architecture=arch)


def _presets() -> dict[str, LlavaConfig]:
    clip224 = KNOWN_TOWERS["openai/clip-vit-large-patch14"]
    clip336 = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
    mistral = _decoder("mistral", 4096, 14336, 32, 32, 8, theta=1e6, positions=32768)  # Mistral-7B-Instruct-v0.2
    vicuna7, vicuna13 = (_decoder("llama", d, f, n, h, h)
                         for d, f, n, h in ((4096, 11008, 32, 32), (5120, 13824, 40, 40)))
    small = LlavaConfig(
        VisionConfig(192, 768, 6, 6, 96, 16), _decoder("mistral", 256, 704, 6, 8, 4, vocab=1024, theta=1e6),
        max_length=512, template="v1.5:mistral_instruct")
    v1 = dict(projector_type="linear", image_aspect_ratio="square", use_start_end=True, source="llava")
    llava15 = dict(template="up:vicuna_v1", source="llava_llama")
    vicuna_v1 = dataclasses.replace(vicuna7, vocab_size=32003, max_position_embeddings=2048)
    siglip, siglip2 = (f"siglip{generation}-so400m-patch14-384" for generation in ("", "2"))
    return {
        "small": small,
        "v15-7b": LlavaConfig(clip336, mistral, template="v1.5:mistral_instruct"),
        "v1-7b": LlavaConfig(clip224, vicuna_v1, **v1),
        "v1-13b": LlavaConfig(
            clip224, dataclasses.replace(vicuna13, vocab_size=32003, max_position_embeddings=2048), **v1),
        "llava15-7b": LlavaConfig(clip336, vicuna7, **llava15),
        "llava15-13b": LlavaConfig(clip336, vicuna13, **llava15),
        # Another tower in the model of v1.0 (as in its paper) and of v1.5.
        "biomedclip": LlavaConfig(KNOWN_TOWERS[BIOMEDCLIP], vicuna_v1, **v1),
        **{name: LlavaConfig(KNOWN_TOWERS[f"google/{name}"], mistral, template="v1.5:mistral_instruct")
           for name in (siglip, siglip2)},
    }


PRESETS = _presets()


def preset(name: str) -> LlavaConfig:
    """Returns a named model shape. Raises UserError with the existing names for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"the preset {name!r} does not exist; one of {', '.join(PRESETS)} was expected")
    return PRESETS[name]
