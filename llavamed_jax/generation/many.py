"""Answers any number of prompts on one engine; a prompt that fails does not stop the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request, check
from llavamed_jax.generation.sampling import row_seed
from llavamed_jax.generation.text_stream import Completion, TextStream, completion


def answer_each(engine: Engine, prompts: Iterable[tuple[Sequence[int], Sequence[np.ndarray], int]],
                settings: tuple[int, float, int, float], seed: int,
                new_stream: Callable[[], TextStream]) -> Iterator[tuple[int, Completion | UserError]]:
    """Yields (index of a prompt, its answer or its error) in the order in which answers finish.

    Args:
      engine: the engine.
      prompts: for each prompt its ids, its images and the number of equal prompts before it.
      settings: the most new tokens, temperature, top-k and top-p of every prompt.
      seed: of the draws.
      new_stream: begins the text of an answer.

    Yields:
      Pairs of an index and a Completion or a UserError.
    """
    refused: deque[tuple[int, UserError]] = deque()
    # By the engine's count of requests, which does not count the refused ones.
    streams: dict[int, tuple[int, TextStream]] = {}

    def requests():
        taken, longest = 0, engine.max_prompt
        for index, (ids, images, nth) in enumerate(prompts):
            request = Request(ids, images, *settings)
            try:
                check(request, engine.cfg, longest, "the prompt")
            except UserError as error:
                refused.append((index, error))
                continue
            if request.temperature:  # only then, since hashing the image takes time
                request.seed = row_seed(seed, ids, images, nth)
            streams[taken] = index, new_stream()
            taken += 1
            yield request

    for job in engine.feed(requests()):
        while refused:
            yield refused.popleft()
        if job.index not in streams:  # a stop string ended this answer earlier; its row is freed now
            continue
        index, text = streams[job.index]
        text.push(job.take())
        job.request.cancelled = text.is_stopped
        if job.is_finished or text.is_stopped:
            del streams[job.index]
            yield index, job.error or completion(text, engine.eos)
    yield from refused
