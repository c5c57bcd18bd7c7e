"""Answers questions with a loaded model; reads the next images while earlier questions are answered."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llavamed_jax.config import IMAGE_TOKEN
from llavamed_jax.datasets.sample import Shown
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer, Generation
from llavamed_jax.evaluation.answering.asked import OF_MODEL, versions
from llavamed_jax.generation.text_stream import TextStream, completion
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils import machine

if TYPE_CHECKING:  # scoring a file of predictions must not import jax
    from llavamed_jax.assistant import LlavaMed

_READERS = 2  # threads that read images; decoding and resizing release Python's lock
_IMAGE_NAME = re.compile(r"<image_\d+>:?")  # of the sets that number their images
_AHEAD = 8  # images that are read before they are needed


class LocalModel:
    """Answers an evaluation's questions with a loaded model; implements `answerer.Answerer`.

    If a prompt with its image is longer than the model takes (the checkpoint's `tokenizer_model_max_length`), its end
    is cut, as in the original, so the end of the instruction is lost; behind many images the whole question may be. The
    answer states how many tokens were cut, and whether any of the question is left.

    Args:
      model: the loaded model.
      name: the name of the model in predictions.
    """

    def __init__(self, model: LlavaMed, name: str):
        model.processor = model.processor.for_evaluation()
        self.model, self.name = model, name
        self._file_hashes: dict[str, str] | None = None
        self._prompts: dict[tuple[str, int], np.ndarray] = {}

    def answers(self, questions: Sequence[tuple[str, Shown]], asked: Sequence[int], generation: Generation,
                failed: dict[int, UserError]) -> Iterator[tuple[int, Answer]]:
        """Implements `Answerer.answers`."""
        self.model.engine.batch_size = generation.batch_size
        asking = _Asking(self.model, questions, failed, self._prompts)
        return asking.beams(asked, generation) if generation.num_beams > 1 else asking.each(asked, generation)

    def facts(self) -> dict[str, str]:
        """Returns the devices that the model ran on. Does not import jax: without jax, no model has run."""
        jax = sys.modules.get("jax")
        return {"device": "not known" if jax is None else f"{jax.device_count()} x {jax.devices()[0].device_kind}"}

    def describe(self) -> dict[str, object]:
        """Implements `Answerer.describe`; `checkpoint_sha256` hashes the list of the checkpoint's files."""
        described, origin = getattr(self.model, "describe", dict)(), getattr(self.model, "origin", None)
        if origin is None:
            return described
        hashes = self._hashes(origin)
        return described | {"checkpoint_sha256": origin.sha256(hashes) if origin.files else None, "files": hashes}

    def depends_on(self) -> dict[str, object]:
        """Implements `Answerer.depends_on`: every file of model, tower and tokenizer, and the settings of loading."""
        said, origin = getattr(self.model, "describe", dict)(), getattr(self.model, "origin", None)
        files = {} if origin is None else {f"the file {name}": digest for name, digest in self._hashes(origin).items()}
        settings = ("template", "dtype", "mesh", "quantize", "kv_cache", "adapter", "step")
        made = {f"the {name}": said[name] for name in settings if name in said}
        config = {} if origin is None else {"the model's config": origin.config}
        return {"the model's name": self.name, **made, **config, **files, **versions(OF_MODEL)}

    def machine(self) -> dict[str, object]:
        """Implements `Answerer.machine`."""
        jax = sys.modules.get("jax")
        if jax is None:
            return {}
        return {"device": jax.devices()[0].device_kind, "devices of a process": jax.local_device_count(),
                "CPU cores": machine.cpu_cores(), "CPU": machine.cpu_model(),
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                "matmul precision": jax.config.jax_default_matmul_precision}

    def _hashes(self, origin) -> dict[str, str]:
        if self._file_hashes is None:
            self._file_hashes = origin.hashes()
        return self._file_hashes


class _Asking:
    """Passes questions through a model, in bounded memory.

    Args:
      model: the loaded model.
      questions: all (question, paths of its images) pairs.
      failed: receives the errors of questions that cannot be answered, by index.
      encoded: question and number of images -> the ids of its prompt, int32. The controls ask the same questions
        again.
    """

    def __init__(self, model: LlavaMed, questions: Sequence[tuple[str, Shown]],
                 failed: dict[int, UserError], encoded: dict[tuple[str, int], np.ndarray]):
        self._model, self._questions, self._failed, self._encoded = model, questions, failed, encoded
        seen: Counter = Counter()
        self._nth = []  # number of equal questions before this one, including those that are answered already
        for question in questions:
            self._nth.append(seen[question])
            seen[question] += 1

    def each(self, asked: Sequence[int], generation: Generation) -> Iterator[tuple[int, Answer]]:
        """Answers the questions at these indices; yields each answer as soon as it is there."""
        given: list[tuple[int, int, bool]] = []

        def prompts():
            for i, ids, images, *cut in self._prompts(asked):
                given.append((i, *cut))
                yield ids, images, self._nth[i]

        settings = dict(max_new_tokens=generation.max_new_tokens, temperature=generation.temperature,
                        seed=generation.seed)
        with contextlib.closing(self._model.answer_each(prompts(), **settings)) as found:
            for index, answer in found:
                i, *cut = given[index]
                if isinstance(answer, UserError):
                    self._failed[i] = answer
                else:
                    yield i, Answer(answer.text, answer.finish_reason, *cut)

    def beams(self, asked: Sequence[int], generation: Generation) -> Iterator[tuple[int, Answer]]:
        """Answers the questions at these indices by beam search, a batch at a time."""
        model, prompts = self._model, self._prompts(asked)
        while batch := list(itertools.islice(prompts, generation.batch_size)):
            rows, images = ([prompt[place] for prompt in batch] for place in (1, 2))
            for (i, _, _, *cut), tokens in zip(batch, self._search(rows, images, generation), strict=True):
                if isinstance(tokens, UserError):
                    self._failed[i] = tokens
                    continue
                stream = TextStream(model.processor.decode, model.processor.stop)
                stream.push(tokens)
                answer = completion(stream, model.engine.eos)
                yield i, Answer(answer.text, answer.finish_reason, *cut)

    def _search(self, rows, images, generation: Generation) -> list[list[int] | UserError]:
        try:
            return self._model.generate_tokens(rows, list(images),
                                               max_new_tokens=generation.max_new_tokens,
                                               num_beams=generation.num_beams, seed=generation.seed)
        except UserError as error:  # one question of the batch is invalid, so each is asked by itself
            if len(rows) == 1:
                return [error]
            return [self._search([row], [each], generation)[0] for row, each in zip(rows, images)]

    def _prompts(self, asked: Sequence[int]) -> Iterator[tuple[int, list[int], list[np.ndarray], int, bool]]:
        """Yields (index, ids, images, tokens cut, whether a word of the question is left); skips unreadable images."""
        processor, limit = self._model.processor, self._model.engine.max_prompt
        for i, images in zip(asked, read_ahead(processor, [self._questions[i][1] for i in asked])):
            if isinstance(images, UserError):
                self._failed[i] = images
                continue
            text, paths = self._questions[i]
            key = (text, len(paths))
            if key not in self._encoded:
                ids = processor.expand(processor.encode(processor.question(text, paths)))
                self._encoded[key] = np.array(ids, np.int32)
            ids = self._encoded[key]
            kept, seen = _cut(ids, images, limit)
            yield i, kept.tolist(), seen, len(ids) - len(kept), _has_question(text, ids, kept, len(paths), processor)


def _cut(ids: np.ndarray, images: list[np.ndarray], limit: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cuts a prompt at its end; of several images, one that the cut would split is left out whole."""
    kept = ids[:limit]
    if len(kept) == len(ids) or len(images) < 2:
        return kept, images
    places = np.flatnonzero(ids == IMAGE_TOKEN)
    of_one = len(places) // len(images)
    whole, rest = divmod(int((kept == IMAGE_TOKEN).sum()), of_one)
    return kept[:places[whole * of_one]] if rest else kept, images[:whole]


def _has_question(text: str, ids: np.ndarray, kept: np.ndarray, num_images: int, processor) -> bool:
    """Returns whether a cut prompt still shows any of the question's text; names of images are no such text.

    Args:
      text: the question, with or without a marker for each image.
      ids: the ids of the whole prompt.
      kept: those before the cut.
      num_images: the images of the whole prompt.
      processor: turns ids into text.
    """
    if len(kept) == len(ids):
        return True
    parts = text.split(IMAGE_MARKER)
    parts = parts if len(parts) == num_images + 1 else [""] * num_images + [text]
    before = next((place for place, part in enumerate(parts) if _IMAGE_NAME.sub("", part).strip()), num_images)
    places = np.flatnonzero(ids == IMAGE_TOKEN)
    start = places[before * (len(places) // num_images) - 1] + 1 if before and len(places) else 0
    return bool(processor.decode([each for each in kept[start:].tolist() if each != IMAGE_TOKEN]).strip())


def read_ahead(processor, shown: Sequence[Shown]) -> Iterator[list[np.ndarray] | UserError]:
    """Reads images in threads, ahead of their use. What is repeated without a gap is read once.

    Args:
      processor: turns files into pixels.
      shown: the paths of each question's images.

    Yields:
      For each question the pixels of its images, uint8 [H,W,3], or the error.
    """
    def read(paths):
        try:
            return [processor.images_uint8([path])[0] for path in paths]
        except UserError as error:
            return error

    groups = ((paths, len(list(group))) for paths, group in itertools.groupby(shown))
    pool, reading = ThreadPoolExecutor(_READERS), deque()
    try:
        while True:
            for paths, count in itertools.islice(groups, _AHEAD - len(reading)):
                reading.append((pool.submit(read, paths), count))
            if not reading:
                return
            images, count = reading.popleft()
            yield from itertools.repeat(images.result(), count)
    finally:
        pool.shutdown(cancel_futures=True)


def model_name(path: str) -> str:
    """Returns the last part of a checkpoint's path, preceded by the run's name if the last part is a step."""
    resolved = Path(path.partition("@")[0])
    if resolved.name.startswith("checkpoint-"):
        return f"{resolved.parent.name}_{resolved.name}"
    if resolved.parent.name == "checkpoints":
        return f"{resolved.parent.parent.name}_{resolved.name}"
    return resolved.name or str(path)
