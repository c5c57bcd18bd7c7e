"""The HTTP client below openai's: it limits the size of a reply, packed and unpacked, and the targets of redirects."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator
from typing import Any

import openai

from llavamed_jax.openai_client.address import shown

MOST_REDIRECTS = 5
LARGEST_ERROR = 2**18  # bytes of an error's body that are read; the message is at its start
_REDIRECTS = (301, 302, 307, 308)
# Headers that describe the bytes that were sent, and not the unpacked ones; those are read as UTF-8 whatever the
# charset.
_OF_THE_BODY = ("content-encoding", "content-length", "content-type", "transfer-encoding")


class RedirectError(openai.OpenAIError):
    """A redirect is not followed: it leads to another origin or to an invalid address, or is one too many."""


class TooLargeError(openai.OpenAIError):
    """A reply is larger than an answer can be."""


class UnreadableError(openai.OpenAIError):
    """A reply's body cannot be unpacked."""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """Sends requests to one origin, and reads replies up to a size limit.

    A redirect within the origin (scheme, host and port) is followed with the same method and body. Any other redirect
    raises RedirectError, because it would send images and questions to an address that the user has not named. Replies
    are unpacked here piece by piece, because a megabyte of gzip may hold a gigabyte.

    Args:
      query: the query that is added to every request's address.
      largest: the most bytes that a reply may have, packed or unpacked.
      **options: options of httpx's client.
    """

    def __init__(self, query: str, largest: int, **options: Any):
        super().__init__(**options, follow_redirects=False)
        self._query, self._largest = query.encode(), largest

    async def send(self, request, **options):
        """Sends a request with the query, follows redirects within the origin, and returns the bounded response.

        Args:
          request: the request.
          **options: options of httpx's `send`.

        Raises:
          RedirectError: a redirect leads elsewhere, or there are too many.
          TooLargeError: the reply is larger than the limit.
          UnreadableError: the reply cannot be unpacked.
        """
        if self._query:
            before = [request.url.query] if request.url.query else []
            request.url = request.url.copy_with(query=b"&".join([*before, self._query]))
        request.headers["Accept-Encoding"] = "gzip"
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(MOST_REDIRECTS + 1):
            response = await super().send(request, **options)
            try:
                if response.status_code not in _REDIRECTS or "location" not in response.headers:
                    return await self._read(request, response)
                request = self._redirected(request, response.headers["location"])
            finally:
                await response.aclose()
        raise RedirectError(f"it redirects more than {MOST_REDIRECTS} times, last to {shown(str(request.url))}")

    def _redirected(self, request, location: str):
        try:
            url = request.url.join(location)
        except Exception:  # httpx's InvalidURL, idna's errors, UnicodeError
            raise RedirectError(f"it redirects to {shown(location)!r}, which is not a valid address") from None
        if _origin(url) != _origin(request.url) or url.userinfo:
            raise RedirectError(f"{shown(str(request.url))} redirects to {shown(str(url))}, another origin; nothing "
                                "was sent there, so give that address if your data may go there")
        return self.build_request(request.method, url, headers=request.headers, content=request.content,
                                  extensions=request.extensions)

    async def _read(self, request, response):
        """Returns the response with its unpacked body; for an error only the first `LARGEST_ERROR` bytes."""
        is_error = response.status_code >= 400
        limit = LARGEST_ERROR if is_error else self._largest
        body = bytearray()
        try:
            async with contextlib.aclosing(_unpacked(response, limit)) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) > limit:
                        raise TooLargeError(f"its reply is larger than {limit:,} bytes")
        except (TooLargeError, UnreadableError):
            if not is_error:  # for an error the status is enough
                raise
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _OF_THE_BODY]
        return type(response)(response.status_code, headers=headers, content=bytes(body[:limit]), request=request)


def _origin(url) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


async def _unpacked(response, limit: int) -> AsyncIterator[bytes]:
    """Yields a body's bytes, in pieces of which none unpacks to more than `limit` + 1 bytes."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise UnreadableError(f"its reply is compressed with {encoding!r}; gzip was expected")
    unpacker, packed = zlib.decompressobj(16 + zlib.MAX_WBITS) if "gzip" in encoding else None, 0
    async with contextlib.aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            packed += len(piece)
            if packed > limit:
                raise TooLargeError(f"its reply is larger than {limit:,} bytes")
            try:
                yield piece if unpacker is None else unpacker.decompress(piece, limit + 1)
            except zlib.error as error:
                raise UnreadableError(f"its reply cannot be decompressed: {error}") from None
    if unpacker is not None and not unpacker.eof:
        raise UnreadableError("its reply cannot be decompressed: it ends too early")
