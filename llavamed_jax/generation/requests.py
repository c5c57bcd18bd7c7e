"""Requests of the engine, and the jobs that run them. Axis letter: P positions an image."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from llavamed_jax.config import IMAGE_TOKEN, MOST_BEAMS, LlavaConfig
from llavamed_jax.errors import UserError, short

NO_NUMBER = "the model computed NaN or infinite values"


class PromptTooLong(UserError):
    """A prompt has more positions than the model takes.

    Args:
      name: the beginning of the sentence.
      length: positions of the prompt, images included.
      most: the most that were expected.
    """

    def __init__(self, name: str, length: int, most: int):
        super().__init__(f"{name} has {length} positions, images included; at most {most} were expected")
        self.length, self.most = length, most


_FIRST_IMAGE_KEY = -1000  # below all token ids and markers


@dataclasses.dataclass
class Request:
    """One prompt.

    Attributes:
      ids: token ids; an image is P positions of IMAGE_TOKEN.
      images: float32 (normalised) or uint8 [height,width,3] each, in order of appearance.
      max_new_tokens: the most new tokens.
      temperature: 0 is greedy.
      top_k: the number of most likely tokens to keep; 0 keeps all.
      top_p: the probability mass to keep; 1 keeps all.
      seed: a request with the same seed and settings always draws the same tokens.
      cancelled: if set while the engine runs, no more tokens are generated for this request.
      logprobs: whether the log probabilities of the tokens are wanted.
    """

    ids: Sequence[int]
    images: Sequence[np.ndarray] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    cancelled: bool = False
    logprobs: bool = False


class Job:
    """A request in the engine.

    Args:
      request: the request.
      index: its place among the requests of one call.

    Attributes:
      request: the request.
      index: its place among the requests of one call.
      images: the request's images as arrays.
      key: int64 [length of the prompt]: token ids, and at an image's positions a number that identifies its pixels. Two
        prompts have equal keys and values in the cache up to the first position where their `key` differs.
      image_keys: that number for each image.
      images_before: int64 [length of the prompt]: how many images begin before each position.
      boundaries: int64 [length of the prompt]: the last position at or before each one that is not inside an image.
      tokens: the tokens generated so far, including the end-of-sequence id.
      logprobs: for each of `tokens` its log probability, the ids of the likeliest tokens and their log probabilities,
        if the request wants them.
      shared: positions of the prompt whose keys and values were copied from another request; None before it has run.
      is_finished: whether no more tokens will come.
      error: the error, if the model failed on this request; other requests continue.
      is_alone: whether it must not share a prefix with another request.
      taken: how many of the tokens were taken.
    """

    def __init__(self, request: Request, index: int = 0):
        self.request, self.index = request, index
        self.images = [np.asarray(image) for image in request.images]
        self.image_keys = [_image_key(image) for image in self.images]
        self.key = np.array(request.ids, np.int64)
        is_image = self.key == IMAGE_TOKEN
        per_image = max(1, int(is_image.sum()) // max(1, len(self.image_keys)))
        if self.image_keys:
            self.key[is_image] = np.repeat(self.image_keys, per_image)
        positions_before = np.cumsum(is_image) - is_image
        self.images_before = -(-positions_before // per_image)
        self.boundaries = np.arange(len(self.key)) - positions_before % per_image * is_image
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, np.ndarray, np.ndarray]] = []
        self.shared: int | None = None
        self.is_finished = False
        self.error: UserError | None = None
        self.is_alone = False
        self.taken = 0

    def take(self) -> list[int]:
        """Returns the tokens that have come since the last call."""
        new = self.tokens[self.taken :]
        self.taken += len(new)
        return new


def _image_key(image: np.ndarray) -> int:
    """Returns a number, at most `_FIRST_IMAGE_KEY`, that identifies an image's pixels."""
    digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=7,
                             key=image.dtype.name.encode()).digest()
    return _FIRST_IMAGE_KEY - int.from_bytes(digest)


def check(request: Request, cfg: LlavaConfig, max_prompt: int, name: str) -> None:
    """Raises UserError, with a sentence that begins with `name`, if a request cannot be run."""
    P, ids, vocabulary = cfg.tokens_per_image, whole_numbers(request.ids, name), cfg.decoder.vocab_size
    if ids.ndim != 1:
        raise UserError(f"{name} has ids of the shape {ids.shape}; one row was expected")
    positions = int((ids == IMAGE_TOKEN).sum())
    if positions != P * len(request.images):
        raise UserError(f"{name} has {positions} image positions and {len(request.images)} images; {P} positions per "
                        "image were expected")
    if not ids.size:
        raise UserError(f"{name} is empty; at least one token was expected")
    if len(ids) > max_prompt:
        raise PromptTooLong(name, len(ids), max_prompt)
    if request.max_new_tokens < 1:
        raise UserError(f"{name} asks for {request.max_new_tokens} new tokens; at least 1 was expected")
    wrong = ids[(ids >= vocabulary) | ((ids < 0) & (ids != IMAGE_TOKEN))]
    if wrong.size:  # a lookup outside the table would return an arbitrary row without an error
        raise UserError(f"{name} holds the id {wrong[0]}; ids from 0 to {vocabulary - 1}, or {IMAGE_TOKEN}, were "
                        "expected")
    for image in request.images:
        check_image(cfg, image, name)


def whole_numbers(ids, name: str) -> np.ndarray:
    """Returns token ids as an array of any shape.

    Args:
      ids: the ids, a sequence or an array.
      name: the beginning of an error's sentence.

    Returns:
      An array of integers.

    Raises:
      UserError: the ids are not whole numbers.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of several lengths
        array = np.array([None])
    if not array.ndim or array.size and array.dtype.kind not in "iu":
        raise UserError(f"{name} has the ids {short(ids)}; whole numbers were expected")
    return array


def name_of(index: int, count: int) -> str:
    """Returns the name of a request in error messages."""
    return f"request {index}" if count > 1 else "the prompt"


def check_image(cfg: LlavaConfig, image: np.ndarray, name: str) -> None:
    """Raises UserError unless the image is [height,width,channels] of the tower's size, uint8 or normalised."""
    expected = (cfg.vision.image_size, cfg.vision.image_size, cfg.vision.num_channels)
    if np.shape(image) != expected:
        raise UserError(f"{name} has an image of shape {np.shape(image)}; {expected} was expected")
    kind = np.asarray(image).dtype
    # Other integers would be read as normalised pixels.
    if kind != np.uint8 and not jnp.issubdtype(kind, jnp.floating):
        raise UserError(f"{name} has an image of {kind}; uint8 or normalised float32 was expected")


def check_settings(max_new_tokens, temperature, top_p, top_k, num_beams, seed) -> None:
    """Raises UserError for settings that are out of range or NaN."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, numbers.Real):
            raise UserError(f"{name} is {short(value)}; a number was expected")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(f"temperature is {temperature} and top_p is {top_p}; temperature >= 0 and 0 < top_p <= 1 were "
                        "expected")
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("top_k", top_k, 0), ("num_beams", num_beams, 1),
                               ("seed", seed, 0)):
        if not isinstance(value, numbers.Integral) or value < least:
            raise UserError(f"{name} is {short(value)}; a whole number of at least {least} was expected")
    if num_beams > MOST_BEAMS:
        raise UserError(f"num_beams is {short(num_beams)}; at most {MOST_BEAMS} was expected")
    if num_beams > 1 and temperature > 0:
        raise UserError(f"num_beams is {num_beams} and temperature is {temperature}, but beam search does not sample; "
                        "temperature 0 or num_beams 1 was expected")
