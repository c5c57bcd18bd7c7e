"""What stands before Gradio's application: keys, few routes, bounded bodies, one origin, no address of other machines.

Gradio has many routes (proxies, an API of its own, run history) that the page does not use, and its HTML names other
hosts. Only what the page needs passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from llavamed_jax.serving.errors import ApiError, try_again
from llavamed_jax.serving.hosts import Hosts
from llavamed_jax.serving.http_io import check_asked
from llavamed_jax.serving.limits import MIB, Limits
from llavamed_jax.serving.page_keys import PATH, Keys

_PATHS = re.compile(r"/|/config|/theme\.css|/favicon\.ico|/assets/.*|/static/.*|/gradio_api/("
                    r"upload|upload_progress|queue/join|queue/data|cancel|reset|heartbeat/.*|file=.*|startup-events"
                    r"|app_id)/?")
# The browser itself refuses what would leave the machine. Gradio's components need inline scripts and `Function`.
_POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
           "form-action 'self'; frame-ancestors 'none'; base-uri 'self'; object-src 'none'")
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_MOST_JSON = 4 * MIB  # of an event: the words of a conversation and pictures to look at
_MOST_UPLOADS, _LEAST_FILE = 2048 * MIB, MIB // 16
_META = re.compile(rb"<meta\s+(?:property|name)=\"(?:og|twitter):[^>]*/>\s*", re.DOTALL)
_MANIFEST = re.compile(rb"<link rel=\"manifest\"[^>]*>\s*")
_ADDRESS = re.compile(rb"https?://(?!127\.0\.0\.1|localhost|\[::1\]|www\.w3\.org)[\w.-]+")


class Door:
    """An ASGI application around Gradio's.

    Args:
      app: Gradio's application.
      limits: the server's limits.
      keys: who may come in.
      folder: where Gradio keeps uploads.
      hosts: the names under which the server may be asked; None for any.
    """

    def __init__(self, app: Callable[..., Awaitable], limits: Limits, keys: Keys, folder: str,
                 hosts: Hosts | None = None):
        self._app, self._limits, self._keys, self._uploads = app, limits, keys, Uploads(folder)
        self._hosts = hosts
        self._open = 0

    async def __call__(self, scope, receive, send) -> None:
        """Passes a request on, or raises 404 (other routes), 403, 421 (another site), 401, 411, 413, 503 or 507."""
        most = max(1, self._limits.max_connections // 2)
        if self._open >= most:  # the page's streams have no end, and the API needs connections too
            raise try_again(503, f"{most} requests to the page are open; try again later", 1, "too_many_connections")
        self._open += 1
        try:
            await self._passed(scope, receive, send)
        finally:
            self._open -= 1

    async def _passed(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            raise HTTPException(404)
        path, headers = scope["path"], Headers(scope=scope)
        path = "/" + path.removeprefix(scope.get("root_path", "")).lstrip("/")
        if not _PATHS.fullmatch(path) and path != PATH:
            raise HTTPException(404)
        check_asked(headers, self._hosts)
        if path == PATH or self._keys.name(headers) is None:
            await (await self._at_the_door(path, scope, receive, headers))(scope, receive, _with_headers(send))
            return
        room = contextlib.nullcontext()
        if scope["method"] not in ("GET", "HEAD"):
            self._check_length(path, headers)
            if "/upload" in path:
                room = self._uploads.room(int(headers["content-length"]))
        is_page = path == "/"
        if is_page:  # which is rewritten, and so must not be compressed
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        async with room:
            await self._app(scope, receive, _Rewritten(send) if is_page else _with_headers(send))

    async def _at_the_door(self, path: str, scope, receive, headers: Headers) -> Response:
        """Asks for a key, or takes one."""
        if path == PATH:
            is_form = scope["method"] == "POST"
            return await self._keys.answer(receive, headers) if is_form else RedirectResponse(".", 303)
        if path == "/" and scope["method"] in ("GET", "HEAD"):
            return self._keys.form()
        raise ApiError(401, "the page needs an API key of this server; load it again and write the key",
                       code="invalid_api_key")

    def _check_length(self, path: str, headers: Headers) -> None:
        length, limits = headers.get("content-length", ""), self._limits
        if not length.isdigit():
            raise ApiError(411, "the request does not say how long its body is", code="length_required")
        most = limits.max_images * limits.max_image_bytes + MIB if "/upload" in path else _MOST_JSON
        if int(length[:20]) > most:
            raise ApiError(413, f"the body has {length[:20]} bytes; at most {most} were expected",
                           code="request_too_large", headers={"Connection": "close"})


class Uploads:
    """Keeps the files of uploads, and what is on its way to them, below a size.

    Args:
      folder: where they lie.
      most: bytes of all files together; each counts as at least `_LEAST_FILE`.
    """

    def __init__(self, folder: str, most: int = _MOST_UPLOADS):
        self._folder, self._most, self._coming = folder, most, 0

    @contextlib.asynccontextmanager
    async def room(self, length: int):
        """Keeps room for an upload while it arrives. Raises ApiError 507 if there is none."""
        self._coming += length
        try:
            if self._coming + await asyncio.to_thread(self._there) > self._most:
                raise ApiError(507, "the page's folder of uploads is full; old ones are removed after an hour",
                               code="uploads_full", headers={"Retry-After": "300", "Connection": "close"})
            yield
        finally:
            self._coming -= length

    def _there(self) -> int:
        total = 0
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(OSError):  # it was removed meanwhile
                    total += max(_LEAST_FILE, os.lstat(os.path.join(folder, name)).st_size)
        return total


def without_addresses(html: bytes) -> bytes:
    """Removes from Gradio's page what names another machine, beside the names of XML's vocabularies."""
    return _ADDRESS.sub(b"about:blank#", _MANIFEST.sub(b"", _META.sub(b"", html)))


def _with_headers(send):
    async def sent(message: dict) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_HEADERS)
        await send(message)

    return sent


class _Rewritten:
    """Takes the messages of a response and sends it whole, rewritten."""

    def __init__(self, send):
        self._send, self._start, self._body = send, None, bytearray()

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body, headers = without_addresses(bytes(self._body)), MutableHeaders(scope=self._start)
        headers.update({**_HEADERS, "Content-Length": str(len(body)), "Cache-Control": "no-store"})
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})
