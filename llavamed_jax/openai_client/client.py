"""Asks a server of OpenAI's protocol many requests at once, for callers that are not asynchronous.

    service = Service("http://127.0.0.1:8000/v1", "llava-med")
    with contextlib.closing(service.each(enumerate(conversations), max_tokens=64, temperature=0.0)) as found:
        for number, reply in found:
            …

Requests run in a thread with its own event loop. `concurrency` requests are in flight, and as many more are prepared,
since images are large. After a failure that may be temporary (429, 5xx, timeouts, dropped connections, invalid replies)
the request is sent again after a wait that doubles; another failure ends the request at once, and one that no request
could survive ends all of them.

The client is openai's asynchronous one, because its synchronous one (openai 3.57.0) fails in two ways: its timeout
starts again with each line of a reply's headers, and closing it from another thread does not end a request that waits
for a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import math
import os
import queue
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import openai

from llavamed_jax.errors import UsageError, UserError, count_of, cut, short
from llavamed_jax.openai_client.address import read_address
from llavamed_jax.openai_client.bounded import BoundedClient, RedirectError, TooLargeError, UnreadableError
from llavamed_jax.openai_client.replies import (
    BilledError,
    PassingError,
    Reply,
    ServiceError,
    TooLongError,
    UnpaidError,
    connection_error,
    read_reply,
    refused_setting,
    status_error,
    withheld,
)
from llavamed_jax.openai_client.secrets import Secrets, proxy_secrets
from llavamed_jax.utils import signals, terminal

__all__ = ["Reply", "Service", "ServiceError"]

_LONGEST_BACKOFF = 64  # multiple of the first wait
_LONGEST_RETRY_AFTER = 600.0  # seconds; if a server asks for more, the request fails
_CONNECT_TIMEOUT = 20.0  # seconds
_LONGEST_MESSAGE = 500  # characters
_IN_A_ROW = 16  # consecutive failed requests after which the server is at fault, not the requests
_NO_KEY = "none"  # for local servers, which need no key, while the client does
# Limits of a reply in bytes: an answer of so many tokens in JSON's escapes, with reasoning and token counts.
_BYTES_A_REPLY, _BYTES_A_TOKEN, _LARGEST_REPLY = 2**20, 256, 2**26


class Service:
    """A model behind an address.

    Args:
      url: `http(s)://HOST[:PORT]/v1[?NAME=VALUE]`; without a path `/v1` is added, and the query is sent with every
        request. For Azure `https://NAME.openai.azure.com?api-version=VERSION`, or a deployment's address as Azure's
        portal shows it.
      model: the model's name on the server; Azure's deployment.
      api_key: the key; None takes `OPENAI_API_KEY` (for Azure `AZURE_OPENAI_API_KEY` first), or no key. Neither the key
        nor a value of the query is ever shown, and both are removed from replies and errors.
      concurrency: requests in flight at a time.
      timeout: seconds after which an attempt fails.
      retries: attempts after the first, for each request.
      azure_version: Azure's `api-version`, if the address does not hold it.
      backoff: seconds before the second attempt, half of them random; doubled each time, up to 64 times. A server's
        `Retry-After` takes precedence.

    Attributes:
      address: the parsed address.
      url: the address for display.
      name: the model's name for display.
      requests: attempts that were sent.
      prompt_tokens: tokens of the prompts, as the server counted them.
      completion_tokens: tokens of the replies, as the server counted them.
      again: reason of a retry -> number of retries.
      not_taken: settings that the server refused and that are no longer sent.

    Raises:
      UsageError: an invalid address, key or number.
    """

    def __init__(self, url: str, model: str, *, api_key: str | None = None, concurrency: int = 8,
                 timeout: float = 120.0,
                 retries: int = 8, azure_version: str | None = None, backoff: float = 0.5):
        if not model:
            raise UsageError("the model's name is empty; the name under which the server offers the model was expected")
        for name, value, is_right, wanted in (
            ("concurrency", concurrency, concurrency >= 1, "at least 1"),
            ("timeout", timeout, 0 < timeout < math.inf, "more than 0 seconds"),
            ("retries", retries, retries >= 0, "at least 0"),
            ("backoff", backoff, 0 <= backoff < math.inf, "at least 0 seconds"),
        ):  # fmt: skip
            if not is_right:
                raise UsageError(f"{name} is {value}; {wanted} was expected")
        self.model, self.concurrency, self.timeout, self.retries, self.backoff = (
            model, concurrency, timeout, retries, backoff)
        self.address = read_address(url, azure_version)
        self._key = _key(api_key, self.address.is_azure)
        sent = [] if self._key == _NO_KEY else [self._key, os.environ.get("AZURE_OPENAI_AD_TOKEN", "").strip()]
        self.secrets = Secrets([*sent, *self.address.secrets, *proxy_secrets()])
        terminal.hide(self.secrets.clean)
        self.url, self.name = self.secrets.clean_message(self.address.shown), self.secrets.clean_message(model)
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self.again: Counter[str] = Counter()
        self.not_taken: list[str] = []
        self._limit_name = "max_tokens"
        # The first request goes alone, so that a failure that ends all requests interrupts no other one.
        self._is_open = False
        self._replies = self._failed_in_a_row = 0

    def each(self, requests: Iterable[tuple[int, list[dict]]], *, max_tokens: int, temperature: float,
             seed: int | Callable[[int], int] | None = None,
             lost: Callable[[int, tuple[int, int] | None], bool] | None = None,
             ) -> Iterator[tuple[int, Reply | UserError]]:
        """Yields the replies, each as it comes; closing the iterator cancels the requests in flight.

        Args:
          requests: pairs of a number, which comes back with the reply, and OpenAI chat messages. They are read in the
            caller's thread, and twice `concurrency` are held at a time.
          max_tokens: the most tokens of a reply.
          temperature: temperature of sampling; 0 is greedy.
          seed: seed of sampling; a function returns the seed of each request from its number.
          lost: is called in another thread after each attempt that may have been billed and gave no reply, with the
            request's number and its tokens if the server counted them; returns whether another attempt may be paid.
            If one was due and may not, the request's error is an UnpaidError.

        Yields:
          The number, and the reply or the error of this request.

        Raises:
          ServiceError: after the replies that came before: the server cannot be asked at all (no connection, a refused
            key or model), or too many requests in a row failed.
        """
        requests = iter(requests)
        under_way, is_more = 0, True
        thread = _Requests(lambda: self._client(max_tokens))
        try:
            while True:
                while is_more and under_way < 2 * self.concurrency:
                    number, messages = next(requests, (None, None))
                    is_more = messages is not None
                    if is_more:
                        drawn = seed(number) if callable(seed) else seed
                        settings = {"max_tokens": max_tokens, "temperature": temperature} | (
                            {} if drawn is None else {"seed": drawn})
                        thread.submit(number, lambda client, gate, n=number, m=messages, s=settings: self._ask(
                            client, gate, m, s, lambda counts: lost is None or lost(n, counts)))
                        under_way += 1
                if not under_way:
                    return
                number, reply = thread.next()
                under_way -= 1
                if isinstance(reply, BaseException) and (
                        isinstance(reply, ServiceError) or not isinstance(reply, UserError)):
                    raise reply
                yield number, reply
        finally:
            thread.close()

    @property
    def where(self) -> str:
        """The server and the model, for messages."""
        return f"{self.url} (model {short(self.name)})"

    def _client(self, max_tokens: int) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        """Returns a client for one event loop, and the semaphore of requests in flight: 1 until a request is done."""
        options = self.address.options
        kind = openai.AsyncAzureOpenAI if "azure_endpoint" in options else openai.AsyncOpenAI
        timeout = openai.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_TIMEOUT))
        largest = min(_BYTES_A_REPLY + _BYTES_A_TOKEN * max_tokens, _LARGEST_REPLY)
        try:
            http = BoundedClient(self.address.query, largest, timeout=timeout)
            # Retries are counted here, and not by the client.
            client = kind(**options, api_key=self._key, timeout=timeout, max_retries=0, http_client=http)
        except Exception as error:  # the client refuses an address, or a proxy or certificate of the environment
            raise UserError(f"{self.where} cannot be asked: {self._clean(error)}") from None
        return client, asyncio.Semaphore(self.concurrency if self._is_open else 1)

    async def _ask(self, client: openai.AsyncOpenAI, gate: asyncio.Semaphore, messages: list[dict],
                   settings: dict, lost: Callable) -> Reply | UserError:
        """Returns the reply to one request, after as many attempts as needed, or its error."""
        for attempt in itertools.count():
            try:
                reply = await self._attempt(client, messages, settings)
            except ServiceError as error:
                return error
            except TooLongError as error:  # the server is well, so the request does not count as failed in a row
                self._open(gate)
                return error
            except UserError as error:
                self._open(gate)
                if isinstance(error, BilledError):
                    lost(None)
                return self._failed(error)
            except PassingError as error:
                self._open(gate)
                may_go_on = lost(error.counts) if error.is_billed else True
                if attempt == self.retries or not may_go_on:
                    kind = UserError if attempt == self.retries else UnpaidError
                    return self._failed(kind(f"{self.where} was asked {count_of(attempt + 1, 'time')} without success; "
                                             f"last: {self._clean(error)}"))
                self._count_again(error)
                wait = error.retry_after
                if wait is None:
                    wait = self.backoff * min(2**attempt, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
                if wait > _LONGEST_RETRY_AFTER:
                    return ServiceError(f"{self.where} asks to wait {wait:.0f} s: {self._clean(error)}")
                await asyncio.sleep(wait)
            else:
                self._open(gate)
                self._replies, self._failed_in_a_row = self._replies + 1, 0
                self.prompt_tokens += reply.prompt_tokens
                self.completion_tokens += reply.completion_tokens
                return reply

    async def _attempt(self, client: openai.AsyncOpenAI, messages: list[dict], settings: dict) -> Reply:
        """Sends a request; sends it again without a setting that the server refuses."""
        while True:
            sent = self._taken(settings)
            self.requests += 1
            try:
                async with asyncio.timeout(self.timeout):  # for the whole reply; the client's is from piece to piece
                    response = await client.chat.completions.with_raw_response.create(
                        model=self.model, messages=messages, **sent)
                return read_reply(response.content, self.secrets)
            except RedirectError as error:
                raise ServiceError(f"{self.where} cannot be asked: {self._clean(error)}") from None
            except TooLargeError as error:  # another attempt would be as large
                raise BilledError(f"{self.where}: {self._clean(error)}") from None
            except UnreadableError as error:
                raise PassingError("unreadable", self._clean(error), is_billed=True) from None
            except openai.APIStatusError as error:
                if (empty := withheld(error.status_code, error.code)) is not None:
                    return empty
                name = refused_setting(error, sent)
                if name is not None:
                    self._leave_out(name)
                if name is None or self._taken(settings) == sent:  # an equal request would be refused without end
                    raise status_error(error, self.where, not self._replies, self.secrets) from None
            except (TimeoutError, openai.APIConnectionError) as error:
                reason, is_absent = connection_error(error, self.secrets)
                if is_absent and not self._replies:
                    raise ServiceError(f"{self.where} cannot be reached: {reason}") from None
                if isinstance(error, (TimeoutError, openai.APITimeoutError)):
                    raise PassingError("no reply in time", f"it gave no reply within {self.timeout:g} s",
                                       is_billed=not is_absent) from None
                raise PassingError("connection lost", f"the connection failed: {reason}",
                                   is_billed=not is_absent) from None
            except PassingError:
                raise
            except Exception as error:  # the client may raise anything for an odd request or reply
                raise UserError(f"{self.where}: this request failed: {type(error).__name__}: "
                                f"{self._clean(error)}") from None

    def _open(self, gate: asyncio.Semaphore) -> None:
        for _ in range(0 if self._is_open else self.concurrency - 1):
            gate.release()
        self._is_open = True

    def _taken(self, settings: dict) -> dict:
        """Returns the settings that the server has not refused, under the names that it takes."""
        return {self._limit_name if name == "max_tokens" else name: value
                for name, value in settings.items() if name not in self.not_taken}

    def _leave_out(self, name: str) -> None:
        """Stops sending a setting, or sends it under its newer name; concurrent requests may have found it already."""
        if name == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif name not in self.not_taken:
            self.not_taken.append(name)
            print(f"warning: {self.where} does not accept {name}; the server's own value is used", file=sys.stderr,
                  flush=True)

    def _failed(self, error: UserError) -> UserError:
        self._failed_in_a_row += 1
        if self._failed_in_a_row < _IN_A_ROW:
            return error
        return ServiceError(f"{self._failed_in_a_row} requests in a row have failed; the last: {error}")

    def _count_again(self, error: PassingError) -> None:
        """Counts a retry, and prints the first of its kind at once, so that a waiting user sees the reason."""
        if error.kind not in self.again:
            print(f"{self.where}: {self._clean(error)}; such requests are retried", file=sys.stderr, flush=True)
        self.again[error.kind] += 1

    def _clean(self, error: Exception) -> str:
        """Returns the error's sentence, without a key that a server or a library may have repeated."""
        return cut(" ".join(self.secrets.clean_message(str(error)).split()), _LONGEST_MESSAGE)


class _Requests:
    """A thread with an event loop, in which the requests run.

    Args:
      make_client: returns the client and the semaphore.

    A request occupies its slot until the caller asks for the next one, that is, until the caller has stored the result.
    So a command that is killed has at most as many requests to repeat as there are slots.
    """

    def __init__(self, make_client: Callable):
        # (number, result or exception, function that frees the slot), in the order in which requests end.
        # SimpleQueue's `get` waits without end if a signal's handler outlasts the rest of its timeout.
        self._done: queue.Queue = queue.Queue()
        self._free: Callable[[], None] | None = None
        self._client, self._gate = make_client()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def submit(self, number: int, ask: Callable) -> None:
        """Starts a request; `ask` is called with the client and the semaphore."""
        async def run():
            async with self._gate:  # held during a retry's wait too, so that an overloaded server gets fewer requests
                try:
                    result = await ask(self._client, self._gate)
                except Exception as error:  # otherwise the caller would wait forever
                    result = error
                is_stored = asyncio.Event()
                self._done.put((number, result, is_stored.set))
                await is_stored.wait()  # after an error that ends all, until cancelled: no request may follow

        asyncio.run_coroutine_threadsafe(run(), self._loop)

    def next(self) -> tuple[int, object]:
        """Returns the next finished request, and frees the last one's slot; waits, unless a signal ends the command."""
        if self._free is not None:
            self._loop.call_soon_threadsafe(self._free)
            self._free = None
        while True:
            signals.check()
            with contextlib.suppress(queue.Empty):
                number, result, self._free = self._done.get(timeout=0.2)
                return number, result

    def close(self) -> None:
        """Cancels the requests in flight and ends the thread."""
        async def end():
            cancelled = set()
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                # Only after they have begun: otherwise a coroutine inside them is never awaited, and Python warns.
                for task in others - cancelled:
                    coroutine = task.get_coro()  # may also be one that closes a generator of the client
                    if (not inspect.iscoroutine(coroutine)
                            or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED):
                        task.cancel()
                        cancelled.add(task)
                await asyncio.sleep(0.001)
            await self._client.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _key(given: str | None, is_azure: bool) -> str:
    names = (["AZURE_OPENAI_API_KEY"] if is_azure else []) + ["OPENAI_API_KEY"]
    key = given or next((os.environ[name] for name in names if os.environ.get(name)), _NO_KEY)
    if not key.strip().isascii() or not key.strip().isprintable() or " " in key.strip():
        raise UsageError(f"the API key in {' or '.join(names)} is invalid; letters, digits and signs without spaces "
                         "were expected")
    return key.strip() or _NO_KEY
