"""Splash attention: JAX's Pallas kernel for TPUs, which skips the blocks that a mask leaves empty.

Axis letters: B batch, T positions, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from llavamed_jax.parallel.mesh import on_each_device

LANES, BLOCK = 128, 512  # a block is a multiple of LANES and at most BLOCK; T is padded to whole blocks


def splash_attention(q, k, v, mask, interpret: bool = False):
    """Computes causal attention within segments and window; scores and softmax in float32.

    The kernel uses the order of the positions in a row, not their numbers: within a segment they must be consecutive.
    On a mesh each device computes its own rows and heads.

    Args:
      q: [B,T,N,H].
      k: [B,K,T,H].
      v: [B,K,T,H].
      mask: `attention.AttentionMask` with the same positions for queries and keys.
      interpret: interprets the kernel, on platforms other than TPUs.

    Returns:
      [B,T,N,H]. The checkpoint name `context` saves it under rematerialisation, with the residuals of the backward
      pass.
    """
    T, H = q.shape[1], q.shape[-1]
    block = min(BLOCK, -(-T // LANES) * LANES)
    extra = -T % block
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype).swapaxes(1, 2)  # the kernel does not scale
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (q, k, v))
    # Padding comes last, so the causal mask hides it, with or without segments.
    segments = None if mask.q_segments is None else jnp.pad(mask.q_segments, ((0, 0), (0, extra)))
    work = functools.partial(_on_one_device, window=mask.window, block=block, interpret=interpret)
    heads, rows = ("act_batch", "act_heads", None, None), None if segments is None else ("act_batch", None)
    work = on_each_device(work, (heads, heads, heads, rows), heads)
    return work(q, k, v, segments)[:, :, :T].swapaxes(1, 2)


def _on_one_device(q, k, v, segments, *, window, block, interpret):
    """Maps q [B,N,T,H], k and v [B,K,T,H], segments [B,T] (or None) to [B,N,T,H]; query heads share their group."""
    N, T = q.shape[1:3]
    causal = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    sizes = kernels.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
                               block_kv_dq=block)
    kernel = kernels.make_splash_mha(masks.MultiHeadMask([causal] * N), block_sizes=sizes, head_shards=1,
                                     q_seq_shards=1,
                                     residual_checkpoint_name="context", interpret=interpret)
    if segments is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(q, k, v, segments)
