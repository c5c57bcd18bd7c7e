"""Clients that a server must outlive, for `benchmarks/serving.py`: each fault returns the statuses that are right for it.

A fault opens a connection of its own. `status` is the status of the reply; 0 is a connection that the server closed without one.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import select
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

Address = tuple[str, int]
_PATIENCE_S = 600


def post(body: bytes, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    """Returns the bytes of a request."""
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n"
            "Connection: close\r\n\r\n").encode() + body


def ask(address: Address, data: bytes) -> tuple[int, bytes]:
    """Sends bytes and returns status and body of the reply, which may come before all bytes are sent."""
    out = b""
    with socket.create_connection(address, timeout=_PATIENCE_S) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                out += more
    return (int(out.split(b" ", 2)[1]) if out else 0), out.partition(b"\r\n\r\n")[2]


def ask_json(address: Address, body: dict, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    """Sends a request and returns status and JSON of the reply."""
    status, out = ask(address, post(json.dumps(body).encode(), path))
    return status, json.loads(out) if out else {}


def leave(address: Address, body: dict, pieces: int) -> int:
    """Hangs up after so many pieces of a stream; 0 hangs up before the server has answered."""
    body = {**body, "stream": True, "max_tokens": 1000}
    with socket.create_connection(address, timeout=_PATIENCE_S) as connection:
        connection.sendall(post(json.dumps(body).encode()))
        out = b""
        while pieces and out.count(b"data: ") < pieces:
            more = connection.recv(4096)
            if not more:
                break
            out += more
        return int(out.split(b" ", 2)[1]) if out else 200


def picture(seed: int) -> str:
    """Returns the URL of a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def png_of_size(width: int, height: int) -> str:
    """Returns the URL of a PNG that says how large it is and holds nothing."""
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _with_image(url: str) -> bytes:
    return post(json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}).encode())


def _with_text(text: str) -> bytes:
    return post(json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 2}).encode())


def _half_a_body(address: Address) -> int:
    """Promises more than it sends, and hangs up."""
    with socket.create_connection(address, timeout=_PATIENCE_S) as connection:
        connection.sendall(post(b'{"messages": [', length=5000))
        return 0


def _silent(address: Address) -> int:
    """Sends half of the headers, and waits until the server has had enough."""
    return ask(address, b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")[0]


# Name -> what is sent, or a function, and the statuses that are right.
FAULTS: dict[str, tuple[bytes | Callable[[Address], int], set[int]]] = {
    "broken JSON": (post(b'{"messages": ['), {400}),
    "JSON 10,000 deep": (post(b"[" * 10_000 + b"]" * 10_000), {400}),
    "NaN": (post(b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}'), {400}),
    "a huge number": (post(b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1' + b"0" * 5000 + b"}"), {400}),
    "another model": (post(b'{"model": "gpt", "messages": [{"role": "user", "content": "a"}]}'), {404}),
    "two answers": (post(b'{"n": 2, "messages": [{"role": "user", "content": "a"}]}'), {400}),
    "a prompt that is too long": (_with_text("lesion " * 20_000), {400}),
    "100,000 pixels": (_with_image(png_of_size(100_000, 100_000)), {400}),
    "a cut image": (_with_image(png_of_size(10, 10)), {400}),
    "no image": (_with_image("data:image/png;base64,aGVsbG8="), {400}),
    "a file": (_with_image("file:///etc/passwd"), {400}),
    "an address of the cloud": (_with_image("http://169.254.169.254/latest/meta-data"), {400}),
    "50 MB": (post(b"a" * 50_000_000), {413}),
    "a flood of headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", {400, 431}),
    "another path": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {400, 404}),
    "half a body": (_half_a_body, {0}),
    "half of the headers": (_silent, {0, 408}),
}


def commit(address: Address, name: str) -> int:
    """Commits a fault; returns 1 if the server's reply is not one of the right ones, else 0."""
    fault, right = FAULTS[name]
    status = ask(address, fault)[0] if isinstance(fault, bytes) else fault(address)
    return int(status not in right)


def idle(address: Address, number: int, body: dict, wave: int = 1500) -> dict:
    """Opens connections that say nothing, waves of them in turn, and asks for an answer after each wave.

    Returns:
      How many connections the server refused at once and closed later, how many it left open, how many of the questions
      were answered, and the most seconds until an answer came.
    """
    from llavamed_jax.serving.server import raise_open_files

    raise_open_files()
    ends, answered, asked, slowest = Counter(), 0, 0, 0.0
    for first in range(0, number, wave):
        held = {}
        for _ in range(min(wave, number - first)):
            connection = socket.create_connection(address, timeout=_PATIENCE_S)
            held[connection.fileno()] = connection
        end = _closed_by_the_server(held)
        ends.update(end)
        begun, asked = time.monotonic(), asked + 1
        answered += ask_json(address, body)[0] == 200
        slowest = max(slowest, time.monotonic() - begun)
    return {"idle_connections": number, "refused_at_once": ends["told"], "closed_later": ends["closed"], "left_open": ends["open"],
            "questions": asked, "answered": answered, "most_seconds_until_answered": round(slowest, 3)}


def _closed_by_the_server(held: dict[int, socket.socket], seconds: float = 120.0) -> Counter:
    """Waits until the server has closed all connections; counts those that were told why, closed, and left open."""
    poll, found, until = select.poll(), Counter(), time.monotonic() + seconds
    out = dict.fromkeys(held, b"")
    for number in held:
        poll.register(number, select.POLLIN)
    while held and time.monotonic() < until:
        for number, _ in poll.poll(1000):
            try:
                data = held[number].recv(4096)
            except OSError:
                data = b""
            out[number] += data
            if not data:
                poll.unregister(number)
                held.pop(number).close()
                found["told" if b"too_many_connections" in out[number] else "closed"] += 1
    for connection in held.values():
        connection.close()
        found["open"] += 1
    return found
