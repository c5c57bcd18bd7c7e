"""A model that is loaded here answers: prompts are made and images are read while others are answered."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer, Generation
from llavamed_jax.evaluation.answering.asked import versions
from llavamed_jax.generation.text_stream import TextStream
from llavamed_jax.utils import machine

if TYPE_CHECKING:  # scoring predictions that exist must not import jax
    from llavamed_jax.assistant import LlavaMed

_PACKAGES = ("jax", "jaxlib", "flax", "ml_dtypes", "sentencepiece", "tokenizers", "transformers")  # compute, and read text
_READERS = 2  # threads that read images; a file is decoded and resized without Python's lock
_AHEAD = 8  # images that are read before they are needed


class LocalModel:
    """A loaded model as one that answers an evaluation's questions (`answerer.Answerer`).

    A prompt that with its image is longer than the model takes (the checkpoint's `tokenizer_model_max_length`) is cut from
    the right, as the original does, which loses the end of the instruction; it is counted in its answer.

    Args:
      name: what predictions call it.
    """

    def __init__(self, model: LlavaMed, name: str):
        model.processor = model.processor.for_evaluation()
        self.model, self.name = model, name
        self._file_hashes: dict[str, str] | None = None

    def answers(self, questions: Sequence[tuple[str, str]], asked: Sequence[int], generation: Generation,
                failed: dict[int, UserError]) -> Iterator[tuple[int, Answer]]:
        """As `Answerer.answers` says."""
        self.model.engine.batch_size = generation.batch_size
        asking = _Asking(self.model, questions, failed)
        return asking.beams(asked, generation) if generation.num_beams > 1 else asking.each(asked, generation)

    def facts(self) -> dict[str, str]:
        """The device that the model ran on; nothing is imported for it, a model that ran has imported jax."""
        jax = sys.modules.get("jax")
        return {"device": "not known" if jax is None else f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


    def describe(self) -> dict[str, object]:
        """As `Answerer.describe` says; `checkpoint_sha256` is of the list of the checkpoint's files (`identity.Origin`)."""
        described, origin = getattr(self.model, "describe", dict)(), getattr(self.model, "origin", None)
        if origin is None:
            return described
        hashes = self._hashes(origin)
        return described | {"checkpoint_sha256": origin.sha256(hashes) if origin.files else None, "files": hashes}

    def depends_on(self) -> dict[str, object]:
        """As `Answerer.depends_on` says: every file of model, tower and tokenizer, and what was made of them."""
        said, origin = getattr(self.model, "describe", dict)(), getattr(self.model, "origin", None)
        files = {} if origin is None else {f"the file {name}": digest for name, digest in self._hashes(origin).items()}
        made = {f"the {name}": said[name] for name in ("template", "dtype", "mesh", "quantize", "adapter", "step") if name in said}
        config = {} if origin is None else {"the model's config": origin.config}
        return {"the model's name": self.name, **made, **config, **files, **versions(_PACKAGES)}

    def machine(self) -> dict[str, object]:
        """As `Answerer.machine` says."""
        jax = sys.modules.get("jax")
        if jax is None:
            return {}
        return {"device": jax.devices()[0].device_kind, "devices of a process": jax.local_device_count(),
                "CPU cores": machine.cpu_cores(), "CPU": machine.cpu_model(), "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                "matmul precision": jax.config.jax_default_matmul_precision}

    def _hashes(self, origin) -> dict[str, str]:
        if self._file_hashes is None:
            self._file_hashes = origin.hashes()
        return self._file_hashes


class _Asking:
    """Questions on their way through a model, in bounded memory."""

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
            text, path = self._questions[i]
            ids = processor.expand(processor.encode(processor.question(text, [path])))
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


def model_name(path: str) -> str:
    """The last part of a checkpoint's path; with the parent's before it where the last part alone says nothing."""
    resolved = Path(path.partition("@")[0])
    if resolved.name.startswith("checkpoint-"):
        return f"{resolved.parent.name}_{resolved.name}"
    if resolved.parent.name == "checkpoints":
        return f"{resolved.parent.parent.name}_{resolved.name}"
    return resolved.name or str(path)
