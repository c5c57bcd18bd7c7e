"""Answers an evaluation's questions through OpenAI's protocol, with any server and any model."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llavamed_jax.datasets.sample import Shown
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation.answering.answerer import Answer, Generation
from llavamed_jax.images.load import load_image
from llavamed_jax.openai_client.client import Service
from llavamed_jax.openai_client.replies import TooLongError
from llavamed_jax.text.conversation import IMAGE_MARKER

# Files that are sent unchanged: formats that every server reads, in forms that every server decodes as `load_image`
# does. Servers differ in how they read 16-bit grey values, transparency, CMYK and an orientation in EXIF.
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
PROMPT_TOO_LONG = "prompt_too_long"  # the finish_reason of a question that the server refuses as too long
_PLAIN_MODES = ("L", "RGB")
_EXIF_ORIENTATION = 0x0112


class Endpoint:
    """Answers an evaluation's questions with a served model; implements `answerer.Answerer`.

    A question is one user message: the images as data URLs, then the text. The server adds its system prompt and its
    template. No prompt is cut: the server refuses one that is too long, and its answer is empty and counted. If it
    refuses every question as too long, none is answered.

    Args:
      service: the server and the model's name there; predictions use this name.
    """

    def __init__(self, service: Service):
        self.service, self.name = service, service.name

    @staticmethod
    def check(generation: Generation) -> None:
        """Raises UsageError for settings that the protocol cannot express."""
        if generation.num_beams > 1:
            raise UsageError(f"generation.num_beams is {generation.num_beams}; 1 was expected with --endpoint, because "
                             "OpenAI's protocol has no beam search")

    def answers(self, questions: Sequence[tuple[str, Shown]], asked: Sequence[int], generation: Generation,
                failed: dict[int, UserError]) -> Iterator[tuple[int, Answer]]:
        """Implements `Answerer.answers`.

        With a temperature above 0, each request states a seed; equal questions get different seeds. Raises ServiceError
        if the server does not answer any request.
        """
        self.check(generation)
        seen, seeds = Counter(), {}
        for i, question in enumerate(questions):
            seeds[i] = (generation.seed + seen[question]) % 2**31
            seen[question] += 1
        too_long, is_any_answered = {}, len(asked) < len(questions)
        replies = self.service.each(_requests(questions, asked, failed), max_tokens=generation.max_new_tokens,
                                    temperature=generation.temperature,
                                    seed=seeds.get if generation.temperature > 0 else None)
        with contextlib.closing(replies):
            for i, reply in replies:
                if isinstance(reply, TooLongError):
                    too_long[i] = reply
                elif isinstance(reply, UserError):
                    failed[i] = reply
                else:
                    is_any_answered = True
                    yield i, Answer(reply.text.strip(), reply.finish_reason)
        if not is_any_answered:  # a setting is wrong, such as max_new_tokens above the model's context
            failed.update(too_long)
            return
        yield from ((i, Answer("", PROMPT_TOO_LONG, has_question=False)) for i in too_long)

    def facts(self) -> dict[str, str]:
        """Returns the counts of requests and tokens since this start, for the report."""
        service = self.service
        again = ", ".join(f"{kind}: {count}" for kind, count in service.again.most_common())
        facts = {"requests": str(service.requests),
                 "requests sent again": f"{service.again.total()}{f' ({again})' if again else ''}",
                 "prompt tokens": str(service.prompt_tokens), "completion tokens": str(service.completion_tokens)}
        return facts | ({"settings not taken": ", ".join(service.not_taken)} if service.not_taken else {})

    def describe(self) -> dict[str, object]:
        """Implements `Answerer.describe`. Template, tower and so on belong to the server and are unknown here."""
        return {"endpoint": self.service.url, "model": self.name}

    def depends_on(self) -> dict[str, object]:
        """Implements `Answerer.depends_on`. A server may change the model behind a name; that cannot be detected."""
        return {"--endpoint": self.service.url, "--model": self.name,
                "the query of --endpoint": self.service.address.identity}

    def machine(self) -> dict[str, object]:
        """Implements `Answerer.machine`; the machine of the server is unknown."""
        return {}


def _requests(questions: Sequence[tuple[str, Shown]], asked: Sequence[int],
              failed: dict[int, UserError]) -> Iterator[tuple[int, list[dict]]]:
    """Yields (index, chat messages) for each question whose images can be read."""
    url_of = functools.lru_cache(maxsize=8)(data_url)  # questions about the same images are adjacent
    for i in asked:
        question, shown = questions[i]
        try:
            images = [{"type": "image_url", "image_url": {"url": url_of(image)}} for image in shown]
            content = _parts(question, images)
        except UserError as error:
            failed[i] = error
            continue
        yield i, [{"role": "user", "content": content}]


def _parts(text: str, images: Sequence[dict]) -> list[dict]:
    """Returns the parts of a message: the images at the markers of the text, or else before the text."""
    texts = text.split(IMAGE_MARKER)
    if len(texts) != len(images) + 1:
        return [*images, {"type": "text", "text": text}]
    between = [[{"type": "text", "text": each}] if each.strip() else [] for each in texts]
    return [part for before, image in zip(between, [[image] for image in images]) for part in (*before, *image)
            ] + between[-1]


def data_url(path: str) -> str:
    """Returns an image file as a data URL.

    The file's own bytes are sent if every server decodes them alike, otherwise a PNG of `load_image`'s pixels.

    Raises:
      UserError: `load_image` cannot read the file; so a damaged file is never sent.
    """
    image = load_image(path)
    kind, data = _own_bytes(path) or ("image/png", _png(image))
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _own_bytes(path: str) -> tuple[str, bytes] | None:
    """Returns media type and bytes of a file that can be sent unchanged; None for any other file."""
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=list(_SENT_AS_THEY_ARE)) as image:
            is_plain = (image.mode in _PLAIN_MODES and "transparency" not in image.info
                        and getattr(image, "n_frames", 1) == 1
                        and image.getexif().get(_EXIF_ORIENTATION, 1) == 1)
            return (_SENT_AS_THEY_ARE[image.format], data) if is_plain and image.format in _SENT_AS_THEY_ARE else None
    except OSError:  # another format, or a path that names one frame of a file
        return None


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG")  # pixels without metadata: `load_image` has applied it
    return file.getvalue()
