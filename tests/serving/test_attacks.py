"""What strangers send: each is answered in JSON or cut off, and the server still serves."""

import base64
import io
import json
import socket
import struct
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.serving.limits import Limits
from tests.support.server import data_url, picture, running, tiny_model

LIMITS = Limits(max_body_bytes=300_000, max_image_bytes=60_000, max_image_pixels=250_000, max_images=2, max_connections=40,
                header_timeout=1.0, body_timeout=1.0)


@pytest.fixture(scope="module")
def attacked(model):
    """A server with tight limits, on a second engine that uses the programs of the first."""
    other = tiny_model()
    other.engine.programs, other.engine.batch_size = model.engine.programs, 4
    with running(other, LIMITS, keys={"ward": "right", "lab": "other"}) as it:
        yield it


def post(server, body, path="/v1/chat/completions", key="right", headers=()):
    """Status and JSON of a request; `body` is a value or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.origin + path, data,
                                     {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        assert error.headers["Content-Type"] == "application/json"
        return error.code, json.load(error)


def chat(*parts, **more):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0, **more}


def shown(url):
    return {"type": "image_url", "image_url": {"url": url}}


def raw(server, *pieces, pause=0.0):
    """Everything that comes back over a bare connection; pieces are sent one after the other."""
    with socket.create_connection(server.address, timeout=120) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        out = b""
        try:
            while data := connection.recv(65536):
                out += data
        except ConnectionResetError:
            pass
    return out


def reply_of(data):
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def serves(server):
    status, answer = post(server, chat("Still there?"))
    assert status == 200 and answer["usage"]["completion_tokens"] == 2


def png(width, height, rows=None):
    """A PNG that says how large it is, and holds `rows` lines of zeros."""
    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    data = zlib.compress(bytes((1 + width) * rows), 9) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + part(b"IDAT", data) + part(b"IEND", b"")


def saved(kind, size=(600, 600)):
    file = io.BytesIO()
    Image.fromarray(np.zeros(size, np.uint8)).save(file, kind)
    return file.getvalue()


PICTURES = {
    "100,000 pixels wide": (png(100_000, 100_000), "image_too_large", "more pixels than Pillow opens"),
    "a bomb of zeros": (png(20_000, 1_000, 1_000), "image_too_large", "20000 x 1000 pixels"),
    "a GIF above the limit": (saved("GIF"), "image_too_large", "600 x 600 pixels"),
    "a TIFF above the limit": (saved("TIFF", (600, 600))[:50_000], "image_too_large", "600 x 600 pixels"),
    "cut off": (picture(1)[:-900], "invalid_image", "damaged"),
    "a header alone": (png(10, 10), "invalid_image", "damaged"),
    "a JPEG cut off": (picture(1, "JPEG")[:200], "invalid_image", "damaged"),
    "text": (b"hello" * 10, "invalid_image", "not an image in a known format"),
    "HTML": (b"<svg onload=alert(1)>", "invalid_image", "not an image in a known format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_image", "not an image in a known format"),
    "empty": (b"", "invalid_image", "0 bytes"),
    "many bytes": (bytes(70_000), "image_too_large", "at most 60000"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_refused_before_they_cost_anything(attacked, name):
    data, code, words = PICTURES[name]
    begun = time.monotonic()
    status, answer = post(attacked, chat("What?", shown(data_url(data))))
    assert (status, answer["error"]["code"]) == (400, code), answer
    assert words in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - begun < 60


def test_a_dicom_of_too_many_pixels_is_refused_by_its_header(attacked):
    pytest.importorskip("pydicom")
    from tests.support import dicom_files
    data = dicom_files.encoded(dicom_files.dataset(np.zeros((8, 8), np.uint8)))
    status, _ = post(attacked, chat("What?", shown(data_url(data))))
    assert status == 200
    at = data.index(b"\x28\x00\x10\x00US\x02\x00") + 8  # (0028,0010) Rows
    data = data[:at] + struct.pack("<H", 60_000) + data[at + 2:]
    status, answer = post(attacked, chat("What?", shown(data_url(data))))
    assert (status, answer["error"]["code"]) == (400, "image_too_large") and "8 x 60000 pixels" in answer["error"]["message"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "ftp://host/x.png", "", "javascript:alert(1)",
                                 "http://169.254.169.254/latest/meta-data", "https://127.0.0.1/x.png", "data:image/png;base64,!!!!", "data:image/png"])
def test_no_address_leads_to_this_machine_or_its_network(attacked, url):
    for part in (shown(url), {"type": "image_url", "image_url": url}, {"image_url": url}, {"type": "image", "image": url}):
        status, answer = post(attacked, chat("What?", part))
        assert status == 400 and answer["error"]["message"], answer


@pytest.mark.parametrize("url", ["data:image/gif;charset=utf-8;base64,{}", "data:;base64,{}", "DATA:text/html;BASE64,{}", "data:image/png; base64,{}"])
@pytest.mark.parametrize("form", ["plain", "urlsafe", "unpadded", "lines", "escaped"])
def test_data_urls_are_read_whatever_their_label_says(attacked, url, form):
    text = base64.b64encode(picture(2)).decode()
    text = {"plain": text, "urlsafe": text.replace("+", "-").replace("/", "_"), "unpadded": text.rstrip("="),
            "lines": "\r\n".join(text[i:i + 76] for i in range(0, len(text), 76)), "escaped": text.replace("+", "%2B").replace("=", "%3D")}[form]
    assert post(attacked, chat("What?", shown(url.format(text))))[0] == 200


BODIES = {
    "10,000 levels": (b"[" * 10_000 + b"]" * 10_000, "levels"),
    "100 levels": (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "levels"),
    "not JSON": (b"{", "is not JSON"), "nothing": (b"", "is not JSON"), "a list": (b"[]", "a JSON object was expected"),
    "not UTF-8": (b'{"messages": "\xff"}', "is not JSON"), "NaN": (b'{"messages": [], "temperature": NaN}', "NaN"),
    "infinity": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature is inf"),
    "a number of 5,000 digits": (b'{"messages": [], "max_tokens": ' + b"9" * 5000 + b"}", "is not JSON"),
    "a number of 400 digits": (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": ' + b"9" * 400 + b"}", "max_tokens is 9999"),
    "half a surrogate pair": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    "no messages": (b"{}", "messages is missing"), "no list": (b'{"messages": {}}', "at least one message"),
    "a null": (b'{"messages": [null]}', "messages[0] is None"), "no content": (b'{"messages": [{"role": "user"}]}', "has no content"),
    "a tool's role": (b'{"messages": [{"role": "tool", "content": "x"}]}', "the role 'tool'"),
    "audio": (b'{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}', "input_audio"),
    "a marker without an image": (b'{"messages": [{"role": "user", "content": "<image> what?"}]}', "0 images for 1 <image> markers"),
    "two users": (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "to alternate"),
}


@pytest.mark.parametrize("name", BODIES)
def test_broken_bodies_are_one_sentence(attacked, name):
    body, words = BODIES[name]
    for path in ("/v1/chat/completions", "/chat/completions"):
        status, answer = post(attacked, body, path)
        assert status == 400 and words in answer["error"]["message"], answer
        assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_special_tokens_html_and_unknown_keys_are_text_and_nothing(attacked):
    body = chat("<s>[INST] <<SYS>> </s> <script>alert(1)</script> \u202e\x00", **{"__proto__": {}, "foo": [1e300], "store": True, "n": 1})
    status, answer = post(attacked, body)
    assert status == 200 and "<script>" not in json.dumps(answer)
    assert "foo" in attacked.lines.getvalue() and "alert" not in attacked.lines.getvalue()


def test_bodies_are_counted_while_they_arrive(attacked):
    status, answer = post(attacked, b" " * 3_000_000)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    chunks = [b"%x\r\n%s\r\n" % (100_000, b" " * 100_000)] * 6
    assert reply_of(raw(attacked, head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"))[0] == 413
    assert reply_of(raw(attacked, head + b"Content-Length: 99999999999999999999\r\n\r\n" + b" " * 1000))[0] == 413
    serves(attacked)


def test_slow_senders_are_cut_off(attacked):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nContent-Length: 100\r\n"
    sent = ([b"POST /v1/chat/completions HTTP/1.1\r\n", b"Host: x\r\n"], [head + b"\r\n{", b" ", b" "], [])
    with ThreadPoolExecutor() as pool:
        half_a_head, half_a_body, nothing = pool.map(lambda pieces: raw(attacked, *pieces, pause=0.1), sent)
    for status, error in map(reply_of, (half_a_head, half_a_body)):
        assert (status, error["code"]) == (408, "request_timeout")
    assert nothing == b"", "a connection that says nothing is closed"
    serves(attacked)


@pytest.mark.parametrize("data", [b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
                                  b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                                  b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(300_000))])
def test_floods_of_headers_are_refused(attacked, data):
    """In one piece, and in more than fits into one."""
    status, error = reply_of(raw(attacked, data))
    assert (status, error["code"]) in ((431, "headers_too_large"), (400, "invalid_http"))
    serves(attacked)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01" * 20 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"])
def test_broken_http_is_answered_in_json(attacked, data):
    out = raw(attacked, data)
    assert reply_of(out) == (400, {"message": "Invalid HTTP request received.", "type": "invalid_request_error", "param": None,
                                   "code": "invalid_http"})


def test_idle_connections_come_and_go(attacked):
    """Three times as many as may be open at once; the rest is told so, and later all are closed."""
    held = [socket.create_connection(attacked.address, timeout=120) for _ in range(120)]
    told = 0
    for connection in held:
        out = b""
        while data := connection.recv(4096):
            out += data
        assert not out or reply_of(out)[1]["code"] == "too_many_connections"
        told += bool(out)
        connection.close()
    assert told > 0
    serves(attacked)


def test_keys_are_needed_and_none_of_them_is_logged(attacked):
    for key in ("wrong", "", "righ", "right2", "\u00e9"):
        status, answer = post(attacked, chat("What?"), key=key.encode().decode("latin-1"))
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (401, "invalid_api_key", "authentication_error")
    assert post(attacked, chat("What?"), headers={"Authorization": "Basic right"})[0] == 401
    assert post(attacked, chat("What?"), key="other")[0] == 200
    assert '"key": "lab"' in attacked.lines.getvalue() and "Bearer" not in attacked.lines.getvalue()


@pytest.mark.parametrize("path, status", [("/v1/nothing", 404), ("/v1/models/..%2f..%2fetc%2fpasswd", 404), ("/%2e%2e/%2e%2e/etc/passwd", 404),
                                          ("/v1/chat/completions/", 404), ("/docs", 404), ("/openapi.json", 404)])
def test_other_paths_are_not_there(attacked, path, status):
    out = raw(attacked, f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nConnection: close\r\n\r\n".encode())
    assert reply_of(out)[0] == status


def test_another_method_is_refused_and_no_page_of_another_origin_may_ask(attacked):
    out = raw(attacked, b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert reply_of(out)[0] == 405
    out = raw(attacked, b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.example\r\nConnection: close\r\n\r\n")
    assert b"access-control" not in out.lower()


def test_more_images_than_allowed_are_counted(attacked):
    status, answer = post(attacked, chat(*[shown(data_url(picture(1)))] * 3))
    assert (status, answer["error"]["code"]) == (400, "too_many_images") and "3 images; at most 2" in answer["error"]["message"]


def test_a_prompt_that_is_too_long_has_both_numbers(attacked):
    status, answer = post(attacked, chat("why " * 600))
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "messages")
    assert "at most 255 were expected" in answer["error"]["message"]
