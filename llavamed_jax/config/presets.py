"""The shapes of released models, by name."""

from __future__ import annotations

import dataclasses

from llavamed_jax.config.decoders.llama import DecoderConfig
from llavamed_jax.config.decoders.qwen import Qwen2Config, Qwen3Config
from llavamed_jax.config.model import LlavaConfig
from llavamed_jax.config.rope import RopeScaling
from llavamed_jax.config.towers import KNOWN_TOWERS
from llavamed_jax.config.towers.clip import VisionConfig
from llavamed_jax.config.towers.vit import BIOMEDCLIP
from llavamed_jax.errors import UserError

PRESET = "preset:"  # what a PATH of random weights begins with; a preset's name follows


def _decoder(arch, hidden, ffn, layers, heads, kv, vocab=32000, eps=1e-5, theta=1e4, positions=4096) -> DecoderConfig:
    return DecoderConfig(vocab, hidden, ffn, layers, heads, kv, hidden // heads, eps, theta, positions,
                         architecture=arch)


def _language_models() -> dict[str, DecoderConfig]:
    """The decoders of released language models, as their `config.json` and `generation_config.json` state them."""
    long = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    llama3 = dataclasses.replace(
        _decoder("llama", 4096, 14336, 32, 32, 8, 128256, theta=5e5, positions=8192), bos_token_id=128000,
        eos_token_id=128001, more_eos_ids=(128009,))  # Meta-Llama-3-8B-Instruct
    return {
        "llama3-8b": llama3,
        "llama3.1-8b": dataclasses.replace(  # Llama-3.1-8B-Instruct
            llama3, rope_scaling=long, max_position_embeddings=131072, more_eos_ids=(128008, 128009)),
        "qwen2.5-7b": Qwen2Config(  # Qwen2.5-7B-Instruct
            152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, 32768, attention_bias=True, bos_token_id=151643,
            eos_token_id=151645, more_eos_ids=(151643,)),
        "qwen3-8b": Qwen3Config(
            151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6, 40960, bos_token_id=151643, eos_token_id=151645,
            more_eos_ids=(151643,)),
        "smollm2-135m": dataclasses.replace(  # SmolLM2-135M-Instruct
            _decoder("llama", 576, 1536, 30, 9, 3, 49152, theta=1e5, positions=8192), tie_word_embeddings=True,
            pad_token_id=2),
    }


_TEMPLATES = {"llama3-8b": "hf:llama3", "llama3.1-8b": "hf:llama3.1", "qwen2.5-7b": "hf:qwen", "qwen3-8b": "hf:qwen3",
              "smollm2-135m": "hf:chatml"}


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
        **{name: LlavaConfig(clip336, decoder, template=_TEMPLATES[name], source=decoder.original_type)
           for name, decoder in _language_models().items()},
        "modern-8b": LlavaConfig(KNOWN_TOWERS["google/siglip2-so400m-patch14-384"], _language_models()["qwen3-8b"],
                                 template="hf:qwen3", source="llava_qwen3"),
    }


PRESETS = _presets()


def preset(name: str) -> LlavaConfig:
    """Returns a named model shape. Raises UserError with the existing names for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"the preset {name!r} does not exist; one of {', '.join(PRESETS)} was expected")
    return PRESETS[name]
