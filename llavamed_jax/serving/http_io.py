"""Reads JSON bodies within the limits, and writes answers while it listens for a client that hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from llavamed_jax.errors import short
from llavamed_jax.serving.errors import ApiError, invalid
from llavamed_jax.serving.hosts import Hosts
from llavamed_jax.serving.limits import MIB, Limits

HEADER_BYTES = 32768  # of a request's line and headers together
MOST_DEPTH = 64  # of JSON; a request of OpenAI's needs six
# Commas and opening brackets of a body, with those in its texts: JSON's parser lets no other thread run.
MOST_MARKS = 2**20
_LARGE = 2**18  # bytes of a body that is parsed in a thread
_LINGER_BYTES, _LINGER_SECONDS = 64 * MIB, 5.0


class HeaderLimit:
    """An ASGI application around another one that refuses requests with too many bytes of headers or address.

    h11 counts the bytes of a request line and headers only while they are incomplete.
    """

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        """Passes the request on, or answers 431."""
        if scope["type"] == "http":
            size = len(scope["raw_path"]) + len(scope["query_string"])
            if size + sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
                error = ApiError(431, f"the headers have more than {HEADER_BYTES} bytes", code="headers_too_large",
                                 headers={"Connection": "close"})
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_asked(headers: Headers, hosts: Hosts | None) -> None:
    """Raises ApiError 421 for a name that is none of the server's, and 403 as `check_origin`."""
    if hosts is not None:
        hosts.check(headers)
    check_origin(headers)


def check_origin(headers: Headers) -> None:
    """Raises ApiError 403 for what a browser sends in the name of another site's page."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
        raise ApiError(403, "the request comes from another site's page", code="wrong_origin")


def check_type(headers: Headers) -> None:
    """Raises ApiError 415 for a body that is called something else than JSON, as a page's form is."""
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if given and kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the Content-Type is {short(given)}; application/json was expected", code="not_json",
                       headers={"Connection": "close"})


def request_id(request: Request) -> str:
    """Returns the request's `X-Request-Id`, cut to what a header can carry back, or a new one; always the same."""
    if not hasattr(request.state, "id"):
        request.state.id = request.headers.get("x-request-id", "")[:64].strip() or uuid.uuid4().hex
    return request.state.id


class ClientGone(Exception):
    """The client hung up."""


async def read_json(request: Request, limits: Limits) -> Any:
    """Reads the body of a request as JSON.

    Args:
      request: the request.
      limits: the server's limits.

    Returns:
      The JSON value.

    Raises:
      ApiError: 415, it is not called JSON;
        413, more bytes than allowed, as counted while they arrive; 408, they arrive too slowly; 400, no JSON.
      ClientGone: the client hung up.
    """
    check_type(request.headers)
    claimed = request.headers.get("content-length", "")
    if claimed.isdigit() and int(claimed[:20]) > limits.max_body_bytes:
        await _linger(request, limits)
        raise _too_large(limits)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for piece in request.stream():
                data += piece
                if len(data) > limits.max_body_bytes:
                    data.clear()
                    await _linger(request, limits)
                    raise _too_large(limits)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout:g} s", code="request_timeout",
                       headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    return await asyncio.to_thread(parse, bytes(data)) if len(data) > _LARGE else parse(bytes(data))


async def _linger(request: Request, limits: Limits) -> None:
    """Reads on for a moment and keeps nothing: a client that is still sending would not see the response."""
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(min(_LINGER_SECONDS, limits.body_timeout / 2)):  # before the connection's own limit
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body has more than {limits.max_body_bytes} bytes, which are the most that are read",
                    code="request_too_large", headers={"Connection": "close"})


def parse(data: bytes) -> Any:
    """Parses JSON. NaN, infinities, depths above `MOST_DEPTH` and more than `MOST_MARKS` values are refused.

    Raises:
      ApiError: 400.
    """
    def refuse(constant: str):
        raise ValueError(f"it holds {constant}, which is not JSON")

    marks = sum(map(data.count, (b",", b"{", b"[")))
    if marks > MOST_MARKS:
        raise invalid(f"the body has {marks} commas and brackets; at most {MOST_MARKS} were expected",
                      code="invalid_json")
    try:
        value = json.loads(data.decode(), parse_constant=refuse)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # of json, of UTF-8, and of numbers with thousands of digits
        raise invalid(f"the body is not JSON: {short(str(error), 200)}", code="invalid_json") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
                 if isinstance(inner, (dict, list))] if level and isinstance(level[0], (dict, list)) else []
    if level:
        raise _too_deep()
    return value


def _too_deep() -> ApiError:
    return invalid(f"the body is JSON of more than {MOST_DEPTH} levels", code="invalid_json")


async def unless_gone(request: Request, work: Awaitable) -> Any:
    """Awaits a coroutine, and cancels it if the client hangs up.

    Raises:
      ClientGone: the client hung up.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _ended(task, gone)


async def _gone(receive: Callable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events that ends when its client hangs up or stops reading.

    Args:
      events: the data of each event; closed when the response ends for any reason.
      send_timeout: seconds that the client may leave an event unread.
      on_gone: called if the client hung up or stopped reading.
      on_end: called when the response is over.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], send_timeout: float, on_gone: Callable[[], None],
                 on_end: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._send_timeout, self._on_gone, self._on_end = events, send_timeout, on_gone, on_end

    async def __call__(self, scope, receive, send) -> None:
        """Sends the events."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                self._on_gone()
        except (TimeoutError, OSError):
            self._on_gone()
        finally:
            await _ended(sending, gone)
            await self._events.aclose()
            self._on_end()

    async def _send(self, send) -> None:
        async def sent(message: dict) -> None:
            async with asyncio.timeout(self._send_timeout):
                await send(message)

        await sent({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await sent({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await sent({"type": "http.response.body", "body": b"", "more_body": False})
