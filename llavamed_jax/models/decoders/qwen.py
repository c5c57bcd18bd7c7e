"""The Qwen3 decoder: LLaMA's with norms of queries and keys. Qwen2 is LLaMA's decoder with the biases of its table.

Axis letters: B batch, T query positions, N query heads, K key/value heads, H head width.

Source: transformers' Qwen3Model.
"""

from __future__ import annotations

from llavamed_jax.models.decoders import llama
from llavamed_jax.models.layers import RMSNorm


class Attention(llama.Attention):
    """LLaMA's attention whose queries and keys are normalised head by head, before they are rotated."""

    is_normed = True

    def query_key(self, q, k):
        """Normalises queries [B,T,N,H] and keys [B,T,K,H] over H."""
        eps = self.cfg.rms_norm_eps
        return RMSNorm(eps, self.dtype, name="q_norm")(q), RMSNorm(eps, self.dtype, name="k_norm")(k)


class Block(llama.Block):
    """A layer of Qwen3."""

    attention = Attention


class Qwen3Decoder(llama.Decoder):
    """Qwen3's decoder."""

    block = Block
