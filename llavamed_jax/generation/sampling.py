"""Samples the next token from logits, each row with its own settings.

The filters are those of transformers' `generate`, in its order: temperature, top-k, top-p. A row's randomness depends
only on its seed and its count of tokens, not on the other rows of the batch. Axis letters: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Below this, logits divided by the temperature would overflow float32; the draw equals the argmax long before.
_COLDEST = 1e-30
_ALL = 2**31 - 1  # more tokens than any vocabulary has


@flax.struct.dataclass
class Sampling:
    """Settings of B rows; `of` makes them.

    Attributes:
      temperature: float32 [B]; 0 is greedy.
      top_k: int32 [B]; 0 keeps all.
      tail: float32 [B], the probability mass 1 - p that top-p drops; 0 keeps all.
      seeds: uint32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    tail: jax.Array
    seeds: jax.Array

    @classmethod
    def of(cls, temperature: Sequence[float], top_k: Sequence[int], top_p: Sequence[float],
           seeds: Sequence[int]) -> "Sampling":
        """Makes the arrays of B rows' settings.

        Args:
          temperature: at least 0 each; 0 is greedy.
          top_k: at least 0 each; 0 keeps all.
          top_p: above 0 and at most 1 each; 1 keeps all.
          seeds: below 2**32 each.

        Returns:
          The settings.
        """
        return cls(
            temperature=np.array([max(t, _COLDEST) if t > 0 else 0.0 for t in temperature], np.float32),
            top_k=np.array([min(k, _ALL) for k in top_k], np.int32),
            # 1 - p is taken before rounding to float32, as transformers does: 1 - 0.9 in float32 is another number.
            tail=np.array([1 - p for p in top_p], np.float32),
            seeds=np.array(seeds, np.uint32))


def row_seeds(seed: int, rows: Sequence[Sequence[int]], images: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """Returns one seed for each prompt of a call: `row_seed`, with equal prompts counted.

    Args:
      seed: the call's seed.
      rows: token ids of each prompt.
      images: images of each prompt.

    Returns:
      32-bit seeds.
    """
    seen, seeds = Counter(), []
    for ids, pixels in zip(rows, images, strict=True):
        prompt = _digest(ids, pixels)
        seeds.append(_seed(seed, prompt, seen[prompt]))
        seen[prompt] += 1
    return seeds


def row_seed(seed: int, ids: Sequence[int], images: Sequence[np.ndarray], nth: int = 0) -> int:
    """Derives a prompt's 32-bit seed from the call's seed and the prompt itself.

    A prompt draws the same tokens whatever else is in its batch and however a data set is cut into batches. Different
    prompts draw independently, and so do equal prompts with different `nth`.

    Args:
      seed: the call's seed.
      ids: token ids.
      images: the prompt's images.
      nth: how many equal prompts came before.

    Returns:
      The seed.
    """
    return _seed(seed, _digest(ids, images), nth)


def _seed(seed: int, prompt: int, nth: int) -> int:
    return int(np.random.SeedSequence([seed, prompt, nth]).generate_state(1)[0])


def _digest(ids: Sequence[int], images: Sequence[np.ndarray]) -> int:
    """Returns a number that identifies a prompt."""
    digest = hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16)
    for image in images:
        digest.update(np.ascontiguousarray(image).tobytes())
    return int.from_bytes(digest.digest())


def next_token(logits, settings: Sampling, step):
    """Samples the next token of each row.

    Args:
      logits: float32 [B,V].
      settings: settings of the B rows.
      step: int32 [B], tokens of each row so far.

    Returns:
      int32 [B].
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Sorting the vocabulary is expensive: a batch in which all rows are greedy skips it at run time.
    return jax.lax.cond(jnp.any(settings.temperature > 0), lambda: jnp.where(
        settings.temperature > 0, _draw(logits, settings, step), greedy), lambda: greedy)


def _draw(logits, settings, step):
    order, warped = warp(logits, settings)
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(settings.seeds, step)
    # The noise belongs to the id, not to the rank: rounding in another batch can swap the ranks of two close logits.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    rank = jnp.argmax(warped + jnp.take_along_axis(noise, order, axis=-1), axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def warp(logits, settings: Sampling):
    """Applies temperature, top-k and top-p as transformers' warpers of these names do.

    Top-k keeps all logits equal to the k-th. Top-p drops the least likely tokens whose probabilities (after top-k) sum
    to at most 1 - p, and never the best token; of equal logits at that edge the lower ids are dropped first.

    Args:
      logits: float32 [B,V].
      settings: settings of the B rows.

    Returns:
      int32 [B,V], the ids from the worst to the best, and float32 [B,V], their logits divided by the temperature, -inf
      where filtered out. Greedy rows are warped with temperature 1.
    """
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    order = jnp.argsort(logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    V = ranked.shape[-1]
    top_k = settings.top_k[:, None]
    worst_kept = jnp.take_along_axis(ranked, V - jnp.clip(top_k, 1, V), axis=-1)
    ranked = jnp.where((top_k <= 0) | (ranked >= worst_kept), ranked, -jnp.inf)
    tail = settings.tail[:, None]
    is_dropped = (jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) <= tail) & (tail > 0) & (jnp.arange(V) < V - 1)
    return order, jnp.where(is_dropped, -jnp.inf, ranked)
