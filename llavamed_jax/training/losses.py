"""The loss of next-token prediction. B batch, T positions, V vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llavamed_jax.config import IGNORE


def cross_entropy(logits: jax.Array, labels: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each supervised token given everything before it in its segment.

    The label of position t is the token *at* t, as PyTorch's models take it; the shift happens here. A token that
    opens a segment is predicted by nothing, so a row of several samples has the loss of those samples alone.

    Args:
      logits: [B,T,V], any float type; reduced in float32.
      labels: int [B,T], `IGNORE` where a token is not supervised.
      segment_ids: int [B,T], 0 is padding.
    Returns:
      (sum of the losses, number of supervised tokens), float32 scalars: means are taken where all counts are known.
    """
    # Labels move instead of logits: a slice of [B,T,V] would be a second copy of the largest array of the step.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    next_segments = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    is_supervised = (targets != IGNORE) & (next_segments == segment_ids) & (segment_ids != 0)
    logits = logits.astype(jnp.float32)
    # A comparison, not a gather: it fuses into the reductions, its gradient is no scatter, and V may be sharded.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(jnp.where(is_supervised, losses, 0.0)), jnp.sum(is_supervised, dtype=jnp.float32)
