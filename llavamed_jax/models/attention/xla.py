"""Attention by XLA's matrix products: the backend that the others are tested against.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N/K, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def xla_attention(q, k, v, mask, k_scale=None, v_scale=None):
    """Computes softmax attention with grouped queries; scores and softmax in float32.

    Args:
      q: [B,T,N,H].
      k: [B,K,S,H].
      v: [B,K,S,H].
      mask: an `AttentionMask`; None lets every query attend to every key.
      k_scale: float32 [B,K,S,1], by which the keys are multiplied if they are int8; None for other keys.
      v_scale: likewise of the values.

    Returns:
      [B,T,N,H] in v's dtype, or in q's if v is int8.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    if k_scale is not None:  # int8 is exact in bfloat16; the scales are constant over H and follow the first product
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    q = q.reshape(B, T, K, N // K, H)
    if T > 1:  # on a CPU the products take half the time with heads before positions; for a single query, more time
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q.transpose(0, 2, 3, 1, 4), k, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores *= H**-0.5
    if k_scale is not None:
        scores *= _over_keys(k_scale)
    if mask is not None:
        scores = jnp.where(mask.dense()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    dtype = v.dtype
    if v_scale is not None:
        weights *= _over_keys(v_scale)
        if dtype == jnp.float16:  # has no normal numbers for a small weight times a small scale
            v = v.astype(jnp.float32)
    context = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v).astype(dtype)
    return context.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _over_keys(scale):
    """Returns scales [B,K,S,1] as [B,K,1,1,S], to multiply [B,K,G,T,S]."""
    return scale[:, :, None, None, :, 0]
