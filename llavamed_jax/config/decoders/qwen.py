"""Qwen2 (Qwen2.5 has the same layers) and Qwen3: config and tensors.

Qwen2 has biases of query, key and value and no others. Qwen3 normalises the heads of queries and keys before they are
rotated, and its heads may be of any width.
"""

from __future__ import annotations

from dataclasses import dataclass

from llavamed_jax.config.decoders.llama import DecoderConfig, table_without

# The defaults of transformers' Qwen2Config and Qwen3Config for absent keys. No sequence begins with a token.
_DEFAULTS = dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                 num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=1e4,
                 max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096, max_window_layers=28,
                 bos_token_id=None, eos_token_id=None)


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """A Qwen2 or Qwen2.5 decoder. Attributes as `DecoderConfig`; `attention_bias` is always true."""

    architecture: str = "qwen2"

    table = table_without("o_proj/bias", "/mlp/gate_proj/bias", "/mlp/up_proj/bias", "/mlp/down_proj/bias")
    defaults = {"qwen2": {**_DEFAULTS, "attention_bias": True}}
    unread = {"qwen2": ("attention_bias", "mlp_bias")}
    hf_class = "Qwen2ForCausalLM"
    original = "qwen"  # upstream LLaVA's LlavaQwenForCausalLM, with model_type llava_qwen


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """A Qwen3 decoder, dense. Attributes as `DecoderConfig`."""

    architecture: str = "qwen3"

    table = table_without("/mlp/gate_proj/bias", "/mlp/up_proj/bias", "/mlp/down_proj/bias") + """
layers_#/self_attn/q_norm/scale           layers.#.self_attn.q_norm.weight           H
layers_#/self_attn/k_norm/scale           layers.#.self_attn.k_norm.weight           H
"""
    defaults = {"qwen3": {**_DEFAULTS, "head_dim": 128}}
    unread = {"qwen3": ("mlp_bias",)}
    hf_class = "Qwen3ForCausalLM"
