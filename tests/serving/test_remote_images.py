"""Remote images: from named hosts at public addresses only, whatever a name, a redirect or a second look-up says."""

import asyncio
import contextlib
import json
import socket
from dataclasses import replace

import pytest

from llavamed_jax.serving.batch_file import Results
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.remote import Fetcher, is_public_address
from tests.support.server import picture

IMAGE = picture(1)
LIMITS = Limits(max_image_bytes=20_000, fetch_timeout=2.5)


@contextlib.asynccontextmanager
async def site(answers):
    """A server on loopback; path -> bytes of the whole response, or None to say nothing. Yields its port and what was asked."""
    asked = []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head)
        answer = answers[head.split()[1]]
        if answer is None:
            await asyncio.sleep(8)
        writer.write(answer or b"")
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


def reply(body=b"", status="200 OK", **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def fetched(answers, url, hosts=("img.test:{port}",), addresses=("127.0.0.1",), allowed=("127.0.0.1",), limits=LIMITS):
    """What a fetcher brings whose names all resolve to `addresses`, and that takes `allowed` for public."""
    async def run():
        async with site(answers) as (port, asked):
            looked_up = []

            async def resolve(host, port):
                looked_up.append(host)
                return [addresses[min(len(looked_up), len(addresses)) - 1]] if isinstance(addresses, list) else list(addresses)
            fetcher = Fetcher([host.format(port=port) for host in hosts], limits, resolve, lambda a: a in allowed or is_public_address(a))
            try:
                return await fetcher.fetch(url.format(port=port), "image 1"), asked, looked_up
            except ApiError as error:
                return error, asked, looked_up
    return asyncio.run(run())


def test_an_image_is_fetched_from_a_named_host():
    data, asked, looked_up = fetched({"/a%20b.png?c=1": reply(IMAGE, Content_Length=len(IMAGE))}, "http://IMG.test:{port}/a b.png?c=1")
    assert data == IMAGE and looked_up == ["img.test"]
    assert "\r\nhost: img.test:" in asked[0].lower() and "accept: image/*" in asked[0].lower() and "authorization" not in asked[0].lower()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)
    assert fetched({"/": reply(chunked, Transfer_Encoding="chunked")}, "http://img.test:{port}/")[0] == IMAGE
    assert fetched({"/": reply(IMAGE)}, "http://a.img.test:{port}/", hosts=("*.img.test:{port}",))[0] == IMAGE


@pytest.mark.parametrize("url, hosts", [
    ("http://img.test:{port}/", ()), ("http://other.test:{port}/", ("img.test:{port}",)), ("http://img.test/", ("img.test:{port}",)),
    ("http://img.test:{port}/", ("img.test",)), ("http://img.test.evil.test:{port}/", ("img.test:{port}",)),
    ("http://evilimg.test:{port}/", ("*.img.test:{port}",)), ("http://img.test:{port}/", ("*.img.test:{port}",)),
    ("http://user@img.test:{port}/", ("img.test:{port}",)), ("http://img.test:{port}@other.test/", ("img.test:{port}",)),
    ("http://img.test:99999/", ("img.test",)), ("https://[::1/", ("img.test",)), ("http:///x", ("img.test",)), ("gopher://img.test/", ("img.test",)),
    ("http://127.0.0.1:{port}/", ("img.test:{port}",)), ("http://2130706433:{port}/", ("img.test:{port}",))])
def test_other_addresses_are_refused_without_a_connection(url, hosts):
    error, asked, _ = fetched({"/": reply(IMAGE)}, url, hosts)
    assert isinstance(error, ApiError) and error.status == 400 and error.code in ("remote_image_refused", "remote_images_disabled")
    assert not asked


PRIVATE = ["127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "255.255.255.255",
           "224.0.0.1", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
           "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "fec0::1", "feff::1", "5f00::1", "100::1",
           "4000::1", "64:ff9b:1::1", "::127.0.0.1", "2001::1", "3fff::1", "192.88.99.1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address):
    assert not is_public_address(address)
    error, asked, _ = fetched({"/": reply(IMAGE)}, "http://img.test:{port}/", addresses=(address,), allowed=())
    assert error.code == "remote_image_refused" and not asked
    error, asked, _ = fetched({"/": reply(IMAGE)}, "http://img.test:{port}/", addresses=("127.0.0.1", address), allowed=("127.0.0.1",)
                              if address != "127.0.0.1" else ())
    assert error.code == "remote_image_refused" and not asked, "one public address does not excuse a private one"


def test_public_addresses_are_public():
    assert all(map(is_public_address, ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"]))


def test_a_name_that_resolves_elsewhere_a_moment_later_changes_nothing():
    """DNS rebinding: the name is looked up once, and the connection goes to the address that was checked."""
    data, asked, looked_up = fetched({"/": reply(IMAGE)}, "http://img.test:{port}/", addresses=["127.0.0.1", "10.0.0.1"])
    assert data == IMAGE and looked_up == ["img.test"]


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "http://127.0.0.1/", "//localhost/", "file:///etc/passwd", "http://[::1]/",
                                    "http://other.test:{port}/"])
def test_redirects_are_checked_from_the_beginning(target):
    error, asked, _ = fetched({"/": reply(b"", "302 Found", Location=target)}, "http://img.test:{port}/")
    assert error.code == "remote_image_refused" and len(asked) == 1
    # A named host that is now at another address.
    error, asked, _ = fetched({"/": reply(b"", "302 Found", Location="/next"), "/next": reply(IMAGE)}, "http://img.test:{port}/",
                              addresses=["127.0.0.1", "10.0.0.1"])
    assert error.code == "remote_image_refused" and len(asked) == 1


def test_redirects_on_the_same_host_are_followed_a_few_times():
    hops = {"/": reply(b"", "301 Moved", Location="a"), "/a": reply(b"", "307 X", Location="/b"), "/b": reply(IMAGE)}
    assert fetched(hops, "http://img.test:{port}/")[0] == IMAGE
    error, asked, _ = fetched({"/": reply(b"", "302 Found", Location="/")}, "http://img.test:{port}/")
    assert "redirected more than 3 times" in error.message and len(asked) == 4


@pytest.mark.parametrize("answer, words", [
    (reply(bytes(30_000)), "too many bytes"), (reply(bytes(30_000), Content_Length=1 << 40), "too many bytes"), (None, "did not arrive within 0.5 s"),
    (reply(b"", "404 Not Found"), "answered 404"), (b"nonsense\r\n\r\n", "could not be fetched"), (b"", "could not be fetched"),
    (reply(IMAGE[:50], Content_Length=len(IMAGE)), "could not be fetched")])
def test_what_is_there_may_be_too_much_too_slow_or_broken(answer, words):
    limits = replace(LIMITS, fetch_timeout=0.5) if answer is None else LIMITS  # only what never comes is waited for
    error, _, _ = fetched({"/": answer}, "http://img.test:{port}/", limits=limits)
    code = "image_too_large" if words.startswith("too") else "remote_image_failed" if "404" in words else "remote_image_unavailable"
    assert (error.status, error.code) == (400, code) and words in error.message


@pytest.mark.parametrize("status, code", [("503 X", "remote_image_unavailable"), ("500 X", "remote_image_unavailable"), ("429 X", "remote_image_unavailable"),
                                          ("403 X", "remote_image_failed"), ("410 X", "remote_image_failed")])
def test_a_status_says_whether_the_image_may_come_later(status, code):
    error, _, _ = fetched({"/": reply(b"", status)}, "http://img.test:{port}/")
    assert error.code == code and f"answered {status[:3]}" in error.message


def test_what_may_pass_is_asked_again_by_the_next_run_of_a_batch(tmp_path):
    result = lambda name, code: {"id": "1", "custom_id": name, "error": None, "response": {
        "status_code": 400, "body": {"error": {"code": code}} if code else {}}}
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(result(*each)) + "\n" for each in [
        ("a", "remote_image_unavailable"), ("b", "remote_image_failed"), ("c", None), ("d", "remote_image_refused")]), encoding="utf-8")
    results = Results(path)
    results.close()
    assert results.done == {"b", "c", "d"} and "remote_image_unavailable" not in path.read_text(encoding="utf-8")


def test_a_name_that_is_not_found_now_may_be_found_later():
    async def resolve(host, port):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    with pytest.raises(ApiError) as caught:
        asyncio.run(Fetcher(["img.test"], LIMITS, resolve).fetch("http://img.test/", "image 1"))
    assert caught.value.code == "remote_image_unavailable"


@pytest.mark.parametrize("first", ["127.0.0.9", "::1"])  # nobody listens there
def test_every_checked_address_is_tried(first):
    data, asked, _ = fetched({"/": reply(IMAGE)}, "http://img.test:{port}/", addresses=(first, "127.0.0.1"), allowed=("127.0.0.1", first))
    assert data == IMAGE and len(asked) == 1
    error, asked, _ = fetched({"/": reply(IMAGE)}, "http://img.test:{port}/", addresses=(first, "127.0.0.8"), allowed=("127.0.0.8", first))
    assert error.code == "remote_image_unavailable" and not asked


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch):
    real = asyncio.open_connection

    async def connect(address, *args, **more):
        await asyncio.sleep(30 if address == "127.0.0.9" else 0)
        return await real(address, *args, **more)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    data, asked, _ = fetched({"/": reply(IMAGE)}, "http://img.test:{port}/", addresses=("127.0.0.9", "127.0.0.1"),
                             allowed=("127.0.0.1", "127.0.0.9"), limits=Limits(fetch_timeout=1.0))
    assert data == IMAGE and len(asked) == 1
