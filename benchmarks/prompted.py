"""The engine's prefill and decoding alone: prompts that lie on the device, and the floors of the programs that run them.

Axis letters: B rows, T positions, P positions an image, S pixels of an image's side.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import as_loaded, random_params
from llavamed_jax.config import IMAGE_TOKEN, preset
from llavamed_jax.generation.programs import Programs, Prompts
from llavamed_jax.generation.rows import bucket
from llavamed_jax.generation.sampling import Sampling
from llavamed_jax.preflight.floor import one_round


class Prompted:
    """The engine's programs with random weights, and a prompt of one image and text for each of B rows.

    Args:
      name: the model's preset.
      dtype: of weights and computation.
      B: rows.
      length: T, positions of a prompt.
      new_tokens: that a call of `decode` makes.
    """

    def __init__(self, name: str, dtype: str, B: int, length: int, new_tokens: int):
        cfg = preset(name)
        self.cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, eos_token_id=-5))  # nothing ends early
        kind, P, S = jnp.dtype(dtype), cfg.tokens_per_image, cfg.vision.image_size
        self.cache_length = -(-(bucket(length) + new_tokens + 1) // 256) * 256
        self.params, self.programs = as_loaded(random_params(self.cfg, kind)), Programs(self.cfg, kind, None, new_tokens)
        rng, rows = np.random.default_rng(0), np.arange(B, dtype=np.int32)
        ids = np.zeros((B, bucket(length)), np.int32)
        ids[:, :length] = rng.integers(3, cfg.decoder.vocab_size, (B, length))
        ids[:, 1 : 1 + P] = IMAGE_TOKEN
        prompts = Prompts(ids, images=rows[:, None], start=0 * rows, length=0 * rows + length, source=rows, target=rows,
                          limit=0 * rows + new_tokens + 1, sampling=Sampling.of([0] * B, [0] * B, [1] * B, [0] * B))
        pixels = rng.standard_normal((B, S, S, 3)).astype(np.float32)
        self._arguments = jax.device_put((pixels, rows)), jax.device_put(prompts)
        self._begun = dict(position=0 * rows + length, count=0 * rows + 1, is_done=rows < 0)
        self._features = self.programs.empty_features(B)
        self._slots = self.programs.resize(self.programs.empty_slots(), rows=B, length=self.cache_length)

    def prefill(self):
        """Images and prompts to their first tokens, from arrays on the device."""
        images, prompts = self._arguments
        self._features = self.programs.encode(self.params, self._features, *images)
        self._slots, made = self.programs.prefill(self.params, self._slots, self._features, prompts, width=self.cache_length)
        return made.tokens

    def prefill_floors(self, read) -> list:
        """Floors of the tower and of the prompts; copies between caches are not counted."""
        images, prompts = self._arguments
        caches = self.programs.take(self._slots, prompts.source, prompts.start, width=self.cache_length)
        return [read(self._text("encode", self._features, *images)),
                read(self._text("fill", caches, self._features, prompts), attended=(prompts.ids.shape[1] + 1) / 2)]

    def decode_floor(self, read, attended: float) -> list:
        """The floor of one token of all rows."""
        return [read(self._text("decode", self._slots, 0), attended=attended, of=one_round)]

    def _text(self, program: str, *arguments) -> str:
        return self.programs.lower(program, self.params, *arguments).compile().as_text()

    def decode(self):
        """The tokens after the first, of rows that `prefill` has filled: at the same places at each call."""
        self._slots, made = self.programs.decode(self.params, self._slots.replace(**self._begun), 0)
        return made.tokens
