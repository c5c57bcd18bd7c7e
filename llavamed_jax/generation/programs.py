"""The programs that the engine runs on the device, over a fixed number of rows.

A row of the cache belongs to one request at a time. Prefill starts from a copy of any row's prefix: a prefix that two
prompts share is computed once. A query attends only to keys at its own and earlier positions, so stale positions behind
it, of padding or of an earlier request, are never attended to, and are overwritten as the row grows.

Axis letters: R rows, B prompts of one prefill, T prompt positions, S cache positions, I images a prompt, P positions an
image, D model width, F places for image features, N tokens a decode loop, K key/value heads, H head width, V
vocabulary, A alternatives of a token.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llavamed_jax.config import LlavaConfig
from llavamed_jax.generation.sampling import Sampling, next_token
from llavamed_jax.models.attention.backend import backend_of
from llavamed_jax.models.decoders.cache import LayerCache, init_cache
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel import xla
from llavamed_jax.parallel.mesh import batch_sharding, replicated, spec_of
from llavamed_jax.utils import private

NO_TOKEN = -1  # fills the output of a finished row
ALTERNATIVES = 20  # likeliest tokens whose log probabilities a program returns, if asked


@flax.struct.dataclass
class Slots:
    """R rows; each belongs to a request or is free.

    Attributes:
      token: int32 [R], the last token, which has been returned but not yet fed to the model.
      position: int32 [R], the position of `token`.
      count: int32 [R], tokens returned so far.
      limit: int32 [R], the most tokens to return.
      is_done: bool [R]; a free row is done.
      sampling: settings of R rows.
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
    """B prompts, or the parts of them behind a shared prefix.

    Attributes:
      ids: int32 [B,T], padded on the right.
      images: int32 [B,I], places of their features; None without images.
      start: int32 [B], positions that are copied from the row `source`.
      length: int32 [B], the number of `ids` without padding.
      source: int32 [B], the row to copy a prefix from.
      target: int32 [B], the row of the prompt; R for a padding prompt, which has no row.
      limit: int32 [B], the most new tokens.
      sampling: settings of B rows.
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
class Logprobs:
    """Log probabilities of tokens under the model, before temperature and filters.

    Attributes:
      chosen: float32 [...], of the token that was returned.
      ids: int32 [...,A], the likeliest tokens, the best first.
      values: float32 [...,A], their log probabilities.
    """

    chosen: jax.Array
    ids: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, logits, token, number: int) -> "Logprobs":
        """Computes those of one step: logits float32 [B,V], token int32 [B], and `number` alternatives."""
        everything = jax.nn.log_softmax(logits, axis=-1)
        values, ids = jax.lax.top_k(everything, min(number, logits.shape[-1]))
        return cls(jnp.take_along_axis(everything, token[:, None], axis=-1)[:, 0], ids, values)


@flax.struct.dataclass
class Made:
    """The output that the host reads.

    Attributes:
      tokens: int32 [R,N], NO_TOKEN where a row was done; [B,1] after a prefill.
      is_done: bool [R], whether the row's request has finished.
      is_failed: bool [R], whether the logits held a NaN or an infinity.
      logprobs: of the tokens, [R,N] or [B,1]; None unless they were asked for.
    """

    tokens: jax.Array
    is_done: jax.Array
    is_failed: jax.Array
    logprobs: Logprobs | None = None


def cached_backend(platform: str, head_dim: int, cache_dtype) -> str:
    """Returns the backend of attention over a cache: `flash` where `auto` is, but not over int8; else `xla`."""
    auto = backend_of("auto", platform, head_dim)
    return auto if auto == "flash" and jnp.dtype(cache_dtype) != jnp.int8 else "xla"


class Programs:
    """The engine's programs, each compiled once a shape; `count()` returns how many compilations there were.

    Args:
      cfg: the model's shapes.
      dtype: of the computation.
      mesh: a Mesh with the axes data, fsdp and tp; None is one device.
      steps: N, the most tokens of a decode loop before the host reads them.
      cache_dtype: of keys and values in the cache; None is `dtype`.
      attention: backend of attention over the cache; None is `cached_backend`'s.
    """

    def __init__(self, cfg: LlavaConfig, dtype, mesh: Mesh | None, steps: int, cache_dtype=None,
                 attention: str | None = None):
        self.cfg, self.dtype, self.mesh, self.steps = cfg, dtype, mesh, steps
        self.cache_dtype = dtype if cache_dtype is None else cache_dtype
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        backend = attention or cached_backend(platform, cfg.decoder.head_dim, self.cache_dtype)
        self.model = Llava(cfg, dtype, attention=backend)
        self._options = xla.options(platform, xla.ENGINE)
        rows = slots = everywhere = None
        if mesh is not None:
            rows, everywhere = batch_sharding(mesh), replicated(mesh)
            # Explicit, so that each program returns the shardings that the next one was compiled for.
            slots = Slots(rows, rows, rows, rows, rows, Sampling(rows, rows, rows, rows), self.cache_shardings())
        self._programs = dict(
            encode=self.jit(self._encode, everywhere, donate_argnums=1),
            take=self.jit(self._take, slots and slots.caches, static_argnames="width"),
            fill=self.jit(self._fill, (slots and slots.caches, everywhere), donate_argnums=1, static_argnames="top"),
            put=self.jit(self._put, slots, donate_argnums=0),
            decode=self.jit(self._decode, (slots, everywhere), donate_argnums=1, static_argnames="top"),
            resize=self.jit(self._resize, slots, static_argnames=("rows", "length")),
            release=self.jit(self._release, rows, donate_argnums=0),
            scrub=self.jit(self._scrub, slots, donate_argnums=0))

    def __getattr__(self, name: str):
        """Returns a program (`encode`, `decode`, …) that is called with the mesh in context."""
        if name.startswith("_") or name not in self._programs:
            raise AttributeError(name)
        return functools.partial(self.run, name)

    def run(self, name: str, *args, **kwargs):
        """Runs a program."""
        with self.on_mesh():
            return self._programs[name](*args, **kwargs)

    def lower(self, name: str, *args, **kwargs):
        """Lowers a program for arguments that may be shapes; the shapes' shardings decide where it will run."""
        with self.on_mesh():
            return self._programs[name].lower(*args, **kwargs)

    def jit(self, function, out=None, **kwargs):
        """Returns a function that is compiled as the engine's programs are.

        Args:
          function: the function.
          out: shardings of what it returns; not used without a mesh.
          **kwargs: those of `jax.jit`.
        """
        shardings = {} if self.mesh is None else {"out_shardings": out}
        return jax.jit(function, **kwargs, **shardings, compiler_options=self._options)

    def on_mesh(self):
        """Returns the context for calls of programs.

        Never hold it across a `yield`: the caller's code would run in it.
        """
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def count(self) -> int:
        """Returns how many programs have been compiled."""
        return sum(private.compilations(program) for program in self._programs.values())

    def prefill(self, params, slots: Slots, features, prompts: Prompts, width: int, **wanted) -> tuple[Slots, Made]:
        """Runs prompts and samples the first token of each.

        The model runs on a copy of `width` positions of B rows, so that its program does not depend on R; the programs
        that copy from the rows and back compile quickly.

        Args:
          params: the unrolled parameter tree.
          slots: the rows; donated.
          features: image features [F,P,D], or None without images.
          prompts: the prompts.
          width: cache positions that the longest prompt needs.
          **wanted: `top`, the number of alternatives whose log probabilities are returned.

        Returns:
          The rows with the prompts, and the first tokens.
        """
        caches = self.take(slots, prompts.source, prompts.start, width=width)
        caches, made = self.fill(params, caches, features, prompts, **wanted)
        return self.put(slots, prompts.replace(ids=None, images=None), made, caches), made

    def cache_shardings(self) -> tuple[LayerCache, ...]:
        """Returns the shardings of the caches: rows over data and fsdp, heads over tp."""
        cache = NamedSharding(self.mesh, spec_of(("act_batch", "act_heads", None, None)))
        return jax.tree.map(lambda _: cache, jax.eval_shape(lambda: self.empty_caches(0, 0)))

    def empty_caches(self, rows: int, length: int) -> tuple[LayerCache, ...]:
        """Returns zero caches of `rows` rows and `length` positions."""
        return init_cache(self.cfg.decoder, rows, length, self.cache_dtype)

    def empty_features(self, places: int) -> jax.Array:
        """Returns zeros [F,P,D] for `places` image features."""
        return jnp.zeros((places, self.cfg.tokens_per_image, self.cfg.decoder.hidden_size), self.dtype)

    def empty_slots(self) -> Slots:
        """Returns zero rows of zero positions, to be resized."""
        zeros = jnp.zeros(0, jnp.int32)
        is_done, sampling = jnp.ones(0, bool), Sampling.of([], [], [], [])
        return Slots(zeros, zeros, zeros, zeros, is_done, sampling, self.empty_caches(0, 0))

    def ends(self, token):
        """Returns whether tokens end their sequences: int32 [...] -> bool [...]."""
        return jnp.isin(token, jnp.array(self.cfg.decoder.eos_ids, jnp.int32))

    def apply(self, params, *args, method: str):
        """Calls a method of the model."""
        return self.model.apply({"params": params}, *args, method=method)

    def _encode(self, params, features, pixels, places):
        """Encodes images [n,height,width,3] with tower and projector into places, int32 [n]; place F is dropped."""
        new = self.apply(params, pixels[:, None], method="encode_images")[:, 0]
        return features.at[places].set(new.astype(features.dtype), mode="drop")

    def _take(self, slots: Slots, source, start, *, width: int) -> tuple[LayerCache, ...]:
        """Copies the first `start` of `width` positions of rows, int32 [B] each; the other positions are zero."""
        # The rest of the row is an earlier request's and may hold a NaN, which an attention weight of 0 does not mask.
        is_shared = (jnp.arange(width) < start[:, None])[:, None, :, None]
        return jax.tree.map(lambda c: jnp.where(is_shared, c[source, :, :width], 0), slots.caches)

    def _fill(self, params, caches, features, prompts: Prompts, *,
              top: int = 0) -> tuple[tuple[LayerCache, ...], Made]:
        """Runs prompts behind the prefixes in their caches, and samples the first token of each."""
        p = prompts
        x = self.apply(params, p.ids, None if p.images is None else features[p.images], method="embed")
        positions = p.start[:, None] + jnp.arange(p.ids.shape[1])
        # Only the last position of a prompt goes through the rest of the last layer and the head.
        x, caches = self.apply(params, x, positions, caches, p.length - 1, method="step")
        token, is_failed, logprobs = self._next(params, x[:, 0], p.sampling, jnp.zeros_like(p.length), top)
        return caches, Made(token[:, None], is_failed | self.ends(token) | (p.limit <= 1), is_failed,
                            jax.tree.map(lambda x: x[:, None], logprobs))

    def _put(self, slots: Slots, prompts: Prompts, made: Made, caches) -> Slots:
        """Writes prompts that were run into their rows."""
        p, width = prompts, caches[0].k.shape[2]

        def put(old, new):
            return old.at[p.target].set(new, mode="drop")

        return Slots(
            put(slots.token, made.tokens[:, 0]), put(slots.position, p.start + p.length), put(slots.count, 1),
            put(slots.limit, p.limit), put(slots.is_done, made.is_done), jax.tree.map(put, slots.sampling, p.sampling),
            jax.tree.map(lambda old, new: old.at[p.target, :, :width].set(new, mode="drop"), slots.caches, caches))

    def _next(self, params, x, sampling, count, top: int):
        """Samples the next tokens from hidden states [B,D].

        Returns them, where the logits are not finite, and their log probabilities if `top` is not 0.
        """
        logits = self.apply(params, x, method="logits")
        token = next_token(logits, sampling, count)
        return token, ~jnp.isfinite(logits).all(axis=-1), Logprobs.of(logits, token, top) if top else None

    def _decode(self, params, slots: Slots, leave_at, *, top: int = 0) -> tuple[Slots, Made]:
        """Generates up to N tokens for each row.

        Stops when only `leave_at` rows are not done, so that other requests may enter. `top` is as in `prefill`; a
        program without it is a smaller one, so that requests that want no log probabilities do not pay for them.
        """
        def is_going_on(carry):
            step, _, slots = carry
            return (step < self.steps) & ((~slots.is_done).sum() > leave_at)

        def decode_one(carry):
            step, made, slots = carry
            x = self.apply(params, slots.token[:, None], None, method="embed")
            # A finished row is fed too, at its last position, since one program runs all rows.
            x, caches = self.apply(params, x, slots.position[:, None], slots.caches, method="step")
            token, is_failed, logprobs = self._next(params, x[:, 0], slots.sampling, slots.count, top)
            running, is_failed = ~slots.is_done, is_failed & ~slots.is_done
            count = slots.count + running
            made = made.replace(tokens=made.tokens.at[:, step].set(jnp.where(running & ~is_failed, token, NO_TOKEN)),
                                is_failed=made.is_failed | is_failed,
                                logprobs=jax.tree.map(lambda a, x: a.at[:, step].set(x), made.logprobs, logprobs))
            return step + 1, made, slots.replace(
                token=jnp.where(running, token, slots.token), position=slots.position + running, count=count,
                is_done=slots.is_done | is_failed | self.ends(token) | (count >= slots.limit), caches=caches)

        R = slots.token.shape[0]
        A = min(top, self.cfg.decoder.vocab_size)
        logprobs = Logprobs(*(jnp.zeros((R, self.steps, *more), kind) for more, kind in (
            ((), jnp.float32), ((A,), jnp.int32), ((A,), jnp.float32)))) if top else None
        made = Made(jnp.full((R, self.steps), NO_TOKEN, jnp.int32), slots.is_done, jnp.zeros(R, bool), logprobs)
        _, made, slots = jax.lax.while_loop(is_going_on, decode_one, (0, made, slots))
        return slots, made.replace(is_done=slots.is_done)

    def _resize(self, slots: Slots, *, rows: int, length: int) -> Slots:
        """Returns the first `rows` rows of `length` positions; new rows are free and empty."""
        def fit(x, axis, size, value=0):
            x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
            return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)

        return Slots(*(fit(x, 0, rows) for x in (slots.token, slots.position, slots.count, slots.limit)),
                     fit(slots.is_done, 0, rows, True), jax.tree.map(lambda x: fit(x, 0, rows), slots.sampling),
                     jax.tree.map(lambda c: fit(fit(c, 0, rows), 2, length), slots.caches))

    def _release(self, is_done, rows):
        """Marks `rows` as done: bool [R] each.

        Takes no array with a length, so that one compilation serves all lengths.
        """
        return is_done | rows

    def _scrub(self, slots: Slots, rows) -> Slots:
        """Sets rows, bool [R], that hold a NaN to zero."""
        return slots.replace(caches=jax.tree.map(lambda c: jnp.where(rows[:, None, None, None], 0, c), slots.caches))
