"""The programs that the engine runs on the device, over a fixed number of rows.

A row of the cache belongs to one request at a time. Prefill starts from a copy of any row's beginning: what two prompts
have in common is computed once. A query sees only keys at its own or earlier positions, so what stands behind them in a
row, of padding or of an earlier request, is never seen, and is overwritten as the row grows.
Axis letters: R rows, B prompts of one prefill, T prompt positions, S cache positions, I images a prompt, P positions an
image, D model width, F places for image features, N tokens a decode loop.
"""

from __future__ import annotations

import contextlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llavamed_jax.config import LlavaConfig
from llavamed_jax.generation.sampling import Sampling, next_token
from llavamed_jax.models.decoders.cache import LayerCache, init_cache
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import batch_sharding, replicated, spec_of
from llavamed_jax.utils import private

NO_TOKEN = -1  # in a finished row's part of the output


@flax.struct.dataclass
class Slots:
    """R rows, each a request's or free.

    Attributes:
      token: int32 [R], the last token, which has been handed out and not yet fed.
      position: int32 [R], where it will stand.
      count, limit: int32 [R], tokens handed out so far, and at most.
      is_done: bool [R]; a free row is done.
      sampling: of R rows.
      caches: a LayerCache [R,K,S,H] for each layer.
    """

    token: jax.Array
    position: jax.Array
    count: jax.Array
    limit: jax.Array
    is_done: jax.Array
    sampling: Sampling
    caches: tuple[LayerCache, ...]


@flax.struct.dataclass
class Prompts:
    """B prompts, or what is left of them behind a shared beginning.

    Attributes:
      ids: int32 [B,T], padded on the right.
      images: int32 [B,I], places of their features; None without images.
      start: int32 [B], positions that are taken over from the row `source`.
      length: int32 [B], how many of `ids` are real.
      source, target: int32 [B], rows; a target of R is nobody's.
      limit: int32 [B]. sampling: of B rows.
    """

    ids: Any
    images: Any
    start: Any
    length: Any
    source: Any
    target: Any
    limit: Any
    sampling: Sampling


@flax.struct.dataclass
class Made:
    """What the host reads: tokens int32 [R,N] (NO_TOKEN where a row was done), is_done and is_failed bool [R]."""

    tokens: jax.Array
    is_done: jax.Array
    is_failed: jax.Array


class Programs:
    """Compiled once a shape; `count()` says how many there are.

    Args:
      steps: N, tokens that a decode loop makes at most before the host looks.
    """

    def __init__(self, cfg: LlavaConfig, dtype, mesh: Mesh | None, steps: int):
        self.cfg, self.dtype, self.mesh, self.steps = cfg, dtype, mesh, steps
        self.model = Llava(cfg, dtype)

        def compiled(function, out=None, **kwargs):
            return jax.jit(function, **kwargs, **({} if mesh is None else {"out_shardings": out}))

        rows = slots = everywhere = None
        if mesh is not None:
            rows, everywhere = batch_sharding(mesh), replicated(mesh)
            # Said aloud, so that what one program returns is what the next one was compiled for.
            slots = Slots(rows, rows, rows, rows, rows, Sampling(rows, rows, rows, rows), self.cache_shardings())
        self._programs = dict(
            encode=compiled(self._encode, everywhere, donate_argnums=1),
            take=compiled(self._take, slots and slots.caches, static_argnames="width"),
            fill=compiled(self._fill, (slots and slots.caches, everywhere), donate_argnums=1),
            put=compiled(self._put, slots, donate_argnums=0),
            decode=compiled(self._decode, (slots, everywhere), donate_argnums=1),
            resize=compiled(self._resize, slots, static_argnames=("rows", "length")),
            release=compiled(self._release, rows, donate_argnums=0),
            scrub=compiled(self._scrub, slots, donate_argnums=0))

    def __getattr__(self, name: str):
        """`encode`, `decode`, …: the programs, called with the mesh in context."""
        if name.startswith("_") or name not in self._programs:
            raise AttributeError(name)

        def call(*args, **kwargs):
            with self.on_mesh():
                return self._programs[name](*args, **kwargs)
        return call

    def lower(self, name: str, *args, **kwargs):
        """A program's lowering for arguments that may be shapes; it is compiled for where these lie."""
        with self.on_mesh():
            return self._programs[name].lower(*args, **kwargs)

    def on_mesh(self):
        """The context in which programs are called; never across a `yield`, where the caller's code would run in it."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def count(self) -> int:
        """How many programs have been compiled."""
        return sum(private.compilations(program) for program in self._programs.values())

    def prefill(self, params, slots: Slots, features, prompts: Prompts, width: int) -> tuple[Slots, Made]:
        """Runs prompts and draws the first token of each. `width`: cache positions that the longest of them needs.

        The model runs on a copy of so many rows and positions, so that its program is the same whatever rows there are;
        the programs that take from the rows and put back are compiled in no time.
        """
        caches = self.take(slots, prompts.source, prompts.start, width=width)
        caches, made = self.fill(params, caches, features, prompts)
        return self.put(slots, prompts.replace(ids=None, images=None), made, caches), made

    def cache_shardings(self) -> tuple[LayerCache, ...]:
        cache = NamedSharding(self.mesh, spec_of(("act_batch", "act_heads", None, None)))
        return tuple(LayerCache(cache, cache) for _ in range(self.cfg.decoder.num_layers))

    def empty_features(self, places: int) -> jax.Array:
        """[F,P,D] of nothing."""
        return jnp.zeros((places, self.cfg.tokens_per_image, self.cfg.decoder.hidden_size), self.dtype)

    def empty_slots(self) -> Slots:
        """No rows of no positions, to be resized."""
        zeros = jnp.zeros(0, jnp.int32)
        caches = init_cache(self.cfg.decoder, 0, 0, self.dtype)
        return Slots(zeros, zeros, zeros, zeros, jnp.ones(0, bool), Sampling.of([], [], [], []), caches)

    def ends(self, token):
        """int32 [...] -> bool [...]: whether a token ends its sequence."""
        return jnp.isin(token, jnp.array(self.cfg.decoder.eos_ids, jnp.int32))

    def apply(self, params, *args, method: str):
        """A method of the model."""
        return self.model.apply({"params": params}, *args, method=method)

    def _encode(self, params, features, pixels, places):
        """Images [n,height,width,3] through tower and projector to their places, int32 [n] (F: nowhere)."""
        new = self.apply(params, pixels[:, None], method="encode_images")[:, 0]
        return features.at[places].set(new.astype(features.dtype), mode="drop")

    def _take(self, slots: Slots, source, start, *, width: int) -> tuple[LayerCache, ...]:
        """The first `start` of `width` positions of rows, int32 [B] each; nothing behind them."""
        # What else the row holds is an earlier request's, which may fail: a weight of 0 does not hide a NaN.
        is_shared = (jnp.arange(width) < start[:, None])[:, None, :, None]
        return jax.tree.map(lambda c: jnp.where(is_shared, c[source, :, :width], 0), slots.caches)

    def _fill(self, params, caches, features, prompts: Prompts) -> tuple[tuple[LayerCache, ...], Made]:
        """Runs prompts behind what their caches hold, and draws the first token of each."""
        p = prompts
        x = self.apply(params, p.ids, None if p.images is None else features[p.images], method="embed")
        positions = p.start[:, None] + jnp.arange(p.ids.shape[1])
        x, caches = self.apply(params, x, positions, caches, method="step")
        # Only the last position of a prompt goes through the head.
        last = jnp.take_along_axis(x, (p.length - 1)[:, None, None], axis=1)[:, 0]
        token, is_failed = self._next(params, last, p.sampling, jnp.zeros_like(p.length))
        return caches, Made(token[:, None], is_failed | self.ends(token) | (p.limit <= 1), is_failed)

    def _put(self, slots: Slots, prompts: Prompts, made: Made, caches) -> Slots:
        """Gives prompts that were run their rows."""
        p, width = prompts, caches[0].k.shape[2]

        def put(old, new):
            return old.at[p.target].set(new, mode="drop")

        return Slots(
            put(slots.token, made.tokens[:, 0]), put(slots.position, p.start + p.length), put(slots.count, 1),
            put(slots.limit, p.limit), put(slots.is_done, made.is_done), jax.tree.map(put, slots.sampling, p.sampling),
            jax.tree.map(lambda old, new: old.at[p.target, :, :width].set(new, mode="drop"), slots.caches, caches))

    def _next(self, params, x, sampling, count):
        """[B,D] of the last positions -> the next tokens, and where the logits are no numbers."""
        logits = self.apply(params, x, method="logits")
        return next_token(logits, sampling, count), ~jnp.isfinite(logits).all(axis=-1)

    def _decode(self, params, slots: Slots, leave_at) -> tuple[Slots, Made]:
        """Up to N tokens for each row; stops when only `leave_at` rows are not done, so that others may enter."""
        def is_going_on(carry):
            step, _, slots = carry
            return (step < self.steps) & ((~slots.is_done).sum() > leave_at)

        def decode_one(carry):
            step, made, slots = carry
            x = self.apply(params, slots.token[:, None], None, method="embed")
            # A finished row is fed too, at its last position: rows have one program.
            x, caches = self.apply(params, x, slots.position[:, None], slots.caches, method="step")
            token, is_failed = self._next(params, x[:, 0], slots.sampling, slots.count)
            running, is_failed = ~slots.is_done, is_failed & ~slots.is_done
            count = slots.count + running
            made = made.replace(tokens=made.tokens.at[:, step].set(jnp.where(running & ~is_failed, token, NO_TOKEN)),
                                is_failed=made.is_failed | is_failed)
            return step + 1, made, slots.replace(
                token=jnp.where(running, token, slots.token), position=slots.position + running, count=count,
                is_done=slots.is_done | is_failed | self.ends(token) | (count >= slots.limit), caches=caches)

        R = slots.token.shape[0]
        made = Made(jnp.full((R, self.steps), NO_TOKEN, jnp.int32), slots.is_done, jnp.zeros(R, bool))
        _, made, slots = jax.lax.while_loop(is_going_on, decode_one, (0, made, slots))
        return slots, made.replace(is_done=slots.is_done)

    def _resize(self, slots: Slots, *, rows: int, length: int) -> Slots:
        """The first `rows` rows of `length` positions; new ones are free and empty."""
        def fit(x, axis, size, value=0):
            x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
            return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)

        return Slots(*(fit(x, 0, rows) for x in (slots.token, slots.position, slots.count, slots.limit)),
                     fit(slots.is_done, 0, rows, True), jax.tree.map(lambda x: fit(x, 0, rows), slots.sampling),
                     jax.tree.map(lambda c: fit(fit(c, 0, rows), 2, length), slots.caches))

    def _release(self, is_done, rows):
        """bool [R], and rows that are done now, too: of nothing that has a length, so that lengths need no other program."""
        return is_done | rows

    def _scrub(self, slots: Slots, rows) -> Slots:
        """Empties rows bool [R], which hold a NaN."""
        return slots.replace(caches=jax.tree.map(lambda c: jnp.where(rows[:, None, None, None], 0, c), slots.caches))
