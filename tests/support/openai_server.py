"""A server on loopback that speaks OpenAI's /v1/chat/completions, and fails as often as it is told to.

    with OpenAiServer(lambda request: "yes", fault_rate=0.1) as server:      # Service(server.url, "tiny")
    python -m tests.support.openai_server --fault_rate 0.1                           # prints the address, serves until it is stopped

Whether a request fails follows from the seed, from what is asked and from how often it was asked before, not from the order in
which requests arrive: a test that runs twice sees the same faults. `log` holds every request with what became of it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

FAULTS = ("429", "429 with Retry-After", "500", "slow", "malformed", "empty choices", "dropped", "dropped midway")


@dataclass(frozen=True)
class Logged:
    """A request: its body, a hash of its messages, the fault that it met (None: it was answered), and its path."""

    body: dict
    asked: str
    fault: str | None
    path: str


@dataclass(frozen=True)
class Raw:
    """A response as it goes over the wire, in pieces, after which the connection is closed; `pause` seconds between them.

    `sent` counts its bytes as they go: a client that hangs up stops them.
    """

    pieces: Iterable[bytes]
    pause: float = 0.0
    sent: list[int] = field(default_factory=list)

    @classmethod
    def response(cls, body: bytes | Iterable[bytes] = b"", status: str = "200 OK", headers: Mapping[str, str] | None = None, **more) -> Raw:
        """Status line, headers and body. Without a length the body ends where the connection does."""
        named = {"Content-Type": "application/json"} | ({"Content-Length": str(len(body))} if isinstance(body, bytes) else {})
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in (named | dict(headers or {})).items()), "", ""]
        return cls(itertools.chain(["\r\n".join(lines).encode("latin-1")], [body] if isinstance(body, bytes) else body), **more)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: OpenAiServer

    def log_message(self, *args):
        pass  # the server's own list is the log

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.owner.counting():
            self._post(json.loads(raw))

    def _post(self, body: dict) -> None:
        owner, parts = self.owner, urlsplit(self.path)
        azure = re.fullmatch(r"/openai/deployments/([^/]+)/chat/completions", parts.path)
        if azure and "api-version" not in parse_qs(parts.query) or not azure and parts.path != "/v1/chat/completions":
            return self._refuse(404, "Resource not found")
        key = self.headers.get("api-key", "") if azure else self.headers.get("Authorization", "").removeprefix("Bearer ")
        if owner.key is not None and key != owner.key:
            return self._refuse(401, f"Incorrect API key provided: {key}.", code="invalid_api_key")
        model = azure[1] if azure else body["model"]
        if model not in owner.models:
            return self._refuse(404, f"The model `{model}` does not exist or you do not have access to it.", code="model_not_found")
        for name in owner.refuses:
            if name in body:
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                why = {"message": f"Unsupported parameter: '{name}' is not supported with this model.{hint}",
                       "code": "unsupported_parameter", "param": name}
                return self._refuse(400, **(owner.refusal or why))
        fault = owner.fault_of(body, self.path)
        if fault is None:
            owner.stopping.wait(owner.delay)
            found = owner.completion(body)
            self._send(200, found) if isinstance(found, dict) else self._write(found)
        else:
            self._fail(fault, body)

    def _fail(self, fault: str, body: dict) -> None:
        if fault.startswith("429"):
            headers = {"Retry-After": str(self.owner.retry_after)} if "Retry-After" in fault else {}
            self._refuse(429, "Rate limit reached", headers)
        elif fault == "500":
            self._send(500, b"<html>Internal Server Error</html>", {"Content-Type": "text/html"})
        elif fault == "slow":
            self.owner.stopping.wait(self.owner.slow)
            self._send(200, self.owner.completion(body))
        elif fault == "malformed":
            self._send(200, b'{"choices": [{"message": {"content": "ye')
        elif fault == "empty choices":
            self._send(200, {"id": "x", "object": "chat.completion", "choices": []})
        else:
            if fault == "dropped midway":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "500")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
            self.close_connection = True

    def _write(self, raw: Raw) -> None:
        self.close_connection = True
        for piece in raw.pieces:
            try:
                self.wfile.write(piece)
            except OSError:
                return
            raw.sent.append(len(piece))
            if raw.pause and self.owner.stopping.wait(raw.pause):
                return

    def _refuse(self, status: int, message: str, headers: dict | None = None, code: str | None = None, param: str | None = None) -> None:
        self.owner.refused += status != 429
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": param}}, headers)

    def _send(self, status: int, body: dict | bytes, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has gone, as it should when a reply is slow
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is no error of the server


class OpenAiServer:
    """Answers chat completions, on a port of its own. A context.

    Args:
      answer: the body of a request -> the text of the answer, or the whole reply as a dict or `Raw`.
      models: the names it knows.
      fault_rate: the share of requests that fail, in one of the ways of `faults`.
      slow: seconds that a slow reply takes; `delay` those of every other; `retry_after` those that a 429 asks for.
      key: the only key that is let in; None lets all in.
      refuses: settings that a request must not have; `refusal` (message, code, param) may be set to what is said instead.
    Attributes:
      log: every request that was let in, in the order of arrival.
      refused: how many were not let in.
      most_at_once: requests under way at a time.
    """

    def __init__(self, answer: Callable[[dict], str | dict | Raw], *, models: Sequence[str] = ("tiny",), fault_rate: float = 0.0,
                 faults: Sequence[str] = FAULTS, seed: int = 0, slow: float = 2.0, delay: float = 0.0, retry_after: float = 0.05,
                 key: str | None = None, refuses: Sequence[str] = (), port: int = 0):
        self.answer, self.models, self.key, self.refuses = answer, tuple(models), key, tuple(refuses)
        self.fault_rate, self.faults, self.seed = fault_rate, tuple(faults), seed
        self.slow, self.delay, self.retry_after = slow, delay, retry_after
        self.refusal: dict | None = None
        self.log: list[Logged] = []
        self.most_at_once = self._at_once = self.refused = 0
        self.stopping = threading.Event()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self}))
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.origin}/v1"

    def fault_of(self, body: dict, path: str) -> str | None:
        """The fault that a request meets; it is logged."""
        asked = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()[:16]
        with self._lock:
            draw = random.Random(f"{self.seed} {asked} {self._seen[asked]}")
            self._seen[asked] += 1
            fault = draw.choice(self.faults) if draw.random() < self.fault_rate else None
            self.log.append(Logged(body, asked, fault, path))
        return fault

    def completion(self, body: dict) -> dict | Raw:
        answer = self.answer(body)
        if not isinstance(answer, str):
            return answer
        usage = {"prompt_tokens": 7, "completion_tokens": len(answer.split()), "total_tokens": 7 + len(answer.split())}
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage}

    def faults_met(self) -> Counter[str]:
        return Counter(each.fault for each in self.log if each.fault is not None)

    def asked_without_need(self, wanted: Counter[str] | None = None) -> list[str]:
        """Hashes of messages that were answered more than once, or more often than `wanted` (hash -> times) says."""
        answered = Counter(each.asked for each in self.log if each.fault is None)
        return [asked for asked, times in answered.items() if times > (1 if wanted is None else wanted[asked])]

    def counting(self) -> _AtOnce:
        return _AtOnce(self)

    def __enter__(self) -> OpenAiServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _AtOnce:
    """Counts the requests under way while it is open."""

    def __init__(self, owner: OpenAiServer):
        self._owner = owner

    def __enter__(self):
        with self._owner._lock:
            self._owner._at_once += 1
            self._owner.most_at_once = max(self._owner.most_at_once, self._owner._at_once)

    def __exit__(self, *exc):
        with self._owner._lock:
            self._owner._at_once -= 1


def yes_or_no(body: dict) -> str:
    """An answer that follows from the question and the image, and from nothing else."""
    return "yes" if hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[0] % 2 else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--fault_rate", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=10.0)
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("fault_rate", "slow", "delay", "port")}
    with OpenAiServer(yes_or_no, models=[args.model], **settings) as server:
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts it in the background has it ignore Ctrl-C
            signal.signal(number, signal.default_int_handler)
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            answered = sum(each.fault is None for each in server.log)
            twice = len(server.asked_without_need())
            print(f"{len(server.log)} requests, {answered} answered, {twice} answered more than once, faults {dict(server.faults_met())}, "
                  f"at most {server.most_at_once} at once")


if __name__ == "__main__":
    main()
