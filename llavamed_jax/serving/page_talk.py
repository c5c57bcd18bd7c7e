"""The conversations of the page: questions become requests of the API's schema, answers grow while they are generated.

The browser holds what it shows and nothing more. The images of a conversation stay in the server's memory. Nothing here
knows of Gradio.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llavamed_jax.serving import chat_completions
from llavamed_jax.serving.app import Noted
from llavamed_jax.serving.errors import ApiError, invalid, of_status
from llavamed_jax.serving.page_feedback import Feedback
from llavamed_jax.serving.page_images import Choice, Picture, picture
from llavamed_jax.serving.service import Caller, Service

MOST_TALKS = 512
MOST_BYTES = 2 * 2**30  # of all images in all conversations
_PAUSE_S = 0.05  # between two updates of the browser
ROUTE = "/"


@dataclass
class Exchange:
    """A question and its answer.

    Attributes:
      text: the words of the question.
      pictures: its images.
      answer: the words of the answer so far; None before the first one.
      end: empty while the answer grows; then `stop`, `length`, `stopped` by the person, or `failed`.
      request_id: the answer's name in the log.
      rating: `like`, `dislike` or empty.
    """

    text: str
    pictures: list[Picture] = field(default_factory=list)
    answer: str | None = None
    end: str = ""
    request_id: str = ""
    rating: str = ""


@dataclass(frozen=True)
class Settings:
    """What stands behind the page's fold."""

    temperature: float = 0.2
    max_tokens: int = 512


class Talk:
    """One conversation.

    Attributes:
      exchanges: what was said.
      alert: the error to show, or empty.
      refused: whether the last question was not taken, so that its writer gets it back.
      choices: path of an uploaded DICOM file -> what was chosen for it.
    """

    def __init__(self):
        self.exchanges: list[Exchange] = []
        self.alert, self.refused = "", False
        self.choices: dict[str, Choice] = {}
        self.stop: asyncio.Event | None = None  # while an answer is generated
        self.used = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being generated."""
        return self.stop is not None

    @property
    def size(self) -> int:
        """Bytes of its images, about."""
        return sum(len(each.url) + len(each.preview) for exchange in self.exchanges for each in exchange.pictures)

    def view(self) -> dict[str, Any]:
        """Returns what the browser shows, as a JSON value."""
        shown = [{"text": each.text, "answer": each.answer, "end": each.end, "rating": each.rating,
                  "pictures": [{"url": one.preview, "name": one.name} for one in each.pictures]}
                 for each in self.exchanges]
        return {"exchanges": shown, "alert": self.alert, "busy": self.is_busy}

    def refuse(self, error: ApiError) -> dict[str, Any]:
        """Keeps the exchanges, says why a question was not taken, and returns the view."""
        self.alert, self.refused = sentence(error), True
        return self.view()


class Talks:
    """All conversations of a server's page.

    Args:
      service: the server's service.
      feedback: where likes and dislikes are written, or None.
    """

    def __init__(self, service: Service, feedback: Feedback | None = None):
        self.service, self.feedback = service, feedback
        self._talks: dict[str, Talk] = {}

    def of(self, session: str) -> Talk:
        """Returns the conversation of a browser's tab; the oldest quiet ones make room for a new one."""
        talk = self._talks.pop(session, None) or Talk()
        talk.used = time.monotonic()
        self._talks[session] = talk  # the last one is the youngest
        size = sum(each.size for each in self._talks.values())
        for name, each in list(self._talks.items())[:-1]:
            if len(self._talks) <= MOST_TALKS and size <= MOST_BYTES:
                break
            if not each.is_busy:
                size -= each.size
                del self._talks[name]
        return talk

    async def ask(self, session: str, text: str, files: Sequence[str], settings: Settings = Settings(),
                  shown: int | None = None, key: str = "") -> AsyncIterator[dict]:
        """Asks a question and yields the growing view.

        Args:
          session: the browser's tab.
          text: the words of the question.
          files: paths of its images.
          settings: temperature and length.
          shown: how many exchanges the browser shows; None is not compared.
          key: the name of the person's API key.

        Yields:
          The views. If the question is refused, the last one has the old exchanges and an alert.
        """
        talk = self.of(session)
        try:
            _check_free(talk)
            if shown is not None and shown != len(talk.exchanges):
                raise _forgotten()
            _check_content(text, files)
            pictures = [await asyncio.to_thread(picture, path, self.service.limits, talk.choices.get(path, Choice()))
                        for path in files]
            _check_free(talk)  # the pictures took a while
        except ApiError as error:
            yield talk.refuse(error)
            return
        views = self._answer(talk, talk.exchanges, Exchange(text, pictures), settings, key)
        async with contextlib.aclosing(views):
            async for view in views:
                yield view

    async def again(self, session: str, index: int, text: str | None = None, settings: Settings = Settings(),
                    key: str = "") -> AsyncIterator[dict]:
        """Answers a question of the conversation again, which forgets what came after it.

        Args:
          session: the browser's tab.
          index: of the exchange.
          text: the new words of the question; None leaves them.
          settings: temperature and length.
          key: the name of the person's API key.

        Yields:
          The views. If the question is refused, the last one has the old exchanges and an alert.
        """
        talk = self.of(session)
        try:
            _check_free(talk)
            if not 0 <= index < len(talk.exchanges):
                raise _forgotten()
            old = talk.exchanges[index]
            question = Exchange(old.text if text is None else text, old.pictures)
            _check_content(question.text, question.pictures)
        except ApiError as error:
            yield talk.refuse(error)
            return
        async with contextlib.aclosing(self._answer(talk, talk.exchanges[:index], question, settings, key)) as views:
            async for view in views:
                yield view

    async def _answer(self, talk: Talk, before: list[Exchange], question: Exchange, settings: Settings, key: str
                      ) -> AsyncIterator[dict]:
        old, question.request_id = talk.exchanges, uuid.uuid4().hex
        talk.exchanges, talk.alert, talk.refused, talk.stop = [*before, question], "", False, asyncio.Event()
        stop, last = talk.stop, 0.0
        try:
            yield talk.view()
            async with contextlib.aclosing(self._texts(talk.exchanges, settings, key, stop)) as texts:
                async for text in texts:
                    question.answer = text or None
                    if text and time.monotonic() - last >= _PAUSE_S:
                        yield talk.view()
                        last = time.monotonic()
        except ApiError as error:
            talk.alert, question.end = sentence(error), "failed"
            if not question.answer:
                talk.exchanges, talk.refused = old, True
        except BaseException:
            stop.set()
            raise
        finally:
            talk.stop = None
            if stop.is_set():
                question.end = "stopped"
        if not question.answer and stop.is_set():  # stopped before the first word: as if it had not been asked
            talk.exchanges, talk.refused = old, True
        yield talk.view()

    async def _texts(self, exchanges: Sequence[Exchange], settings: Settings, key: str, stop: asyncio.Event
                     ) -> AsyncIterator[str]:
        """Yields the answer to the last exchange so far, whenever there is more of it.

        Raises:
          ApiError: the API refuses the request, or the answer failed.
        """
        service, caller = self.service, Caller(key, exchanges[-1].request_id)
        try:
            with service.counting(key):
                service.check_ready()
                body = body_of(exchanges, settings)
                _check_size(body, service)
                chat = chat_completions.read(body, service)
                answer = await service.ask(chat, caller)
                noted, text = Noted(service, ROUTE, caller, answer, chat), ""
                try:
                    async with contextlib.aclosing(chat_completions.chunks(answer, chat)) as chunks:
                        async for chunk in _until(chunks, stop):
                            choice = chunk["choices"][0]
                            text += choice["delta"].get("content", "")
                            exchanges[-1].end = choice["finish_reason"] or ""
                            yield text
                    if stop.is_set():
                        noted.gone()
                except GeneratorExit:
                    noted.gone()
                    raise
                finally:
                    noted(200)
        except ApiError as error:
            service.metrics.requests.labels(ROUTE, error.status).inc()
            service.log.event("refused", {"message": error.message}, route=ROUTE, status=error.status,
                              code=error.code, param=error.param)
            raise
        except Exception as error:
            service.log.event("refused", route=ROUTE, status=500, code=type(error).__name__)
            raise of_status(500) from error

    def stop(self, session: str) -> None:
        """Stops the answer of a conversation; what it has stays."""
        stop = self.of(session).stop
        if stop is not None:
            stop.set()

    def clear(self, session: str) -> dict:
        """Forgets a conversation and returns the empty view."""
        self.stop(session)
        self._talks.pop(session, None)
        return Talk().view()

    def rate(self, session: str, index: int, rating: str) -> dict:
        """Notes a like or dislike, or that it was taken back (an empty rating), and returns the view."""
        talk = self.of(session)
        if self.feedback is None or not 0 <= index < len(talk.exchanges) or rating not in ("", "like", "dislike"):
            return talk.view()
        exchange = talk.exchanges[index]
        try:
            self.feedback.write(rating, index, exchange.request_id, self.service.names[0],
                                messages_of(talk.exchanges[:index + 1], has_images=False), exchange.answer or "")
            exchange.rating, talk.alert = rating, ""
        except OSError as error:
            talk.alert = f"The rating could not be written: {error.strerror or error}."
            self.service.log.event("feedback_lost", error=error.strerror or type(error).__name__)
        return talk.view()


def messages_of(exchanges: Sequence[Exchange], has_images: bool = True) -> list[dict]:
    """Returns the messages of the API's schema, up to the last question."""
    messages = []
    for each in exchanges:
        images = [{"type": "image_url", "image_url": {"url": one.url}} for one in each.pictures] if has_images else []
        texts = [{"type": "text", "text": each.text}] if each.text.strip() or not each.pictures else []
        messages.append({"role": "user", "content": [*images, *texts]})
        if each is not exchanges[-1]:
            messages.append({"role": "assistant", "content": each.answer or ""})
    return messages


def body_of(exchanges: Sequence[Exchange], settings: Settings) -> dict:
    """Returns the body of the request for the answer to the last question."""
    return {"messages": messages_of(exchanges), "temperature": settings.temperature, "max_tokens": settings.max_tokens,
            "stream": True}


def sentence(error: ApiError) -> str:
    """Returns an error as a person reads it."""
    text = error.message[:1].upper() + error.message[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _check_free(talk: Talk) -> None:
    if talk.is_busy:
        raise invalid("an answer is still being written; stop it or wait for its end")


def _check_content(text: str, images: Sequence) -> None:
    if not text.strip() and not images:
        raise invalid("the question is empty; write one, or add an image")


def _forgotten() -> ApiError:
    return invalid("the server no longer has this conversation, because it was restarted or had to make room; start a "
                   "new conversation")


def _check_size(body: dict, service: Service) -> None:
    """Refuses what the API would refuse as a body of too many bytes."""
    size = sum(len(part["image_url"]["url"]) if part["type"] == "image_url" else len(part["text"])
               for message in body["messages"] if message["role"] == "user" for part in message["content"])
    if size > service.limits.max_body_bytes:
        raise ApiError(413, f"the conversation has {size} bytes, most of them images; at most "
                       f"{service.limits.max_body_bytes} were expected", code="request_too_large")


async def _until(values: AsyncIterator[dict], stop: asyncio.Event) -> AsyncIterator[dict]:
    """Yields values until there are no more, or until the event is set."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        while True:
            following = asyncio.ensure_future(anext(values, None))
            try:
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
            if following.cancelled() or stop.is_set():
                return
            value = following.result()
            if value is None:
                return
            yield value
    finally:
        stopping.cancel()
