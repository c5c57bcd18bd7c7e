"""What a server may cost: memory, time, and where requests may be sent on to; measured against one that has no bounds."""

import contextlib
import gzip
import itertools
import json
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.errors import UserError
from llavamed_jax.openai_client.client import Service, ServiceError
from llavamed_jax.openai_client.replies import PassingError, read_reply
from tests.openai_client.test_leaks import asked  # noqa: F401  # a fixture
from tests.support.openai_server import OpenAiServer, Raw

ROOT = Path(__file__).resolve().parents[2]
GIB, MIB = 2**30, 2**20
LIMIT = MIB + 256 * 16  # of a reply of 16 tokens
WHOLE = b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}'


def ask(server, texts=("a",), url=None, **settings):
    service = Service(url or server.url, "tiny", **{"retries": 1, "backoff": 0.001} | settings)
    return dict(service.each(enumerate([[{"role": "user", "content": text}] for text in texts]), max_tokens=16, temperature=0.0))


def padded(size):
    """A reply of so many bytes."""
    return WHOLE + b" " * (size - len(WHOLE))


def bomb(size):
    """Gzip of a reply that is `size` bytes long, in pieces that are small on the wire."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    yield packer.compress(WHOLE)
    for _ in range(size // MIB):
        yield packer.compress(b" " * MIB)
    yield packer.flush()


def endless(piece=b" " * 2**16, size=GIB):
    return itertools.chain([WHOLE], itertools.repeat(piece, size // len(piece)))


def chunked(pieces):
    """HTTP's chunks."""
    return itertools.chain((b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece), [b"0\r\n\r\n"])


def many_headers():
    return itertools.repeat(b"X: " + b"x" * 2**16 + b"\r\n", 2**14)


GZIP, CHUNKS = {"Content-Encoding": "gzip"}, {"Transfer-Encoding": "chunked"}
HUGE = {
    "a gigabyte": lambda: Raw.response(endless()),
    "a gigabyte, as its length says": lambda: Raw.response(endless(), headers={"Content-Length": str(GIB + len(WHOLE))}),
    "a gigabyte in chunks": lambda: Raw.response(chunked(endless()), headers=CHUNKS),
    "a gigabyte in a megabyte of gzip": lambda: Raw.response(bomb(GIB), headers=GZIP),
    "an error of a gigabyte": lambda: Raw.response(endless(), "400 Bad Request"),
    "an error that may pass": lambda: Raw.response(endless(), "503 Service Unavailable"),
    "a redirect with a gigabyte": lambda: Raw.response(endless(), "307 Temporary Redirect", {"Location": "/v1/chat/completions"}),
    "headers of a gigabyte": lambda: Raw(itertools.chain([b"HTTP/1.1 200 OK\r\n"], many_headers())),
    "one header of a gigabyte": lambda: Raw(itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"x" * 2**16, 2**14))),
    "a status line of a gigabyte": lambda: Raw(itertools.repeat(b"HTTP/1.1 200 " + b"x" * 2**16, 2**14)),
    "a trailer of a gigabyte": lambda: Raw.response(itertools.chain([b"1\r\n{\r\n0\r\n"], many_headers()), headers=CHUNKS),
    "a chunk's size of a gigabyte": lambda: Raw.response(itertools.repeat(b"0" * 2**16, 2**14), headers=CHUNKS),
    "continue for ever": lambda: Raw(itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 40000)),
}

_CHILD = """
import resource, sys
from llavamed_jax.openai_client.client import Service
def ask(url, **settings):
    requests = enumerate([[{"role": "user", "content": str(i)}] for i in range(8)])
    return list(Service(url, "tiny", backoff=0.001, **settings).each(requests, max_tokens=16, temperature=0.0))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
ask(sys.argv[1])
for word in sys.argv[2:]:
    timeout, _, url = word.partition(" ")
    before = peak()
    try:
        kinds = {type(reply).__name__ for _, reply in ask(url, retries=1, timeout=float(timeout))}
    except Exception as error:
        kinds = {type(error).__name__}
    print(peak() - before, *kinds, flush=True)
"""


def test_memory_is_bounded_whatever_comes():
    """Eight requests at a time; megabytes beyond the peak of everything before, eight small replies at first."""
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(OpenAiServer(answer)) for answer in
                   (lambda body: "yes", *(lambda body, make=make: make() for make in HUGE.values()))]
        timeouts = [0.25 if name == "continue for ever" else 2 for name in HUGE]  # which alone is read until its time is over
        words = [f"{timeout} {server.url}" for timeout, server in zip(timeouts, servers[1:], strict=True)]
        done = subprocess.run([sys.executable, "-c", _CHILD, servers[0].url, *words], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = dict(zip(HUGE, (line.split() for line in done.stdout.splitlines()), strict=True))
    print({name: int(grown) for name, (grown, *_) in found.items()})
    assert all(int(grown) < 40 for grown, *_ in found.values()), found
    assert all(kinds in (["UserError"], ["BilledError"], ["ServiceError"]) for _, *kinds in found.values()), found
    assert time.monotonic() - begun < 300


def test_what_is_just_small_enough_and_just_too_large():
    for pack in (lambda data: Raw.response(data), lambda data: Raw.response(gzip.compress(data), headers=GZIP),
                 lambda data: Raw.response(chunked([data]), headers=CHUNKS)):  # fmt: skip
        with OpenAiServer(lambda body, pack=pack: pack(padded(LIMIT + (body["messages"][0]["content"] == "b")))) as server:
            found = ask(server, ["a", "b", "a"])
        assert found[0].text == found[2].text == "yes" and len(server.log) == 3, "and is not asked again"
        assert str(found[1]).endswith(f"(model 'tiny'): its reply is larger than {LIMIT:,} bytes")


def test_longer_answers_may_be_larger():
    """A thousand tokens of a hundred letters each, written in JSON's escapes."""
    text = "\u65e5" * 100 * 1000
    assert len(json.dumps(text)) > 500_000
    with OpenAiServer(lambda body: text) as server:
        service = Service(server.url, "tiny")
        ((_, reply),) = service.each([(0, [{"role": "user", "content": "a"}])], max_tokens=1024, temperature=0.0)
    assert reply.text == text


@pytest.mark.parametrize(("headers", "body", "kind"), [
    (GZIP, b"no gzip", "incorrect header"), (GZIP, gzip.compress(WHOLE)[:-9], "ends too early"),
    ({"Content-Encoding": "br"}, WHOLE, "'br'"),
    ({"Content-Encoding": "gzip, gzip"}, gzip.compress(gzip.compress(WHOLE)), "gzip was expected")],
    ids=["no gzip", "cut", "brotli", "twice"])  # the bytes of gzip hold the time, which two workers read apart
def test_what_cannot_be_unpacked_is_asked_again(headers, body, kind):
    with OpenAiServer(lambda each: Raw.response(body, headers=headers) if len(server.log) == 1 else "yes") as server:
        assert ask(server)[0].text == "yes"
    with OpenAiServer(lambda each: Raw.response(body, headers=headers)) as server:
        assert kind in str(ask(server)[0]) and len(server.log) == 2
    with OpenAiServer(lambda each: Raw.response(body, "400 Bad Request", headers)) as server:
        assert "answers 400 Bad Request" in str(ask(server)[0]), "of an error the status says enough"


@pytest.mark.parametrize("body", [
    b"[" * 200_000, b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 100_000, b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    b'{"choices": [{"message": {"content": "x"}, "finish_reason": ' + b"[" * 900 + b"]" * 900 + b"}]}", b"1" * 5000, b"1e999", b"NaN",
    b'{"error": ' + b"[" * 950 + b"]" * 950 + b"}",
    b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": ' + b"1" * 5000 + b"}}"])
def test_brackets_and_numbers_that_python_does_not_read(body):
    for status in ("200 OK", "400 Bad Request", "429 Too Many Requests", "401 Unauthorized"):
        with OpenAiServer(lambda each, status=status: Raw.response(body, status)) as server:
            try:
                (found,) = ask(server).values()
            except ServiceError as error:
                found = error
        said = str(found)
        assert "\n" not in said and len(said) < 1000
        assert isinstance(found, UserError) or body.count(b"[") < 1000
    try:
        read_reply(body)
    except PassingError:
        pass


def test_counts_that_are_none():
    for count in (True, -1, 1.5, "7", 10**7, None, [7], {"a": 1}):
        reply = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": count, "completion_tokens": 3}}
        found = read_reply(json.dumps(reply).encode())
        assert (found.prompt_tokens, found.completion_tokens) == (0, 3)


DRIPS = {
    "head": [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 100], "body": [b"HTTP/1.1 200 OK\r\n\r\n", *[b" "] * 100],
    "chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 100],
    "error": [b"HTTP/1.1 500 Oh\r\n\r\n", *[b" "] * 100], "continue": [b"HTTP/1.1 100 Continue\r\n\r\n"] * 100,
    "redirects": [b"HTTP/1.1 307 Go\r\nLocation: /v1/chat/completions\r\n", *[b"X: y\r\n"] * 7, b"\r\n"]}


def test_a_reply_that_drips_is_given_up_when_its_time_is_over():
    """A byte now and then keeps a client waiting that counts from one piece to the next. All are waited for at once."""
    def drip(name):
        with OpenAiServer(lambda body: Raw(DRIPS[name], pause=0.02)) as server:
            begun = time.monotonic()
            return ask(server, timeout=0.25)[0], time.monotonic() - begun

    with ThreadPoolExecutor(len(DRIPS)) as pool:
        found = dict(zip(DRIPS, pool.map(drip, DRIPS), strict=True))
    for name, (said, took) in found.items():
        assert str(said).endswith("was asked 2 times without success; last: it gave no reply within 0.25 s"), name
        assert 0.5 <= took < 3.0, f"two attempts: {name}"


# --- redirects ---


def redirect(location, status="307 Temporary Redirect"):
    return Raw.response(b"", status, {"Location": location})


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_within_an_origin_a_redirect_is_followed_with_all_that_was_sent(status):
    def answer(body):
        to = {1: "completions?again", 2: f"{server.origin}/v1/chat/completions"}.get(len(server.log))
        return redirect(to, status) if to else "yes"

    with OpenAiServer(answer, key="sk-right-one") as server:
        assert ask(server, api_key="sk-right-one", url=f"{server.url}?x=1")[0].text == "yes"
    assert [each.path for each in server.log] == [f"/v1/chat/completions{query}" for query in ("?x=1", "?again", "")]
    assert server.log[0].body == server.log[1].body == server.log[2].body and not server.refused, "the key too"


def test_another_origin_is_sent_nothing(asked, tmp_path, capsys):  # noqa: F811
    def answer(body):
        return redirect(f"{elsewhere.url}/chat/completions?k=secret-1")

    with OpenAiServer(lambda body: "yes") as elsewhere, OpenAiServer(answer) as server:
        assert cli.main([*asked, "--endpoint", server.url, "--model", "tiny"]) == 1
        said = capsys.readouterr().err
        assert not elsewhere.log and elsewhere.refused == 0
    assert f"{server.url}/chat/completions redirects to {elsewhere.url}/chat/completions?k=[hidden], another origin; nothing was" in said
    assert said.count("\n") == 1 and "secret-1" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("location", [
    "https://127.0.0.1:PORT/v1", "http://localhost:PORT/v1", "http://127.0.0.1:1/v1", "//127.0.0.1:1/v1", "http://127.0.0.1/v1",
    "http://u:p@127.0.0.1:PORT/v1", "ftp://127.0.0.1:PORT/v1", "file:///etc/passwd", "http://[::1]:PORT/", "http://127.0.0.1.:PORT/v1",
    "javascript:alert(1)", "data:application/json,{}", "http://[", "http://a..b/", "http://\x01/", "http://127.0.0.1:99999/"])
def test_what_is_another_origin(location):
    with OpenAiServer(lambda body: redirect(location.replace("PORT", server.origin.rpartition(":")[2]))) as server, \
            pytest.raises(ServiceError, match="redirects to|cannot be asked|connection failed") as error:
        ask(server)
    assert len(server.log) == 1 and server.origin in str(error.value) and "\n" not in str(error.value)


def test_redirects_are_counted():
    with OpenAiServer(lambda body: redirect("/v1/chat/completions")) as server, \
            pytest.raises(ServiceError, match="it redirects more than 5 times, last to http://127.0.0.1:"):
        ask(server)
    assert len(server.log) == 6
    with OpenAiServer(lambda body: "yes" if len(server.log) == 6 else redirect("/v1/chat/completions")) as server:
        assert ask(server)[0].text == "yes"


@pytest.mark.parametrize("status", ["300 Multiple Choices", "303 See Other", "304 Not Modified", "399 Odd"])
def test_a_status_that_moves_no_request_is_an_error(status):
    with OpenAiServer(lambda body: redirect("/v1/chat/completions", status)) as server:
        assert f"answers {status[:3]}" in str(ask(server)[0]) and len(server.log) == 1
    with OpenAiServer(lambda body: Raw.response(b"", "307 Temporary Redirect")) as server:
        assert "answers 307 Temporary Redirect" in str(ask(server)[0]), "without saying where to"
