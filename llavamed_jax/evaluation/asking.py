"""Questions about images -> a model's answers: prompts are made and images are read while others are answered."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.generation.text import TextStream

if TYPE_CHECKING:  # scoring predictions that exist must not import jax
    from llavamed_jax.assistant import LlavaMed

_READERS = 2  # threads that read images; a file is decoded and resized without Python's lock
_AHEAD = 8  # images that are read before they are needed


@dataclass(frozen=True)
class Generation:
    """How answers are generated. The defaults are greedy decoding with the original's limit of 1,024 new tokens."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    num_beams: int = 1
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """`text` as generated; `finish_reason` is `stop` or `length`; `tokens_cut` were lost of a prompt too long."""

    text: str
    finish_reason: str
    tokens_cut: int = 0


class Asking:
    """Questions on their way through a model, in bounded memory.

    Args:
      questions: (question, image path) pairs.
      failed: where the errors of questions that could not be answered go, by their place.
    """

    def __init__(self, model: LlavaMed, questions: Sequence[tuple[str, str]], failed: dict[int, UserError]):
        self._model, self._questions, self._failed = model, questions, failed
        seen: Counter = Counter()
        self._nth = []  # how many equal questions came before, those that are answered already among them
        for question in questions:
            self._nth.append(seen[question])
            seen[question] += 1

    def each(self, asked: Sequence[int], generation: Generation) -> Iterator[tuple[int, Answer]]:
        """The answers to the questions at these places, each as it comes."""
        given: list[tuple[int, int]] = []

        def prompts():
            for i, ids, image, lost in self._prompts(asked):
                given.append((i, lost))
                yield ids, [image], self._nth[i]

        settings = dict(max_new_tokens=generation.max_new_tokens, temperature=generation.temperature, seed=generation.seed)
        with contextlib.closing(self._model.answer_each(prompts(), **settings)) as found:
            for index, answer in found:
                i, lost = given[index]
                if isinstance(answer, UserError):
                    self._failed[i] = answer
                else:
                    yield i, Answer(answer.text, answer.finish_reason, lost)

    def beams(self, asked: Sequence[int], generation: Generation) -> Iterator[tuple[int, Answer]]:
        """The same by beam search, which answers a batch at a time."""
        from llavamed_jax.assistant import completion  # brings jax, as whoever made the model has

        model, prompts = self._model, self._prompts(asked)
        while batch := list(itertools.islice(prompts, generation.batch_size)):
            indices, rows, images, lost = zip(*batch)
            for i, tokens, cut in zip(indices, self._search(rows, images, generation), lost, strict=True):
                if isinstance(tokens, UserError):
                    self._failed[i] = tokens
                    continue
                stream = TextStream(model.processor.decode, model.processor.stop)
                stream.push(tokens)
                answer = completion(stream, model.engine.eos)
                yield i, Answer(answer.text, answer.finish_reason, cut)

    def _search(self, rows, images, generation: Generation) -> list[list[int] | UserError]:
        try:
            return self._model.generate_tokens(rows, [[image] for image in images], max_new_tokens=generation.max_new_tokens,
                                               num_beams=generation.num_beams, seed=generation.seed)
        except UserError as error:  # of one of them: each is asked by itself
            if len(rows) == 1:
                return [error]
            return [self._search([row], [image], generation)[0] for row, image in zip(rows, images)]

    def _prompts(self, asked: Sequence[int]) -> Iterator[tuple[int, list[int], np.ndarray, int]]:
        """(place, ids, image, tokens cut) of each question whose image can be read."""
        processor, limit = self._model.processor, self._model.engine.max_prompt
        for i, image in zip(asked, read_ahead(processor, [self._questions[i][1] for i in asked])):
            if isinstance(image, UserError):
                self._failed[i] = image
                continue
            ids = processor.expand(processor.encode(processor.prompt(_messages(*self._questions[i]))))
            yield i, ids[:limit], image, max(0, len(ids) - limit)


def read_ahead(processor, paths: Sequence[str]) -> Iterator[np.ndarray | UserError]:
    """The pixels of each path, uint8 [H,W,3], or why there are none. A path that follows itself is read once."""
    def read(path):
        try:
            return processor.images_uint8([path])[0]
        except UserError as error:
            return error

    groups = ((path, len(list(group))) for path, group in itertools.groupby(paths))
    pool, reading = ThreadPoolExecutor(_READERS), deque()
    try:
        while True:
            for path, count in itertools.islice(groups, _AHEAD - len(reading)):
                reading.append((pool.submit(read, path), count))
            if not reading:
                return
            image, count = reading.popleft()
            yield from itertools.repeat(image.result(), count)
    finally:
        pool.shutdown(cancel_futures=True)


def _messages(question: str, image: str) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
