"""Runs the application: one process, one socket, connections that may neither idle nor dawdle, an orderly end.

uvicorn 0.54 has no limit on how long headers and unread bodies take and answers broken HTTP with plain text.
`Connection` adds both by overriding methods of uvicorn's protocol; `tests/serving/test_attacks.py` and
`test_connections.py` fail if another uvicorn has lost them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llavamed_jax.errors import UserError
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.http_io import HEADER_BYTES
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.service import Service

_BACKLOG = 2048  # connections that wait to be accepted, as in uvicorn
_POLL_S = 0.1
_LAST_S = 5  # for connections that still send their answers when the engine has stopped


def connection_class(limits: Limits) -> type[H11Protocol]:
    """Makes the class of a server's connections: each waits for its client only so long, reading or writing."""

    class Connection(H11Protocol):
        """An HTTP connection whose client must send headers and bodies, and read answers, in time."""

        _timer: asyncio.TimerHandle | None = None
        _awaited = ""  # what the timer is for
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self._refuse(ApiError(503, "too many connections are open; try again later",
                                      code="too_many_connections", headers={"Retry-After": "1"}))
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc) -> None:
            self._unwatch()
            self._written()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writes()

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.transport.is_closing():
                self._written()

        def _watch(self) -> None:
            """Runs the clock while the client must send something, from the first moment of each kind only once."""
            if self.transport.is_closing():
                self._unwatch()
                self._writes()
                return
            awaited, seconds = self._wanted()
            if awaited != self._awaited:
                self._unwatch()
                self._awaited = awaited
                if awaited:
                    self._timer = self.loop.call_later(seconds, self._late)

        def _wanted(self) -> tuple[str, float]:
            """What the client must send now, and within how many seconds; empty while the application works."""
            ours, theirs = self.conn.our_state, self.conn.their_state
            if theirs is h11.IDLE:
                return "headers", limits.header_timeout
            if theirs is not h11.SEND_BODY:
                return "", 0.0
            if ours in (h11.SEND_RESPONSE, h11.SEND_BODY):  # routes that read the body answer 408 before
                return "body", 2 * limits.body_timeout
            return "rest of a body that nobody reads", limits.header_timeout

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._awaited = None, ""

        def _late(self) -> None:
            self._timer = None
            if self._awaited == "headers" and self.conn.trailing_data[0]:
                self._refuse(ApiError(408, f"the headers did not arrive within {limits.header_timeout:g} s",
                                      code="request_timeout"))
            elif self.conn.our_state is h11.SEND_RESPONSE:
                self._refuse(ApiError(408, f"the body did not arrive within {2 * limits.body_timeout:g} s",
                                      code="request_timeout"))
            else:
                self.transport.close()
                self._writes()

        def _writes(self) -> None:
            """Cuts the connection off unless the client reads what is written in time."""
            if self._unread is None:
                self._unread = self.loop.call_later(limits.send_timeout, self.transport.abort)

        def _written(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, msg, code="invalid_http"))

        def _refuse(self, error: ApiError) -> None:
            """Writes a response beside h11, which may be in a state without one, and closes the connection."""
            body = json.dumps(error.body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close",
                       **error.headers}
            lines = [f"HTTP/1.1 {error.status} Error", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
            self.transport.write("\r\n".join(lines).encode() + body)
            self.transport.close()
            self._writes()

    return Connection


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket before the model is loaded. Raises UserError if it cannot be opened."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # a client that comes before the application runs waits, and is not refused
        return listener
    except (OSError, OverflowError) as error:
        raise UserError(f"the server cannot listen on {host}:{port}: "
                        f"{getattr(error, 'strerror', None) or error}") from None


def run(app, service: Service, listener: socket.socket, is_asked: Callable[[], bool]) -> bool:
    """Serves until it is asked to stop, or until the model could not be loaded.

    Args:
      app: the ASGI application.
      service: its service.
      listener: a bound socket.
      is_asked: whether to stop.

    Returns:
      Whether every running request could finish.
    """
    raise_open_files()
    config = uvicorn.Config(
        app, http=connection_class(service.limits), ws="none", log_config=None, access_log=False, lifespan="auto",
        timeout_keep_alive=round(service.limits.header_timeout), h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=_LAST_S, server_header=False, proxy_headers=False)
    server, is_whole = uvicorn.Server(config), True
    server.capture_signals = contextlib.nullcontext  # `utils.signals` listens already

    async def watch() -> None:
        nonlocal is_whole
        while not is_asked() and service.loading.error is None:
            await asyncio.sleep(_POLL_S)
        service.log.event("stopping", under_way=service.under_way)
        is_whole = await asyncio.to_thread(service.stop)
        server.should_exit = True

    async def serve() -> None:
        watching = asyncio.create_task(watch())
        try:
            await server.serve(sockets=[listener])
        finally:
            watching.cancel()

    asyncio.run(serve())
    service.log.event("stopped", all_answered=is_whole)
    return is_whole


def raise_open_files() -> None:
    """Raises the soft limit of open files, often 1,024, to the hard one: every connection is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
