"""A key planted in every place of a server's replies is in nothing that the client hands on, and in no output and no file of a command."""

import base64
import functools
import gzip
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.openai_client import client
from llavamed_jax.openai_client.address import read_address, shown
from llavamed_jax.openai_client.secrets import Secrets
from tests.support.openai_server import OpenAiServer, Raw

ROOT = Path(__file__).resolve().parents[2]
IMAGES = sorted((ROOT / "samples" / "vqa_rad" / "images").iterdir())[:3]
PLAIN = "sk-proj-0123456789abcdefTAIL"
KEY = "sk-Zx9+q&amp<W>\"'\\/7-0123456789abcdefTAIL"  # signs that JSON, HTML, URLs and Python's repr each write in their own way


def completion(message=None, finish="stop", **more):
    return {"id": "x", "object": "chat.completion", "model": "tiny", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "yes"} if message is None else message, "finish_reason": finish}]} | more


def says(text, status="400 Bad Request", **fields):
    return Raw.response(json.dumps({"error": {"message": text, "type": "t"} | fields}).encode(), status)


def every_letter(form, key):
    return "".join(form.format(ord(char)) for char in key)


def places(key, origin):
    """Name -> what a server answers every request with."""
    js, escaped, elsewhere = json.dumps(key)[1:-1], every_letter("\\u{:04x}", key), "307 Temporary Redirect"
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    whole = json.dumps(completion()).encode()
    at_the_cut = {f"error message, cut {before} characters into the key": says("w" * (300 - before) + key) for before in (1, 8, 20, 36)}
    return at_the_cut | {
        "status line of an answer": Raw([f"HTTP/1.1 200 {key}\r\nContent-Length: {len(whole)}\r\n\r\n".encode(), whole]),
        "status line of an error": Raw.response(b"", f"503 {key}"),
        "status line that is none": Raw([f"HTTP/1.1 {key}\r\n\r\n".encode()]),
        "status of a teapot": says(key, f"418 {key}"),
        "unknown status": says(key, f"499 {key}"),
        "header": Raw.response(whole, headers={"X-Request-Id": key}),
        "header's name": Raw([f"{head}{key}: x\r\n\r\n".encode()]),
        "Retry-After": Raw.response(b"{}", "429 Too Many Requests", {"Retry-After": key}),
        "charset": Raw.response(whole, headers={"Content-Type": f"application/json; charset={key}"}),
        "Content-Encoding": Raw.response(whole, headers={"Content-Encoding": key}),
        "Content-Length": Raw.response(whole, headers={"Content-Length": key}),
        "cookie": Raw.response(whole, headers={"Set-Cookie": f"{key}={key}"}),
        "redirect to another host": Raw.response(b"", elsewhere, {"Location": "http://elsewhere.invalid/" + quote(key)}),
        "redirect to a host of its name": Raw.response(b"", elsewhere, {"Location": f"http://{PLAIN}.invalid/{PLAIN}"}),
        "redirect with a password": Raw.response(b"", "308 Permanent Redirect", {"Location": f"http://u:{quote(key)}@127.0.0.1/"}),
        "redirect to no address": Raw.response(b"", elsewhere, {"Location": f"http://[{key}"}),
        "redirect in a circle": Raw.response(b"", elsewhere, {"Location": f"{origin}/v1/chat/completions?k={quote(key)}"}),
        "error as text": Raw.response(f"no {key} here".encode(), "400 Bad Request"),
        "error as a web page": Raw.response(f"<html>{html.escape(key)}</html>".encode(), "502 Bad Gateway"),
        "error message": says(f"Incorrect API key provided: {key}.", "401 Unauthorized"),
        "error of Azure": Raw.response(json.dumps({"message": key}).encode(), "404 Not Found"),
        "error that is text": Raw.response(json.dumps({"error": key}).encode(), "403 Forbidden"),
        "error of a list": Raw.response(
            json.dumps({"detail": [{"loc": ["body", key], "msg": key, "input": {key: key}}]}).encode(), "422 Unprocessable"),
        "error's code": says("no", code=key), "error's param": says("temperature is not supported", param=key),
        "error's keys": Raw.response(json.dumps({"error": {key: {key: [key]}}}).encode(), "400 Bad Request"),
        "error's type": says("", **{"type": key}), "error of a filter": says(key, code="content_filter"),
        "error, packed": Raw.response(gzip.compress(json.dumps({"error": key}).encode()), "400 Bad Request", {"Content-Encoding": "gzip"}),
        "error in percent escapes": says(quote(key, safe="")),
        "error in percent escapes of each letter": says(every_letter("%{:02x}", key)),
        "error in two percent escapes": says(quote(quote(key, safe=""), safe="")),
        "error in JSON's escapes": Raw.response(f"oh {escaped}".encode(), "400 Bad Request"),
        "error in two of JSON's escapes": says(js), "error in HTML's entities": says(every_letter("&#{};", key)),
        "error as HTML writes it": says(html.escape(key)), "error in hexadecimal": says(key.encode().hex().upper()),
        "error in base64": says(base64.b64encode(f"Bearer {key}".encode()).decode()),
        "error in base64 of a pair": says(base64.urlsafe_b64encode(f"u:{key}".encode()).decode()),
        "error in capitals": says(key.upper()),
        "finish_reason": completion(finish=key), "finish_reason, cut": completion(finish="w" * 40 + key),
        "finish_reason, an object": completion(finish={key: key}), "finish_reason without a text": completion({"content": None}, key),
        "id and model": completion(id=key, model=key, system_fingerprint=key),
        "usage": completion(usage={"prompt_tokens": key, "completion_tokens": key, key: key}), "usage, a text": completion(usage=key),
        "answer": completion({"content": key}), "answer's middle": completion({"content": f"yes, {key}."}),
        "answer in parts": completion({"content": [{"type": "text", "text": key[:9]}, {"type": "text", "text": key[9:]}]}),
        "answer in percent escapes": completion({"content": quote(key)}),
        "answer in base64": completion({"content": base64.b64encode(key.encode()).decode()}),
        "answer, cut by its limit": completion({"content": f"yes, {key[:20]}"}, "length"),
        "refusal": completion({"content": None, "refusal": key}),
        "tool calls": completion({"tool_calls": [{"id": key, "function": {"name": key}}]}),
        "no choices": {"choices": [], "error": {"message": key}}, "choices of something else": {"choices": [key], "error": key},
        "message of something else": completion(key), "no JSON": Raw.response(f"oh {key}".encode()),
        "JSON of something else": Raw.response(json.dumps(key).encode()),
        "half of JSON": Raw.response(b'{"choices": [{"message": {"content": "' + js.encode()),
        "half of JSON in escapes": Raw.response(b'{"choices": "' + escaped.encode()),
        "chunk's size": Raw([f"{head}Transfer-Encoding: chunked\r\n\r\n{key}\r\n".encode()]),
        "chunk's extension": Raw([f"{head}Transfer-Encoding: chunked\r\n\r\n{len(whole):x};{key}\r\n".encode() + whole + b"\r\n0\r\n\r\n"]),
        "trailer": Raw([f"{head}Transfer-Encoding: chunked\r\n\r\n{len(whole):x}\r\n".encode() + whole,
                        f"\r\n0\r\nX: {key}\r\n\r\n".encode()]),
        "broken connection": Raw([f"{head}Content-Length: 999\r\n\r\n{key}".encode()]),
        "no gzip": Raw.response(key.encode(), headers={"Content-Encoding": "gzip"}),
    }


def written_out(text):
    """A text, and what it is when its escapes are undone."""
    forms = [text, unquote(text), unquote(unquote(text)), html.unescape(text), html.unescape(html.unescape(text)),
             re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text), text.replace("\\", ""),
             re.sub(r"\\(.)", r"\1", text), *(re.sub(r"\s", "", form) for form in (text, unquote(text)))]
    for word in set(re.findall(r"[A-Za-z0-9+/_-]{24,}", text)):
        for begin in range(4):
            part = word[begin:][:(len(word) - begin) // 4 * 4].replace("+", "-").replace("/", "_")
            forms.append(base64.urlsafe_b64decode(part).decode("latin-1"))
        forms += [bytes.fromhex(word[:len(word) // 2 * 2]).decode("latin-1")] if re.fullmatch("[0-9a-fA-F]+", word) else []
    return forms


def leaks(text, key):
    """Twelve letters of the key, from its begin, middle or end, in any form."""
    pieces = {piece.lower() for piece in (key[:12], key[12:24], key[-12:], key.replace("\\", "")[12:24])}
    return [piece for form in map(str.lower, written_out(text)) for piece in pieces if piece in form]


def all_text(folder):
    return "\n".join(file.read_bytes().decode("latin-1") for file in sorted(folder.rglob("*")) if file.is_file())


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Argv of an evaluation of three questions, which two servers may be asked about; and their predictions."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(client, "Service", functools.partial(client.Service, backoff=0.0001, retries=1))
    rows = [{"id": i, "image": str(image), "answer_type": kind, "conversations": [
        {"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": answer}]}
        for i, (image, kind, answer) in enumerate(zip(IMAGES, ("OPEN", "OPEN", "CLOSED"), ("lung", "heart", "yes"), strict=True))]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question_id": i, "text": "yes"}) + "\n" for i in range(3)))
    return ["--config", "configs/eval/llava_med.py", f"--config.data.root={tmp_path / 'test.json'}", "--workdir", str(tmp_path / "out")]


NAMES = list(places(KEY, ""))


def test_there_are_many_places():
    assert len(NAMES) > 60


def key_of(name):
    return PLAIN if "host of its name" in name else KEY


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_key_is_in_nothing_that_the_client_hands_on(name, capsys):
    """Replies, errors and notices: all that an evaluation or a judge ever sees of a server."""
    key, question = key_of(name), [{"role": "user", "content": "What is it?"}]
    with OpenAiServer(lambda body: places(key, server.origin)[name]) as server:
        service = client.Service(server.url, "tiny", api_key=key, retries=1, backoff=0.0001)
        try:
            found = [reply for _, reply in service.each(enumerate([question] * 3), max_tokens=16, temperature=0.0)]
        except UserError as error:  # one that ends all
            found = [error]
        assert server.log, "it was asked"
    assert found and all(isinstance(each, client.Reply | UserError) for each in found)
    told = [f"{each.text}\n{each.finish_reason}" if isinstance(each, client.Reply) else str(each) for each in found]
    assert not leaks("\n".join([*map(repr, found), *told, *service.again, *capsys.readouterr()]), key)


# One reply of each kind that the commands tell apart: an answer, an empty one, one that is cut, counts, a question that fails, a server
# that ends all, a retry, a connection that breaks, a reply that cannot be read.
KINDS = ["answer's middle", "finish_reason", "error of a filter", "answer, cut by its limit", "usage", "error as text", "error message",
         "redirect with a password", "Retry-After", "status line that is none", "half of JSON", "header"]


@pytest.mark.parametrize("name", KINDS)
def test_a_planted_key_is_found_nowhere(name, asked, tmp_path, monkeypatch, capsys):
    key = key_of(name)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with OpenAiServer(lambda body: places(key, server.origin)[name]) as server:
        words = [["--endpoint", server.url, "--model", "tiny"],
                 ["--predictions", str(tmp_path / "p.jsonl"), f"--config.judge.endpoint={server.url}", "--config.judge.model=tiny",
                  "--config.judge.retries=1"]]
        for workdir, more in zip(("out", "judged"), words, strict=True):
            status = cli.main([*asked[:-1], str(tmp_path / workdir), *more])
            said = "".join(capsys.readouterr())
            assert status in (0, 1) and "Traceback" not in said and (status == 0 or "error: " in said), said
            assert not leaks(said + all_text(tmp_path), key)
            assert server.log, "it was asked"
    for file in tmp_path.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            json.loads(line)


def test_the_test_sees_a_leak():
    for name, said in places(KEY, "").items():
        text = json.dumps(said) if isinstance(said, dict) else b"".join(said.pieces).decode("latin-1")
        if "packed" not in name and "in parts" not in name:
            assert leaks(text, key_of(name)), name
    assert not leaks("An answer without it, sk-Zx9+q and nothing more; aGVsbG8gd29ybGQsIGhlbGxvIHdvcmxk", KEY)


def test_an_answer_with_the_key_s_text_has_a_mark_in_its_place(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAiServer(lambda body: f"It is {KEY}, and {KEY.upper()}.") as server:
        assert cli.main([*asked, "--endpoint", server.url, "--model", "tiny"]) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} == {"It is [key], and [key]."}


def test_what_is_no_key_stays():
    secrets = Secrets(["sk-proj-0123456789", "EMPTY"])
    for text in ("sk-proj-0123456 is not much of it", "an EMPTY field, sk-proj-", "50 % of \\u0073k & 100%25", ""):
        assert secrets.clean(text) == text
    assert secrets.clean_message("sk-proj-0123 was cut, EMPTY, EMPTYHAND sk-") == "[key] was cut, [key], EMPTYHAND sk-"
    assert Secrets([]).clean_message("sk-x") == Secrets([""]).clean_message("sk-x") == "sk-x"
    assert secrets.clean("a sk-proj-0123456789b SK-PROJ-0123456789") == "a [key]b [key]"
    twice = Secrets(["0123456789", "0123456789abc"])
    assert secrets.clean("It is sk-proj-01234567") == "It is [key]", "an answer that its limit of tokens has cut"
    assert twice.clean("0123456789abc 0123456789ab") == "[key] [key]ab", "the longer one first"
    assert secrets.clean("It is SK-PROJ-01234567") == "It is [key]", "cut, and in other letters"
    begins_twice = Secrets(["abababab0123456789"])
    for text in ("ababababab0123456789", "ababababab01234567", "ababababab%30123456789"):
        assert begins_twice.clean(text) == "ab[key]", "what looks like its start may lie over its start"
    odd = "~~~???>>>~~~???>>>"
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in (b"", b"x", b"xy"):
            text = encode(before + odd.encode() + b"yx").decode()
            assert set("+/-_") & set(text) and "[key]" in Secrets([odd]).clean(text), (encode, before)


def test_no_log_of_a_library_has_it_either(asked, tmp_path):
    """Everything that httpx, its core and openai have to say, at the finest."""
    code = ("import logging, sys\nlogging.basicConfig(level=logging.DEBUG)\nfrom llavamed_jax.cli.eval import main\nsys.exit(main())")
    answer = Raw.response(json.dumps(completion({"content": KEY}, KEY)).encode(), f"200 {KEY}", {"X-Key": KEY, "Set-Cookie": f"a={KEY}"})
    with OpenAiServer(lambda body: Raw(list(answer.pieces)) if not server.log[1:] else says(KEY, f"400 {KEY}")) as server:
        url = f"{server.url}?api_key={quote(KEY)}"
        done = subprocess.run([sys.executable, "-c", code, *asked, "--endpoint", url, "--model", "tiny"], cwd=ROOT, capture_output=True,
                              text=True, timeout=120, env={"OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug", "PATH": ""})
    assert "X-Key" in done.stderr and "HTTP Request: POST" in done.stderr and done.returncode == 1
    assert not leaks(done.stdout + done.stderr, KEY)


# --- addresses ---


@pytest.mark.parametrize("url", [
    "http://user:PASSWORD-1@HOST/v1", "http://:PASSWORD-1@HOST", "http://PASSWORD-1@HOST/v1", "user:PASSWORD-1@HOST",
    "https:/u:PASSWORD-1@HOST", "http://u:PASS/WORD-1@HOST", "http://u:PASS?WORD-1@HOST", "http://u:PASS#WORD-1@HOST",
    "http://u:PASS@WORD-1@HOST", "ftp://u:PASSWORD-1@HOST",
    "http://HOST:port/v1?key=PASSWORD-1", "HOST?key=PASSWORD-1", "http://HOST/v1?key=PASSWORD-1#x", "http://HOST/v1?key=PASSWORD-1 2"])
@pytest.mark.parametrize("flag", ["--endpoint", "judge"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url, flag, asked, tmp_path, capsys):
    words = ["--endpoint", url, "--model", "m"] if flag == "--endpoint" else [
        "--predictions", str(tmp_path / "p.jsonl"), f"--config.judge.endpoint={url}", "--config.judge.model=m"]
    assert cli.main([*asked, *words]) == 2
    said = "".join(capsys.readouterr())
    assert "is not valid" in said and "was expected" in said and "WORD" not in said and "PASS" not in said and "HOST" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("url", "reason"), [
    ("http://h/v\x001", r"it contains the character \x00;"), ("http://h\n/v1", r"\n;"), ("http://h/\x1b[31m", r"\x1b;"),
    ("http://h\u202e/v1", r"\u202e;"), ("http://h/v1\udcff", r"\udcff;"), ("http://h/a b", "it contains a space"), ("http://h\t/v1", r"\t;"),
    ("http://h/v1#top", "it contains a fragment"), ("http://" + "h" * 2000, "it has 2007 characters"),
    ("http://a..b/v1", "is not valid; http"),
    (f"http://{'a' * 64}.b/v1", "is not valid; http"), ("http://[::1/v1", "is not valid"),
    ("http://h:99999/v1", "is not valid"), ("http://h:0", "is not valid"),
    ("http:///v1", "is not valid"), ("\u00a0http://h\u00a0/v1", r"\xa0;")])
def test_addresses_that_are_none(url, reason, asked, capsys):
    with pytest.raises(UsageError) as error:
        read_address(url)
    assert reason in str(error.value) and "\n" not in str(error.value)
    if "\0" not in url:
        assert cli.main([*asked, "--endpoint", url, "--model", "m"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_query_goes_with_every_request_and_its_values_are_not_shown(asked, tmp_path, capsys):
    """`?api_key=` of some gateways, `?deployment=` of others: sent to the letter, beside Azure's own."""
    with OpenAiServer(lambda body: "it is TOKEN-0123456789 or east-us") as server:
        query = "region=east-us&api_key=TOKEN%2D0123456789&flag&empty=&a=1&a=2"
        assert cli.main([*asked, "--endpoint", f"{server.url}?{query}", "--model", "tiny"]) == 0
        assert {each.path for each in server.log} == {f"/v1/chat/completions?{query}"} and len(server.log) == 3
    said, files = "".join(capsys.readouterr()), all_text(tmp_path / "out")
    assert "TOKEN" not in said + files and "region=[hidden]&amp;api_key=[hidden]&amp;flag&amp;empty=&amp;a=[hidden]" in files
    assert '"it is [key] or east-us"' in files, "what has fewer than eight letters may be a word of an answer"
    with OpenAiServer(lambda body: "x") as server:
        for url in (f"{server.origin}?api-version=2024-10-21&code=c%20d", f"{server.origin}/openai?code=c%20d&api-version=2024-10-21"):
            found = client.Service(url, "tiny")
            next(found.each([(0, [{"role": "user", "content": "a"}])], max_tokens=1, temperature=0.0))
            assert server.log[-1].path == "/openai/deployments/tiny/chat/completions?api-version=2024-10-21&code=c%20d"
            assert found.url.endswith("?code=[hidden]")


def test_which_query_is_another_model():
    """Answers are taken over by an address whose key is another one, and by none that names another deployment."""
    one, key, other = (read_address(f"http://h/v1?deployment={name}&api_key={key}") for name, key in (("a", 1), ("a", 2), ("b", 1)))
    assert one.identity == key.identity != other.identity and "deployment" not in one.identity and one.shown == key.shown == other.shown
    assert read_address("http://h/v1?api_key=1").identity == read_address("http://h/v1").identity == ""
    assert shown("http://h?api-version=1&x=2#y") == "http://h?api-version=1&x=[hidden]"


def test_a_key_in_the_address_or_the_model_s_name_is_not_shown(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    with OpenAiServer(lambda body: "yes", models=["sk-0123456789"]) as server:
        assert cli.main([*asked, "--endpoint", server.url, "--model", "sk-0123456789"]) == 0
        assert cli.main([*asked, "--endpoint", f"{server.origin}/sk-0123456789", "--model", "m"]) == 1
    said = "".join(capsys.readouterr())
    assert "sk-0123456789" not in said + all_text(tmp_path / "out") and "/[key] (model 'm') answers 404" in said


def test_what_no_request_can_carry_is_one_sentence():
    with OpenAiServer(lambda body: "x") as server:
        found = client.Service(server.url, "tiny", retries=0)
        requests = enumerate([[{"role": "user", "content": text}] for text in ("a", "half \ud800", "b")])
        replies = dict(found.each(requests, max_tokens=1, temperature=0.0))
    assert replies[0].text == replies[2].text == "x" and type(replies[1]) is UserError
    assert "this request failed: UnicodeEncodeError" in str(replies[1])
