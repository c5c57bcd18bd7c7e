"""The OLMo-2 decoder: LLaMA's with norms behind attention and feed-forward, and norms of queries and keys.

Axis letters: B batch, T query positions, N query heads, K key/value heads, H head width, D model width.

Source: transformers' Olmo2Model.
"""

from __future__ import annotations

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from llavamed_jax.models import layers
from llavamed_jax.models.decoders import llama
from llavamed_jax.parallel.mesh import constrain


class RMSNorm(layers.RMSNorm):
    """LLaMA's norm, whose result is rounded after it is multiplied by the scale, as transformers' Olmo2RMSNorm."""

    is_scaled_in_float32 = True


class Attention(llama.Attention):
    """LLaMA's attention whose queries and keys are normalised over all heads together, before they are rotated."""

    is_normed = True

    def query_key(self, q, k):
        """Normalises queries [B,T,N,H] over N and H, and keys [B,T,K,H] over K and H."""

        def norm(x, name):
            all_heads = x.reshape(*x.shape[:2], -1)
            return RMSNorm(self.cfg.rms_norm_eps, self.dtype, name=name)(all_heads).reshape(x.shape)

        return norm(q, "q_norm"), norm(k, "k_norm")


class Block(llama.Block):
    """A layer of OLMo-2."""

    attention = Attention

    @nn.compact
    def __call__(self, x, shared, cache):  # [B,T,D], (rope, mask), cache -> [B,T,D], cache
        """Maps [B,T,D], (rope, mask) and a cache to [B,T,D] and the updated cache."""
        rope, mask = shared
        eps = self.cfg.rms_norm_eps
        h, cache = self.attention(self.cfg, self.dtype, self.backend, name="self_attn")(x, rope, mask, cache)
        h = checkpoint_name(h, "middle")  # the norm's backward pass takes it
        x = checkpoint_name(mask.narrowed(x) + RMSNorm(eps, self.dtype, name="post_attention_layernorm")(h), "middle")
        h = llama.Mlp(self.cfg, self.dtype, name="mlp")(x)
        x = x + RMSNorm(eps, self.dtype, name="post_feedforward_layernorm")(h)
        return constrain(x, "act_batch", None, None), cache


class Olmo2Decoder(llama.Decoder):
    """OLMo-2's decoder."""

    block = Block
    final_norm = RMSNorm
