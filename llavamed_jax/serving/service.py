"""The model behind the API: loading with a stage to ask for, preparing requests, and answers that can be iterated.

The HTTP routes and the page both call `Service.ask`; nothing below it knows of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llavamed_jax.errors import UserError, count_of, short
from llavamed_jax.generation.requests import PromptTooLong
from llavamed_jax.serving import images, remote
from llavamed_jax.serving.content import ImageUrl, Message, images_of
from llavamed_jax.serving.errors import ApiError, invalid, try_again
from llavamed_jax.serving.hosts import Hosts
from llavamed_jax.serving.limits import DEFAULTS, Limits
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.metrics import Metrics
from llavamed_jax.serving.scheduler import End, Piece, Scheduler, Ticket
from llavamed_jax.serving.schema import ChatRequest, Settings

_LEAST_TOP_P = 1e-9  # of the engine, which takes none of 0: the most likely token alone
_CHARACTERS = 256  # a token at most; the longest of known vocabularies is 128 spaces
PREPARERS = 4  # threads that decode images and tokenise


@dataclass(frozen=True)
class Caller:
    """Who asks: the name of its API key for shares and log, and the request's id for the log."""

    key: str = ""
    request_id: str = ""


NOBODY = Caller()


@dataclass
class Loading:
    """How far the server is.

    Attributes:
      stage: what is being done, in words; `ready` when requests are answered.
      error: what kept the model from being loaded, or None.
      started: when loading began, by `time.monotonic`.
      seconds: how long loading took; None until it is over.
    """

    stage: str = "starting"
    error: BaseException | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None


@dataclass(frozen=True)
class Usage:
    """Counts of one answer.

    Attributes:
      prompt: positions of the prompt, images included.
      image: positions of the images.
      cached: positions that were taken from another request's row.
      completion: generated tokens.
    """

    prompt: int
    image: int
    cached: int
    completion: int


class Answer:
    """An answer in progress: iterate over its pieces, then read `end` and `usage`.

    Args:
      ticket: the ticket in the scheduler.
      scheduler: the scheduler.
      events: what the ticket delivers.
      image_tokens: positions of the prompt that belong to images.
      token: decodes a token to its text and its bytes.

    Attributes:
      id: a name for the answer.
      created: seconds since 1970.
      model: the served name.
      end: the End, after the last piece.
      found: log probabilities as JSON values, kept by `/v1/responses`.
    """

    def __init__(self, ticket: Ticket, scheduler: Scheduler, events: asyncio.Queue, image_tokens: int, model: str,
                 token: Callable[[int], bytes]):
        self.id, self.created, self.model, self.token = uuid.uuid4().hex, int(time.time()), model, token
        self.end: End | None = None
        self.found: list[dict] = []
        self._ticket, self._scheduler, self._events, self._image_tokens = ticket, scheduler, events, image_tokens

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the pieces as they come; leaving the iteration early cancels the answer.

        Raises:
          ApiError: the answer failed.
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Piece):
                    yield event
                    continue
                self.end = event
                if event.error is not None:
                    raise event.error
                return
        finally:
            self.close()

    def close(self) -> None:
        """Cancels the answer unless it has ended; whoever asked calls it, since nobody may have begun to iterate."""
        if self.end is None:
            self.cancel()

    def cancel(self) -> None:
        """Frees the row at the next decode loop."""
        self._scheduler.cancel(self._ticket)

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        ticket = self._ticket
        return Usage(len(ticket.request.ids), self._image_tokens, ticket.cached, len(ticket.text.token_ids))

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`, after the end."""
        return self.end.completion.finish_reason

    @property
    def times(self) -> dict[str, float | None]:
        """Seconds from arrival to the first token, and to now."""
        ticket, now = self._ticket, time.monotonic()
        first = ticket.first_token and round(ticket.first_token - ticket.arrived, 4)
        return {"first_token_s": first, "total_s": round(now - ticket.arrived, 4)}


class Service:
    """A model that is loaded in the background and answers requests when it is ready.

    Args:
      names: names under which the model is served; an answer has the one that was asked for, else the first one.
      aliases: names that are taken too and that no reply names, such as a path.
      limits: the server's limits.
      keys: name -> API key; empty lets everybody in.
      remote_hosts: hosts from which images may be fetched.
      log: the structured log.
      version: of the program.
      hosts: the names under which it may be asked; None for any.
    """

    def __init__(self, names: Sequence[str], limits: Limits = DEFAULTS, keys: Mapping[str, str] | None = None,
                 remote_hosts: Sequence[str] = (), log: Log | None = None, version: str = "",
                 aliases: Sequence[str] = (), hosts: Hosts | None = None):
        self.hosts = hosts
        self.names, self.limits, self.keys, self.version = list(names), limits, dict(keys or {}), version
        self._aliases = set(aliases)
        self.log, self.metrics, self.loading = log or Log(), Metrics(), Loading()
        self.created = int(time.time())
        self.model: Any = None
        self.scheduler: Scheduler | None = None
        self.is_stopping = False
        self._under_way: Counter[str] = Counter()  # by key
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="prepare")
        self._fetcher = remote.Fetcher(remote_hosts, limits)
        self.metrics.watch(self)

    def start(self, load: Callable[[Callable[[str], None]], Any]) -> threading.Thread:
        """Loads the model in a thread.

        Args:
          load: returns the LlavaMed; it is given a function that takes the stage in words.

        Returns:
          The thread.
        """
        thread = threading.Thread(target=self._load, args=(load,), name="load", daemon=True)
        thread.start()
        return thread

    def _load(self, load) -> None:
        loading = self.loading

        def stage(words: str) -> None:
            loading.stage = words
            self.log.event("loading", stage=words, seconds=round(time.monotonic() - loading.started, 3))

        try:
            model = load(stage)
            self.serve(model)
        except BaseException as error:
            loading.error, loading.stage = error, "failed"
            self.log.event("failed", error=str(error) or type(error).__name__)

    def serve(self, model) -> None:
        """Serves a model that is already loaded."""
        scheduler = Scheduler(model.engine, self.limits, lambda i: not model.processor.text_tokenizer.bytes_of(i))
        scheduler.on_end = self.metrics.ended
        scheduler.on_error = lambda error: self.log.event("engine_error", error=type(error).__name__)
        scheduler.start()
        self._aliases.add(model.name)
        self.model, self.scheduler = model, scheduler
        self.loading.seconds = round(time.monotonic() - self.loading.started, 3)
        self.loading.stage = "ready"
        self.log.event("ready", seconds=self.loading.seconds)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings for requests that do not name them: those of the checkpoint's `generation_config.json`."""
        return self.model.defaults

    @property
    def most_prompt(self) -> int:
        """Positions of the longest prompt that is answered: what the model takes, or the server's own limit."""
        return min(self.model.engine.max_prompt, self.limits.max_prompt_tokens or self.model.engine.max_prompt)

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self.scheduler is not None and self.scheduler.is_alive and not self.is_stopping

    def check_ready(self) -> None:
        """Raises ApiError 503 while the model is loading, after it could not be loaded, and while the server stops."""
        if self.is_stopping:
            raise try_again(503, "the server is stopping; try again later", 5, "stopping")
        if self.loading.error is not None:
            raise ApiError(503, "the model could not be loaded; the server's log says why", code="load_failed")
        if self.scheduler is not None and not self.scheduler.is_alive:
            raise ApiError(503, "the engine has stopped; the server must be started again", code="engine_stopped")
        if self.scheduler is None:
            raise try_again(503, f"the model is not loaded yet: {self.loading.stage}; GET /health says how far it is",
                            5, "loading")

    def caller_of(self, authorization: str | None) -> str:
        """Returns the name of the key in an Authorization header.

        Raises:
          ApiError: 401, keys are set and this is none of them.
        """
        if not self.keys:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, each in constant time: how long it takes says nothing about the keys.
        found = [name for name, key in self.keys.items() if hmac.compare_digest(key.encode(), given)]
        if not found:
            raise ApiError(401, "the API key is missing or wrong; an Authorization header with a Bearer key was "
                           "expected", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found[0]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if a request names another model than this server's."""
        if name is not None and name not in self.names and name not in self._aliases:
            raise ApiError(404, f"the model {short(name)} is not served here; {' or '.join(map(repr, self.names))} was "
                           "expected", "model", "model_not_found")

    @property
    def under_way(self) -> int:
        """Requests that are read, prepared, queued or answered."""
        return self._under_way.total()

    @contextlib.contextmanager
    def counting(self, key: str):
        """Counts a request of a key while it is under way.

        Raises:
          ApiError: 429, there are too many, or too many of this key where there are several.
        """
        most = self.limits.max_requests
        own = most if len(self.keys) < 2 else max(1, int(most * self.limits.key_share))
        # One request of each of several keys is always taken: the others cannot lock a key out.
        is_first = len(self.keys) > 1 and not self._under_way[key]
        if not is_first and (self.under_way >= most or self._under_way[key] >= own):
            raise try_again(429, f"{self.under_way} requests are under way, {self._under_way[key]} of them with this "
                            "key, and more are not taken now", 1, "too_many_requests")
        self._under_way[key] += 1
        try:
            yield
        finally:
            self._under_way[key] -= 1

    async def ask(self, chat: ChatRequest, caller: Caller = NOBODY) -> Answer:
        """Prepares a request and queues it.

        Args:
          chat: the request.
          caller: who asks.

        Returns:
          The answer in progress.

        Raises:
          ApiError: the request cannot be answered, or not now.
        """
        deadline = time.monotonic() + self.limits.timeout
        self.check_ready()
        self.check_model(chat.model)
        self.scheduler.check_room(caller.key)
        self._check_length(chat.messages)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        urls = [image.url for image in images_of(chat.messages)]
        count = len(urls)
        if count > self.limits.max_images:
            raise invalid(f"the request has {count_of(count, 'image')}; at most {self.limits.max_images} were expected",
                          "messages", "too_many_images")
        encoded = [url if url[:5].lower() == "data:" else await self._fetcher.fetch(url, f"image {i}")
                   for i, url in enumerate(urls, 1)]
        # In one piece: only as many whole images as threads are in memory.
        request, text = await loop.run_in_executor(self._pool, self._request, chat.messages, chat.settings, encoded)

        def deliver(event: Piece | End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = Ticket(request, text, chat.settings.alternatives, caller.key, deadline, deliver)
        self.scheduler.submit(ticket)
        image_tokens = count * (self.model.processor.tokens_per_image or 0)
        return Answer(ticket, self.scheduler, events, image_tokens,
                      chat.model if chat.model in self.names else self.names[0],
                      self.model.processor.text_tokenizer.bytes_of)

    def _check_length(self, messages: Sequence[Message]) -> None:
        """Raises ApiError for a text that no tokenizer makes short enough, before anything is made of it."""
        found = sum(len(part) for message in messages for part in message.parts if isinstance(part, str))
        most = self.most_prompt * _CHARACTERS
        if found > most:
            raise invalid(f"the messages have {found} characters; at most {most} were expected; this model's maximum "
                          f"context length is {self.most_prompt} tokens", "messages", "context_length_exceeded")

    def _pixels(self, encoded: Sequence[str | bytes]) -> list[np.ndarray]:
        """Makes the model's images of encoded ones, uint8 [H,W,3]; one whole image is in memory at a time."""
        made, total, most = [], 0, self.limits.max_request_pixels
        for i, data in enumerate(encoded, 1):
            where = f"image {i}"
            data = images.data_of(data, where, self.limits) if isinstance(data, str) else data
            total += images.pixels_of(data, where, self.limits)
            if total > most:
                raise invalid(f"the images of the request have {total} pixels together up to {where}; at most {most} "
                              "were expected", "messages", "image_too_large")
            made.append(self.model.processor.images_uint8([images.decode(data, where, self.limits)])[0])
        return made

    def _request(self, messages: Sequence[Message], settings: Settings, encoded: Sequence[str | bytes]):
        """Makes the engine's request, with images from `data:` URLs or bytes, and the text of its answer."""
        place = itertools.count(1)
        plain = [{"role": message.role, "content": [
            {"type": "image", "image": next(place)} if isinstance(part, ImageUrl) else {"type": "text", "text": part}
            for part in message.parts]} for message in messages]
        s, most = settings, self.limits.max_prompt_tokens
        try:
            pixels = self._pixels(encoded)
            request = self.model.request(plain, s.max_new_tokens, s.temperature, s.top_p or _LEAST_TOP_P, s.top_k,
                                         s.seed, logprobs=s.alternatives is not None, pixels=pixels)
            if most is not None and len(request.ids) > most:
                raise PromptTooLong("the prompt", len(request.ids), most)
            return request, self.model.text_stream(s.stop)
        except PromptTooLong as error:
            raise invalid(f"{error}; this model's maximum context length is {error.most} tokens, and the messages have "
                          f"{error.length}", "messages", "context_length_exceeded") from None
        except UserError as error:
            raise invalid(str(error), "messages") from None

    def stop(self) -> bool:
        """Refuses new requests, lets the running ones finish within the limit; returns whether all of them could."""
        self.is_stopping = True
        is_whole = self.scheduler is None or self.scheduler.close(self.limits.drain_timeout)
        self._pool.shutdown(wait=False, cancel_futures=True)
        return is_whole
