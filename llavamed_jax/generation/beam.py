"""Beam search, token for token equal to transformers 5's `generate(num_beams=k)` with its default settings.

A prompt has k running hypotheses, ranked by the sum of their tokens' log probabilities, and room for k finished ones,
ranked by that sum divided by their number of tokens. A step looks at the best continuations of all running hypotheses,
at least 2 k, so that k remain if others end. A continuation that ends is finished if it is among the k best
continuations; the best continuations that do not end run on. A prompt is done when it has k finished hypotheses and the
best running one, divided by its present length, is no better than the worst of them, or at the limit of tokens, where
everything ends. Each prompt stops by itself: its result does not depend on the other prompts.

Axis letters: B prompts, k beams, N new tokens, V vocabulary; in caches K key/value heads, S positions, H head width.

Source: transformers `generation/utils.py`, `_beam_search`.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.programs import NO_TOKEN
from llavamed_jax.generation.requests import NO_NUMBER, Request, name_of
from llavamed_jax.generation.rows import bucket, power_of_two
from llavamed_jax.images.load import normalize
from llavamed_jax.parallel.mesh import batch_sharding
from llavamed_jax.utils import signals

# The score of a hypothesis that does not exist or must not be chosen. It is transformers' value, since it is compared.
_NEVER = -1e9


@flax.struct.dataclass
class Hypotheses:
    """Up to k token sequences a prompt, the best first.

    Attributes:
      tokens: int32 [B,k,N], padded with NO_TOKEN on the right.
      scores: float32 [B,k].
    """

    tokens: jax.Array
    scores: jax.Array

    def take(self, index) -> "Hypotheses":
        """Returns the hypotheses at int32 [B,n], in this order."""
        return Hypotheses(_take(self.tokens, index), _take(self.scores, index))


@flax.struct.dataclass
class Beams:
    """The state of the search for B prompts.

    Attributes:
      running: scored by the sum of log probabilities.
      finished: scored by the sum of log probabilities divided by the number of tokens.
      is_finished: bool [B,k], which places of `finished` are taken.
      count: int32 [B], tokens of each running hypothesis.
      is_done: bool [B]; the rest of a prompt's state does not change after it is set.
      length: int32 [B], positions of the prompt.
      limit: int32 [B], the most new tokens.
    """

    running: Hypotheses
    finished: Hypotheses
    is_finished: jax.Array
    count: jax.Array
    is_done: jax.Array
    length: jax.Array
    limit: jax.Array


def start(lengths, limit, num_beams: int, room: int) -> Beams:
    """Returns the state before the first token: one running hypothesis a prompt, since k equal ones would stay equal.

    Args:
      lengths: int32 [B], positions of each prompt.
      limit: int32 [B], the most new tokens of each prompt.
      num_beams: k.
      room: N, tokens that a hypothesis can hold.

    Returns:
      The state of B prompts.
    """
    B = lengths.shape[0]
    scores = jnp.full((B, num_beams), _NEVER, jnp.float32)
    tokens = jnp.full((B, num_beams, room), NO_TOKEN, jnp.int32)
    return Beams(Hypotheses(tokens, scores.at[:, 0].set(0)), Hypotheses(tokens, scores),
                 jnp.zeros((B, num_beams), bool), jnp.zeros_like(lengths), jnp.zeros(B, bool), lengths, limit)


def advance(beams: Beams, logits, eos: tuple[int, ...]) -> tuple[Beams, jax.Array]:
    """Extends every running hypothesis by one token.

    Args:
      beams: the state.
      logits: float32 [B,k,V] of the running hypotheses, in their order.
      eos: ids that end a sequence.

    Returns:
      The new state, and int32 [B,k]: the old hypothesis that each new running one continues.
    """
    k = beams.running.scores.shape[1]
    count = beams.count[:, None] + 1  # of the continuations
    continued, parents, token = _continuations(beams, logits, max(2, 1 + len(eos)) * k)
    ends = jnp.isin(token, jnp.array(eos, jnp.int32)) | (count >= beams.limit[:, None])

    scores, order = jax.lax.top_k(continued.scores + _NEVER * ends, k)
    running = continued.take(order).replace(scores=scores)

    is_new = ends & (jnp.arange(token.shape[1]) < k)
    pool = Hypotheses(jnp.concatenate([beams.finished.tokens, continued.tokens], axis=1),
                      jnp.concatenate([beams.finished.scores, continued.scores / count + _NEVER * ~is_new], axis=1))
    _, best = jax.lax.top_k(pool.scores, k)
    finished, is_finished = pool.take(best), _take(jnp.concatenate([beams.is_finished, is_new], axis=1), best)

    worst = jnp.where(is_finished, finished.scores.min(axis=1, keepdims=True), _NEVER)
    can_improve = (running.scores[:, :1] / count > worst).any(axis=1)
    after = beams.replace(running=running, finished=finished, is_finished=is_finished, count=count[:, 0],
                          is_done=~can_improve | ends.all(axis=1))
    after = jax.tree.map(lambda old, new: jnp.where(_as_rank(beams.is_done, new), old, new), beams, after)
    return after, _take(parents, order)


def _continuations(beams: Beams, logits, n: int) -> tuple[Hypotheses, jax.Array, jax.Array]:
    """Returns the n best of each prompt's k V continuations, the place of each one's parent, and each new token."""
    V = logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) + beams.running.scores[..., None]
    scores, index = jax.lax.top_k(scores.reshape(scores.shape[0], -1), n)
    parents, token = index // V, index % V
    is_next = jnp.arange(beams.running.tokens.shape[-1]) == beams.count[:, None, None]
    tokens = jnp.where(is_next, token[..., None], _take(beams.running.tokens, parents))
    return Hypotheses(tokens, scores), parents, token


def _take(x, index):
    """Gathers along the second axis: [B,m,...], int32 [B,n] -> [B,n,...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _as_rank(rows, like):
    """Reshapes [B] to [B,1,...] of the rank of `like`."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - 1))


class BeamSearch:
    """Beam search with an engine's model.

    A prompt is run once; its cache is copied to k beams, which are reordered at each step. `engine.batch_size` counts
    beams here, so that a search takes no more memory than other generation.

    Args:
      engine: the engine that has the parameters and the programs.
    """

    def __init__(self, engine: Engine):
        self.engine, self.programs = engine, engine.programs
        out = None if engine.mesh is None else (batch_sharding(engine.mesh), self.programs.cache_shardings())
        self._prefill = self.programs.jit(self._prefill_batch, out,
                                          static_argnames=("cache_length", "num_beams", "room"))
        self._decode = self.programs.jit(self._decode_steps, out, donate_argnames=("beams", "caches"))

    def generate(self, requests: Sequence[Request], num_beams: int) -> list[list[int]]:
        """Searches for the best answer to each request; sampling settings are ignored.

        Args:
          requests: the prompts.
          num_beams: k.

        Returns:
          The token ids of each request's best hypothesis, including the end-of-sequence id.

        Raises:
          UserError: (a ValueError) as in `Engine.stream`.
        """
        for i, request in enumerate(requests):
            self.engine.check(request, name_of(i, len(requests)))
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        size, out = max(1, self.engine.batch_size // num_beams), {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            out |= zip(chosen, self._run_batch([requests[i] for i in chosen], num_beams))
        for i in range(len(requests)):
            if not out[i]:
                raise UserError(f"{name_of(i, len(requests))}: {NO_NUMBER}")
        return [out[i] for i in range(len(requests))]

    def _run_batch(self, rows: list[Request], num_beams: int) -> list[list[int]]:
        """Returns the tokens of each request; an empty list for a request on which the model failed."""
        params = self.engine.params
        batch, cache_length = self._batch(rows)
        room = bucket(max(self.engine.limit(row) for row in rows))
        with self.programs.on_mesh():
            beams, caches = self._prefill(params, **batch, cache_length=cache_length, num_beams=num_beams, room=room)
            while not np.asarray(beams.is_done).all():
                signals.check()
                beams, caches = self._decode(params, beams, caches)
        best = jax.device_get(jax.tree.map(lambda x: x[: len(rows), 0], beams.finished))  # top_k ranks NaN first
        return [[int(t) for t in tokens if t != NO_TOKEN and np.isfinite(score)]
                for tokens, score in zip(best.tokens, best.scores)]

    def _batch(self, rows: list[Request]) -> tuple[dict, int]:
        """Makes the arrays of a batch, and returns the cache's length too.

        Prompts are padded to a bucket, and rows to a power of two that the mesh divides.
        """
        engine = self.engine
        B = -(-power_of_two(len(rows)) // engine.shards) * engine.shards
        T, I = bucket(max(len(r.ids) for r in rows)), max(len(r.images) for r in rows)
        limits = [engine.limit(row) for row in rows]
        ids, v = np.zeros((B, T), np.int32), self.engine.cfg.vision
        pixels = np.zeros((B, I, v.image_size, v.image_size, v.num_channels), np.float32) if I else None
        for b, row in enumerate(rows):
            ids[b, : len(row.ids)] = row.ids
            for slot, image in enumerate(map(np.asarray, row.images)):
                pixels[b, slot] = normalize(image, *v.normalization) if image.dtype == np.uint8 else image
        fill = [1] * (B - len(rows))  # padding rows: one token long, done at once
        batch = dict(ids=ids, pixels=pixels, lengths=np.array([len(r.ids) for r in rows] + fill, np.int32),
                     limit=np.array(limits + fill, np.int32))
        cache_length = max(T, bucket(max(len(r.ids) + limit for r, limit in zip(rows, limits))))
        return (batch if engine.mesh is None else jax.device_put(batch, batch_sharding(engine.mesh))), cache_length

    def _prefill_batch(self, params, ids, pixels, lengths, limit, *, cache_length: int, num_beams: int, room: int):
        logits, caches = self._run_prompts(params, ids, pixels, lengths, cache_length)
        logits = jnp.broadcast_to(logits[:, None], (logits.shape[0], num_beams, logits.shape[1]))
        beams, _ = advance(start(lengths, limit, num_beams, room), logits, self.engine.eos)
        return beams, jax.tree.map(lambda c: jnp.repeat(c, num_beams, axis=0), caches)

    def _run_prompts(self, params, ids, pixels, lengths, cache_length: int):
        """Runs prompts int32 [B,T] of `lengths` [B].

        Returns the logits [B,V] of their last tokens, and caches of `cache_length` positions.
        """
        (B, T), run = ids.shape, self.programs.apply
        x = run(params, ids, None if pixels is None else run(params, pixels, method="encode_images"), method="embed")
        # Prompts attend only to themselves: prefill needs a cache of T positions; room for the answer is added later.
        caches = self.programs.empty_caches(B, T)
        x, caches = run(params, x, jnp.broadcast_to(jnp.arange(T), (B, T)), caches, lengths - 1, method="step")
        caches = jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, 0), (0, cache_length - T), (0, 0))), caches)
        return run(params, x[:, 0], method="logits"), caches

    def _decode_steps(self, params, beams: Beams, caches):
        """Runs up to the engine's number of steps on the device; stops when all prompts are done.

        Caches: [B k,K,S,H].
        """
        B, k = beams.running.scores.shape
        run = self.programs.apply

        def decode_one(carry):
            step, beams, caches = carry
            token = _take(beams.running.tokens.swapaxes(1, 2), beams.count[:, None] - 1).reshape(B * k, 1)
            positions = jnp.repeat(beams.length + beams.count - 1, k)[:, None]
            x = run(params, token, None, method="embed")
            x, caches = run(params, x, positions, caches, method="step")
            logits = run(params, x[:, 0], method="logits")
            beams, parents = advance(beams, logits.reshape(B, k, -1), self.engine.eos)
            caches = jax.tree.map(lambda c: _take(c.reshape(B, k, *c.shape[1:]), parents).reshape(c.shape), caches)
            return step + 1, beams, caches

        def unfinished(carry):
            step, beams, _ = carry
            return (step < self.engine.steps) & ~beams.is_done.all()

        return jax.lax.while_loop(unfinished, decode_one, (0, beams, caches))[1:]
