"""Attention of every query to every key, for the towers on NVIDIA GPUs, where XLA would write and read all scores.

The forward pass is the kernel of flash attention. The backward pass, which only a trained tower needs, is XLA's.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llavamed_jax.models.attention.flash import BACKWARD, FORWARD, flash_over, tile
from llavamed_jax.models.attention.xla import xla_attention
from llavamed_jax.parallel.mesh import on_each_device


def whole_attention(q, k, v, interpret: bool = False):
    """Computes attention without a mask; scores and softmax in float32.

    On a mesh each device computes its own rows and heads.

    Args:
      q: [B,T,N,H]; H a power of two of at least 16 on a GPU.
      k: [B,K,S,H].
      v: [B,K,S,H].
      interpret: interprets the kernel, on platforms other than GPUs.

    Returns:
      [B,T,N,H].
    """
    queries, keys = ("act_batch", None, "act_heads", None), ("act_batch", "act_heads", None, None)
    return on_each_device(functools.partial(_attention, interpret), (queries, keys, keys), queries)(q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret, q, k, v):
    B, T, S = *q.shape[:2], k.shape[2]
    behind, before = -T % min(FORWARD, tile(T)), -S % min(BACKWARD, tile(S))
    q = jnp.pad(q, ((0, 0), (0, behind), (0, 0), (0, 0)))
    # Padding comes before the keys, so that a first key and a last position, which all queries share, say what is real.
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (before, 0), (0, 0))) for x in (k, v))
    first, start = jnp.full(q.shape[:2], before, jnp.int32), jnp.full(B, before + S, jnp.int32)
    return flash_over(interpret, q, k, v, first, start, "flash_whole")[0][:, :T]


def _forward(interpret, q, k, v):
    return _attention(interpret, q, k, v), (q, k, v)


def _backward(_, kept, by_out):
    return jax.vjp(lambda q, k, v: xla_attention(q, k, v, None), *kept)[1](by_out)


_attention.defvjp(_forward, _backward)
