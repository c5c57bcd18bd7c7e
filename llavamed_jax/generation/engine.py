"""The generation engine: requests go in, tokens come out.

Requests are taken in batches of similar length. A batch's prompts are padded to a bucket, so that few shapes are
compiled; one program runs the tower and the prompt (prefill), another decodes up to `steps` tokens on the device before
the host looks. Padding stands behind a prompt and is overwritten as the row grows, and a query sees only keys at its
own or earlier positions: what a row gives does not depend on the rows beside it.
Axis letters: B rows, T prompt positions, S cache positions, I images a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llavamed_jax.config import IMAGE_TOKEN, LlavaConfig
from llavamed_jax.data.images import normalize
from llavamed_jax.errors import UserError
from llavamed_jax.generation.cache import init_cache
from llavamed_jax.generation.sampling import Sampling, next_token
from llavamed_jax.models.decoder import LayerCache
from llavamed_jax.models.llava import PARAM_AXES, Llava, check_heads
from llavamed_jax.parallel.mesh import batch_sharding, param_shardings, spec_of

NO_TOKEN = -1  # in a finished row's part of the output


@dataclasses.dataclass
class Request:
    """One prompt.

    Attributes:
      ids: token ids; an image is P positions of IMAGE_TOKEN.
      images: float32 (normalised) or uint8 [height,width,3] each, in order of appearance.
      seed: with the same seed and settings a request always draws the same tokens.
      cancelled: set it while the engine runs, and no more tokens are made for this request.
    """

    ids: Sequence[int]
    images: Sequence[np.ndarray] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    cancelled: bool = False


@flax.struct.dataclass
class State:
    """What the decode loop carries for B rows.

    Attributes:
      token: int32 [B], the last token, which has been handed out and not yet fed.
      position: int32 [B], where it will stand.
      count: int32 [B] tokens handed out so far.
      is_done: bool [B].
    """

    token: jax.Array
    position: jax.Array
    count: jax.Array
    is_done: jax.Array
    limit: jax.Array
    sampling: Sampling
    caches: Any


class Engine:
    """Generates for one model.

    Args:
      cfg: the model's shapes.
      params: its unrolled parameter tree.
      dtype: of computation and cache.
      mesh: rows go over data and fsdp, heads over tp; None: one device.
      batch_size: rows that are decoded together.
      steps: tokens decoded on the device between two looks of the host.
    """

    def __init__(self, cfg: LlavaConfig, params, dtype=jnp.float32, mesh: Mesh | None = None, batch_size: int = 16, steps: int = 16):
        self.cfg, self.dtype, self.mesh, self.batch_size, self.steps = cfg, dtype, mesh, batch_size, steps
        self.model = Llava(cfg, dtype)
        self.params = params if mesh is None else jax.device_put(params, param_shardings(params, PARAM_AXES, mesh))
        self.eos = cfg.decoder.eos_ids
        shardings = {}, {}
        if mesh is not None:
            check_heads(cfg, mesh)
            state = self._state_shardings(mesh)
            shardings = {"out_shardings": state}, {"out_shardings": (state, batch_sharding(mesh))}
        self._prefill = jax.jit(self._prefill_batch, static_argnames="cache_length", **shardings[0])
        self._decode = jax.jit(self._decode_steps, donate_argnames="state", **shardings[1])

    @property
    def max_prompt(self) -> int:
        """The longest prompt, in positions with images expanded, that leaves room for a token."""
        return min(self.cfg.max_length or self.cfg.decoder.max_position_embeddings, self.cfg.decoder.max_position_embeddings - 1)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """The new token ids of each request, the end-of-sequence id included."""
        out: list[list[int]] = [[] for _ in requests]
        for index, tokens in self.stream(requests):
            out[index] += tokens
        return out

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of the request, its next tokens) as they are made.

        Raises:
          UserError: (a ValueError) a request whose images do not fit its markers, or that is too long. Nothing has run then.
        """
        for i, request in enumerate(requests):
            self.check(request, f"request {i}" if len(requests) > 1 else "the prompt")
        # Longest first: what does not fit in memory shows at once, and rows of a batch need similar room.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        for start in range(0, len(order), self.batch_size):
            yield from self._run_batch(requests, order[start : start + self.batch_size])

    def check(self, request: Request, name: str) -> None:
        """Raises UserError, a sentence that begins with `name`, for a request that cannot be run."""
        P = self.cfg.tokens_per_image
        positions = sum(i == IMAGE_TOKEN for i in request.ids)
        if positions != P * len(request.images):
            raise UserError(f"{name} has {positions} image positions and {len(request.images)} images; {P} positions an image "
                            "were expected")
        if not request.ids:
            raise UserError(f"{name} is empty; at least one token was expected")
        if len(request.ids) > self.max_prompt:
            raise UserError(f"{name} has {len(request.ids)} positions, images included; at most {self.max_prompt} were expected")
        if request.max_new_tokens < 1:
            raise UserError(f"{name} asks for {request.max_new_tokens} new tokens; at least 1 was expected")
        ids, vocabulary = np.asarray(request.ids), self.cfg.decoder.vocab_size
        wrong = ids[(ids >= vocabulary) | ((ids < 0) & (ids != IMAGE_TOKEN))]
        if wrong.size:  # a lookup outside the table would give some row, and an answer to something else
            raise UserError(f"{name} holds the id {wrong[0]}; ids from 0 to {vocabulary - 1}, or {IMAGE_TOKEN}, were expected")
        for image in request.images:
            check_image(self.cfg, image, name)

    def _run_batch(self, requests, indices):
        rows = [requests[i] for i in indices]
        batch, cache_length = self.batch(rows)
        state = self.on_mesh(self._prefill, self.params, cache_length=cache_length, **batch)
        chunk = state.token[:, None]
        while True:
            tokens, done = np.asarray(chunk), np.asarray(state.is_done)
            for row, i in enumerate(indices):
                new = [int(t) for t in tokens[row] if t != NO_TOKEN]
                if new and not requests[i].cancelled:
                    yield i, new
            stopped = np.array([r.cancelled for r in rows] + [True] * (len(done) - len(rows)))
            if (done | stopped).all():
                return
            if (stopped & ~done).any():
                state = state.replace(is_done=state.is_done | jnp.asarray(stopped))
            state, chunk = self.on_mesh(self._decode, self.params, state)

    def on_mesh(self, program, *args, **kwargs):
        """Calls a program with the mesh in context; never across a `yield`, where the caller's code would run in it."""
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            return program(*args, **kwargs)

    def _state_shardings(self, mesh: Mesh) -> State:
        """Said aloud, so that what prefill returns and what the loop returns are one type and compile one loop."""
        rows = batch_sharding(mesh)
        return State(rows, rows, rows, rows, rows, Sampling(rows, rows, rows, rows), self.cache_shardings(mesh))

    def cache_shardings(self, mesh: Mesh) -> tuple[LayerCache, ...]:
        cache = NamedSharding(mesh, spec_of(("act_batch", "act_heads", None, None)))
        return tuple(LayerCache(cache, cache) for _ in range(self.cfg.decoder.num_layers))

    def batch(self, rows: Sequence[Request]) -> tuple[dict[str, Any], int]:
        """Arrays of a batch, prompts padded to a bucket and rows to a power of two that the mesh divides; and the cache's length."""
        B = _power_of_two(len(rows))
        if self.mesh is not None:
            shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            B = -(-B // shards) * shards
        T = bucket(max(len(r.ids) for r in rows))
        limits = [min(r.max_new_tokens, self.cfg.decoder.max_position_embeddings - len(r.ids)) for r in rows]
        cache_length = bucket(max(len(r.ids) + limit for r, limit in zip(rows, limits)))
        ids = np.zeros((B, T), np.int32)
        I = max(len(r.images) for r in rows)
        pixels = self._pixels(rows, B, I) if I else None
        for b, row in enumerate(rows):
            ids[b, : len(row.ids)] = row.ids
        fill = [1] * (B - len(rows))  # rows that nobody asked for: one token long, done at once
        settings = [(r.temperature, r.top_k, r.top_p, r.seed) for r in rows] + [(0, 0, 1, 0)] * len(fill)
        sampling = Sampling.of(*zip(*settings))
        batch = dict(ids=ids, pixels=pixels, lengths=np.array([len(r.ids) for r in rows] + fill, np.int32),
                     limit=np.array(limits + fill, np.int32), sampling=sampling)
        return (batch if self.mesh is None else jax.device_put(batch, batch_sharding(self.mesh))), max(cache_length, T)

    def _pixels(self, rows: Sequence[Request], B: int, I: int) -> np.ndarray:
        """The rows' images [B,I,height,width,C]: uint8, a quarter of the bytes, unless one of them is normalised already."""
        v = self.cfg.vision
        is_raw = all(np.asarray(image).dtype == np.uint8 for row in rows for image in row.images)
        pixels = np.zeros((B, I, v.image_size, v.image_size, v.num_channels), np.uint8 if is_raw else np.float32)
        for b, row in enumerate(rows):
            for slot, image in enumerate(map(np.asarray, row.images)):
                pixels[b, slot] = image if is_raw or image.dtype != np.uint8 else normalize(image, v.image_mean, v.image_std)
        return pixels

    def _prefill_batch(self, params, ids, pixels, lengths, limit, sampling, *, cache_length: int) -> State:
        """Runs the prompts and draws each row's first token."""
        logits, caches = self.run_prompts(params, ids, pixels, lengths, cache_length)
        token = next_token(logits, sampling, jnp.zeros_like(lengths))
        count = jnp.ones_like(lengths)
        return State(token, lengths, count, self.ends(token) | (count >= limit), limit, sampling, caches)

    def ends(self, token):
        """int32 [...] -> bool [...]: whether a token ends its sequence."""
        return jnp.isin(token, jnp.array(self.eos, jnp.int32))

    def run_prompts(self, params, ids, pixels, lengths, cache_length: int):
        """Prompts int32 [B,T], real up to `lengths` [B] -> the logits behind them [B,V], caches of `cache_length` positions."""
        B, T = ids.shape
        variables = {"params": params}
        features = None if pixels is None else self.model.apply(variables, pixels, method="encode_images")
        x = self.model.apply(variables, ids, features, method="embed")
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        # A prompt looks at itself alone: it fills a cache of its own length, and room for the answer is added after.
        caches = init_cache(self.cfg.decoder, B, T, self.dtype)
        x, caches = self.model.apply(variables, x, positions, caches, method="step")
        caches = jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, 0), (0, cache_length - T), (0, 0))), caches)
        # Only the last position of a prompt goes through the head.
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.model.apply(variables, last, method="logits"), caches

    def _decode_steps(self, params, state: State) -> tuple[State, jax.Array]:
        """Up to `steps` tokens for each row, int32 [B,steps] with NO_TOKEN where a row is done; stops when all are."""
        def unfinished(carry):
            step, _, state = carry
            return (step < self.steps) & ~state.is_done.all()

        def decode_one(carry):
            step, chunk, state = carry
            x = self.model.apply({"params": params}, state.token[:, None], None, method="embed")
            # A finished row is fed too, at its last position: rows have one program.
            x, caches = self.model.apply({"params": params}, x, state.position[:, None], state.caches, method="step")
            logits = self.model.apply({"params": params}, x[:, 0], method="logits")
            token = next_token(logits, state.sampling, state.count)
            running = ~state.is_done
            count = state.count + running
            chunk = chunk.at[:, step].set(jnp.where(running, token, NO_TOKEN))
            return step + 1, chunk, state.replace(
                token=jnp.where(running, token, state.token), position=state.position + running, count=count,
                is_done=state.is_done | self.ends(token) | (count >= state.limit), caches=caches)

        chunk = jnp.full((state.token.shape[0], self.steps), NO_TOKEN, jnp.int32)
        _, chunk, state = jax.lax.while_loop(unfinished, decode_one, (0, chunk, state))
        return state, chunk


def bucket(length: int) -> int:
    """Lengths that are compiled: multiples of 64 up to 512, of 128 up to 1,024 (an image of 576 and its question), then of 256."""
    step = 64 if length <= 512 else 128 if length <= 1024 else 256
    return -(-length // step) * step


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def check_image(cfg: LlavaConfig, image: np.ndarray, name: str) -> None:
    """Raises UserError unless the image is float [height,width,channels] of the tower's size."""
    expected = (cfg.vision.image_size, cfg.vision.image_size, cfg.vision.num_channels)
    if np.shape(image) != expected:
        raise UserError(f"{name} has an image of shape {np.shape(image)}; {expected} was expected")
