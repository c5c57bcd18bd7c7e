"""Gets files over HTTP: few at a time, not too fast, again after a failure that may pass, and never more than asked.

All requests of a run share one pool of connections, one rate, and one pause: a server that says `Retry-After` is left
alone by every thread until then.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO

from llavamed_jax.curation.extra import needed
from llavamed_jax.errors import UserError, cut, short
from llavamed_jax.utils import signals
from llavamed_jax.utils.retry_after import retry_after

_CONNECT_S = 20.0
_ABSENT = (404, 410)  # 400 may be the fault of a proxy or of a clock
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses after which a request is sent again
BACKOFF_S = 0.5
_LONGEST_BACKOFF = 64  # multiple of the first wait
_LONGEST_RETRY_AFTER_S = 600.0
_DAMAGED_AGAIN = 2  # attempts after the first, for a reply that came whole and is wrong
IN_A_ROW = 16  # consecutive failures after which the server is at fault, and not a file
_POLL_S = 0.05
_IDENTITY = {"Accept-Encoding": "identity", "User-Agent": "llavamed-jax (data preparation)"}


class AbsentError(Exception):
    """The server says that there is no such file."""


class DamagedError(Exception):
    """A reply came, and is not the file: another hash, HTML in its place, no image."""


class WebPageError(DamagedError):
    """A web page came in place of the file."""


class FailedError(Exception):
    """No reply came, whatever was tried. Another run may get it."""


class TooLargeError(Exception):
    """A file is larger than the limit."""


class ServerError(UserError):
    """The server cannot be used at all."""


def looks_like_html(body: bytes) -> bool:
    """Returns whether bytes are a web page: a login page or an error that is sent with the status 200."""
    head = body[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def refuse_html(body: bytes) -> None:
    """Raises WebPageError if bytes are a web page."""
    if looks_like_html(body):
        raise WebPageError("the server answered HTML")


class Client:
    """Sends GET requests from many threads.

    Args:
      concurrency: requests in flight at a time.
      rate: requests begun a second, over all threads; 0 sets no limit.
      retries: attempts after the first, for each request.
      timeout: seconds after which an attempt fails.
      backoff: seconds before the second attempt, half of them random; doubled each time, up to 64 times. None takes
        half a second.

    Attributes:
      requests: attempts that were sent.
      bytes: bytes that were received.
      again: reason of a retry -> number of retries.
    """

    def __init__(self, concurrency: int = 16, rate: float = 0.0, retries: int = 5, timeout: float = 120.0,
                 backoff: float | None = None):
        self._httpx = needed("httpx", "downloads files")
        limits = self._httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        times = self._httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S), pool=None)
        try:
            self._client = self._httpx.Client(limits=limits, timeout=times, headers=_IDENTITY, follow_redirects=True,
                                              max_redirects=5)
        except Exception as error:  # a proxy or a certificate of the environment
            raise UserError(f"no connection can be made: {error}") from None
        self._rate, self._retries, self._timeout = rate, retries, timeout
        self._backoff = BACKOFF_S if backoff is None else backoff
        self._lock = threading.Lock()
        self._next = self._not_before = 0.0
        self._failed_in_a_row, self._has_answered, self._is_cancelled = 0, False, False
        self.requests = self.bytes = 0
        self.again: Counter[str] = Counter()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def cancel(self) -> None:
        """Makes every thread raise `signals.Stopped` before its next request or wait."""
        self._is_cancelled = True

    def _check(self) -> None:
        signals.check()
        if self._is_cancelled:
            raise signals.Stopped("cancelled")

    def save(self, url: str, most: int, file: BinaryIO) -> None:
        """Gets a file as `get` does, and writes it to an empty file that is open, instead of to the memory."""
        def check(_body: bytes, _headers: dict) -> None:
            file.seek(0)
            refuse_html(file.read(1000))

        self.get(url, most, check, file)

    def get(self, url: str, most: int, check: Callable[[bytes, dict], None] | None = None,
            into: BinaryIO | None = None) -> bytes:
        """Gets a file.

        Args:
          url: the address.
          most: the most bytes that it may have.
          check: raises DamagedError if the body, with the reply's headers in lower case, is not the file.
          into: where the body is written; then b"" is returned and checked.

        Raises:
          AbsentError: there is no such file.
          DamagedError: the reply is not the file, in several attempts.
          TooLargeError: the file has more than `most` bytes.
          FailedError: no attempt had a whole reply.
          ServerError: no request of this run succeeds.
          signals.Stopped: the command was asked to stop.
        """
        damaged = 0
        for attempt in itertools.count():
            wait = self._backoff * min(2**attempt, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
            try:
                body, headers = self._attempt(url, most, into)
                if check is not None:
                    check(body, headers)
                self._succeeded()
                return body
            except AbsentError:
                self._succeeded()
                raise
            except DamagedError as error:
                damaged += 1
                if damaged > _DAMAGED_AGAIN or attempt >= self._retries:
                    if isinstance(error, WebPageError):
                        self._failed(url, str(error))
                    raise
                reason = "damaged"
            except _RefusedError as error:
                self._failed(url, str(error))
                raise FailedError(str(error)) from None
            except _PassingError as error:
                reason, after = error.reason, error.retry_after
                if after is not None and after > _LONGEST_RETRY_AFTER_S:
                    raise ServerError(f"{cut(url, 300)} asks to wait {after:.0f} s") from None
                if attempt >= self._retries:
                    self._failed(url, str(error), error.is_absent)
                    raise FailedError(f"{attempt + 1} attempts failed; last: {error}") from None
                if after is not None:
                    wait = after
                    with self._lock:
                        self._not_before = max(self._not_before, time.monotonic() + after)
            with self._lock:
                self.again[reason] += 1
            self._wait_until(time.monotonic() + wait)

    def _attempt(self, url: str, most: int, into: BinaryIO | None = None) -> tuple[bytes, dict]:
        self._take_turn()
        deadline = time.monotonic() + self._timeout
        body, size = bytearray(), 0
        if into is not None:
            into.seek(0)
            into.truncate()
        try:
            with self._client.stream("GET", url) as reply:
                if reply.status_code in _PASSING:
                    raise _PassingError(f"status {reply.status_code}", f"status {reply.status_code}",
                                        retry_after(reply.headers))
                if reply.status_code in _ABSENT:
                    raise AbsentError(f"status {reply.status_code}")
                if reply.status_code != 200:  # refused: by a proxy, a firewall, a rule of the server
                    raise _RefusedError(f"status {reply.status_code}")
                for piece in reply.iter_bytes():
                    size += len(piece)
                    if into is None:
                        body += piece
                    else:
                        _write(into, piece)
                    if size > most:
                        raise TooLargeError(f"more than {most:,} bytes")
                    if time.monotonic() > deadline:
                        raise _PassingError("timeout", f"the file did not come within {self._timeout:g} s")
                headers = {name.lower(): value for name, value in reply.headers.items()}
        except self._httpx.TimeoutException:
            raise _PassingError("timeout", f"no reply within {self._timeout:g} s") from None
        except (self._httpx.InvalidURL, self._httpx.UnsupportedProtocol, UnicodeError) as error:
            raise AbsentError(f"the address {short(url, 300)} is invalid: {error}") from None
        except self._httpx.TooManyRedirects:
            raise AbsentError("it redirects too often") from None
        except self._httpx.HTTPError as error:
            is_absent = isinstance(error, self._httpx.ConnectError)
            raise _PassingError("connection lost", f"the connection failed: {error or type(error).__name__}",
                                is_absent=is_absent) from None
        finally:
            with self._lock:
                self.bytes += size
        return bytes(body), headers

    def _take_turn(self) -> None:
        """Waits until the rate and a server's pause allow another request."""
        while True:
            with self._lock:
                now = time.monotonic()
                turn = max(self._next, self._not_before)
                if turn <= now:
                    self._next = max(self._next, now) + (1 / self._rate if self._rate else 0.0)
                    self.requests += 1
                    break
            self._wait_until(turn)
        self._check()

    def _wait_until(self, then: float) -> None:
        while (left := then - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, _POLL_S))

    def _succeeded(self) -> None:
        with self._lock:
            self._failed_in_a_row, self._has_answered = 0, True

    def _failed(self, url: str, reason: str, is_absent: bool = False) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            is_over = self._failed_in_a_row >= IN_A_ROW or is_absent and not self._has_answered
        if is_over:
            often = "" if is_absent else f"; {self._failed_in_a_row} requests in a row failed"
            raise ServerError(f"{cut(url, 300)} cannot be had: {reason}{often}")


def _write(file: BinaryIO, piece: bytes) -> None:
    try:
        file.write(piece)
    except OSError as error:
        raise UserError(f"a package of a mirror cannot be written to the disk: {error.strerror or error}") from None


class _RefusedError(Exception):
    """The server answers, and refuses; another attempt would not help."""


class _PassingError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, sentence: str, retry_after: float | None = None, is_absent: bool = False):
        super().__init__(sentence)
        self.reason, self.retry_after, self.is_absent = reason, retry_after, is_absent
