"""OLMo-2: config and tensors.

Its layers normalise what attention and feed-forward return, not what they are given, and normalise queries and keys
over all heads together before they are rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from llavamed_jax.config.decoders.llama import WINDOW_KEYS, DecoderConfig, table_without


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """An OLMo-2 decoder. Attributes as `DecoderConfig`."""

    architecture: str = "olmo2"

    table = table_without("/input_layernorm/", "/mlp/gate_proj/bias", "/mlp/up_proj/bias", "/mlp/down_proj/bias") + """
layers_#/self_attn/q_norm/scale             layers.#.self_attn.q_norm.weight             N
layers_#/self_attn/k_norm/scale             layers.#.self_attn.k_norm.weight             K
layers_#/post_feedforward_layernorm/scale   layers.#.post_feedforward_layernorm.weight   D
"""
    # The defaults of transformers' Olmo2Config for absent keys. No sequence begins with a token.
    defaults = {"olmo2": dict(vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                              num_attention_heads=32, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=2048,
                              bos_token_id=None, eos_token_id=50279, pad_token_id=1)}
    unread = {"olmo2": ("mlp_bias", *WINDOW_KEYS)}
    hf_class = "Olmo2ForCausalLM"
