"""Connections of clients that stop in the middle: each is closed in time, whatever its application does."""

import asyncio
import contextlib
import socket
import time

import pytest
import uvicorn
from uvicorn.server import ServerState

from llavamed_jax.serving import server
from llavamed_jax.serving.limits import Limits

LIMITS = Limits(header_timeout=0.1, body_timeout=0.1, send_timeout=0.1)


async def _refuses(scope, receive, send):
    """Answers without a look at the body, as a route does that is not there."""
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def _waits(scope, receive, send):
    """Waits for the whole body without a clock of its own."""
    while (await receive()).get("more_body"):
        pass
    await _refuses(scope, receive, send)


async def _streams(scope, receive, send):
    """Sends for ever, and keeps sending when the client does not read."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
        await asyncio.sleep(0)


def lasted(app, *pieces, reads=True):
    """Seconds until the server forgot the connection, and what it had sent; 3 seconds are for ever."""
    async def run():
        loop, ours = asyncio.get_running_loop(), socket.socketpair()
        config = uvicorn.Config(app, http=server.connection_class(LIMITS), ws="none", log_config=None, lifespan="off", timeout_keep_alive=1)
        config.load()
        state, out, begin = ServerState(), b"", time.monotonic()
        client, other = ours
        client.setblocking(False)
        await loop.connect_accepted_socket(lambda: config.http_protocol_class(config, state, {}, _loop=loop), other)
        for piece in pieces:
            await loop.sock_sendall(client, piece)
            await asyncio.sleep(0.03)
        while state.connections and time.monotonic() - begin < 3:
            await asyncio.sleep(0.01)
        seconds = time.monotonic() - begin
        with contextlib.suppress(BlockingIOError, OSError):
            while reads and (data := client.recv(65536)):
                out += data
        for task in state.tasks:
            task.cancel()
        client.close()
        return seconds, out

    return asyncio.run(run())


HEAD = b" / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"


@pytest.mark.parametrize("pieces", [(b"POST" + HEAD, b"a"), (b"GET" + HEAD, b"a", b"b"), (b"POST" + HEAD + b"a",), (b"POST" + HEAD,),
                                    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n")])
def test_a_body_that_nobody_reads_keeps_no_connection_open(pieces):
    seconds, out = lasted(_refuses, *pieces)
    assert seconds < 0.8 and out.startswith(b"HTTP/1.1 404")


def test_a_body_that_a_route_awaits_without_a_clock_is_a_408():
    seconds, out = lasted(_waits, b"POST" + HEAD, b"a", b"b")
    assert seconds < 0.8 and out.startswith(b"HTTP/1.1 408") and b"request_timeout" in out


def test_an_answer_that_nobody_reads_keeps_no_connection_open():
    assert lasted(_streams, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", reads=False)[0] < 0.8


def test_a_client_that_sends_all_in_time_is_answered_more_than_once():
    body = b"POST" + HEAD + b"0123456789"
    _, out = lasted(_waits, body, body, body)
    assert out.count(b"HTTP/1.1 404") == 3 and b"408" not in out
