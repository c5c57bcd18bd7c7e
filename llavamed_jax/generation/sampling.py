"""From logits to the next token, each row with its own settings.

The order of the filters is transformers': temperature, then top-k, then top-p. A row's randomness is its own (its key
and its count of tokens), so it does not depend on what else is in the batch. Axis letters: B rows, V vocabulary.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Sampling:
    """Settings of B rows.

    Attributes:
      temperature: float32 [B]; 0 is greedy.
      top_k: int32 [B]; 0 keeps all.
      top_p: float32 [B]; 1 keeps all.
      keys: [B] random keys.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    keys: jax.Array


def next_token(logits, settings: Sampling, step):
    """float32 [B,V], settings, int32 [B] tokens so far -> int32 [B]."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Sorting the vocabulary is the expensive part: a batch that is greedy throughout skips it at run time.
    return jax.lax.cond(jnp.any(settings.temperature > 0), lambda: jnp.where(
        settings.temperature > 0, _draw(logits, settings, step), greedy), lambda: greedy)


def _draw(logits, settings, step):
    hot = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / hot
    kept = keep_mask(ranked, settings.top_k[:, None], settings.top_p[:, None])
    keys = jax.vmap(jax.random.fold_in)(settings.keys, step)
    rank = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def keep_mask(ranked, top_k, top_p):
    """Which of the logits [B,V], sorted from the best, survive: bool [B,V].

    Top-p keeps the shortest prefix whose probability (after top-k) reaches p, and always the first.
    """
    rank = jnp.arange(ranked.shape[-1])
    kept = (top_k <= 0) | (rank < top_k)
    probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return kept & ((before < top_p) | (top_p >= 1)) | (rank == 0)
