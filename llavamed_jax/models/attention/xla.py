"""Attention by XLA's matrix products: the backend that the others are tested against.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N/K, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def xla_attention(q, k, v, mask):
    """Computes softmax attention with grouped queries; scores and softmax in float32.

    Args:
      q: [B,T,N,H].
      k: [B,K,S,H].
      v: [B,K,S,H].
      mask: an `AttentionMask`; None lets every query attend to every key.

    Returns:
      [B,T,N,H] in v's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = q.reshape(B, T, K, N // K, H)
    if T > 1:  # on a CPU the products take half the time with heads before positions; for a single query, more time
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q.transpose(0, 2, 3, 1, 4), k, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores *= H**-0.5
    if mask is not None:
        scores = jnp.where(mask.dense()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    context = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
    return context.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
