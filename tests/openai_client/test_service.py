"""A server of OpenAI's protocol as it is asked: what is asked again, what fails at once, what is never asked twice."""

import asyncio
import contextlib
import itertools
import json
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import openai
import pytest

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.openai_client import replies
from llavamed_jax.openai_client.address import read_address
from llavamed_jax.openai_client.client import Service, ServiceError
from llavamed_jax.utils import signals
from llavamed_jax.utils.retry_after import retry_after
from tests.support.openai_server import FAULTS, OpenAiServer, Raw

SETTINGS = {"max_tokens": 16, "temperature": 0.0}


def chat(text):
    return [{"role": "user", "content": text}]


def ask(service, texts, **settings):
    with contextlib.closing(service.each(enumerate(map(chat, texts)), **SETTINGS | settings)) as found:
        return dict(found)


def reverse(body):
    return body["messages"][0]["content"][::-1]


def refusing(status, body):
    """What the client raises on a status."""
    headers = SimpleNamespace(get=lambda name, default=None: default)
    response = SimpleNamespace(request=None, status_code=status, headers=headers)
    return openai.APIStatusError("", response=response, body=body)


def test_every_fault_is_asked_again_and_nothing_else(capfd):
    texts = [f"question {i}" for i in range(100)]
    with OpenAiServer(reverse, fault_rate=0.3, slow=60, seed=723) as server:
        service = Service(server.url, "tiny", timeout=2, backoff=0.01, concurrency=6)
        found = ask(service, texts)
    assert {i: reply.text for i, reply in found.items()} == {i: text[::-1] for i, text in enumerate(texts)}
    faults = server.faults_met()
    assert set(faults) == set(FAULTS), "the test must meet each kind"
    assert len(server.log) == len(texts) + faults.total() == service.requests, "one more request for each failure, and no other"
    assert not server.asked_without_need()
    assert service.again == Counter({
        "429 Too Many Requests": faults["429"] + faults["429 with Retry-After"], "500 Internal Server Error": faults["500"],
        "no reply in time": faults["slow"], "no JSON": faults["malformed"], "no choices": faults["empty choices"],
        "connection lost": faults["dropped"] + faults["dropped midway"]})
    assert server.most_at_once <= 6 + faults["slow"], "a slow request is still under way there when it has been given up here"
    assert (service.prompt_tokens, service.completion_tokens) == (7 * 100, 2 * 100)
    assert capfd.readouterr().err.count("such requests are retried") == 6, "each kind is said once"


def test_requests_are_bounded_and_read_only_so_far_ahead():
    read = []

    def requests():
        for i in range(60):
            read.append(i)
            yield i, chat(str(i))

    with OpenAiServer(reverse, delay=0.02) as server:
        service = Service(server.url, "tiny", concurrency=5)
        taken = 0
        for _ in service.each(requests(), **SETTINGS):
            taken += 1
            assert len(read) <= taken + 2 * 5
    assert taken == 60 and server.most_at_once == 5


def test_retry_after_is_kept_to():
    with OpenAiServer(reverse, fault_rate=1.0, faults=["429 with Retry-After"], retry_after=0.2) as server:
        begun = time.monotonic()
        found = ask(Service(server.url, "tiny", retries=1, backoff=0.001), ["a"])
        assert time.monotonic() - begun > 0.2
        assert "was asked 2 times without success; last: it answers 429 Too Many Requests: Rate limit reached" in str(found[0])
        server.retry_after = 3600
        with pytest.raises(ServiceError, match="asks to wait 3600 s"):
            ask(Service(server.url, "tiny"), ["a"])


@pytest.mark.parametrize(("headers", "seconds"), [
    ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after": "2"}, 2), ({"retry-after": "soon"}, None),
    ({"retry-after": "-1"}, None), ({"retry-after": "nan"}, None), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0), ({}, None)])
def test_forms_of_retry_after(headers, seconds):
    assert retry_after(headers) == seconds


def test_the_wait_doubles_and_is_bounded(monkeypatch):
    waits, pause = [], asyncio.sleep

    async def sleep(seconds):
        if seconds >= 0.1:  # not what the end of a call waits for
            waits.append(seconds)
        await pause(0)

    monkeypatch.setattr("llavamed_jax.openai_client.client.asyncio.sleep", sleep)
    with OpenAiServer(reverse, fault_rate=1.0, faults=["500"]) as server:
        found = ask(Service(server.url, "tiny", backoff=0.5, retries=9), ["a"])
    assert isinstance(found[0], UserError) and len(server.log) == 10
    wanted = [0.5 * min(2**n, 64) for n in range(9)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, wanted, strict=True))


def test_what_cannot_pass_is_asked_once():
    """A request that is refused for itself fails alone; a wrong key or model ends all; the key is not repeated."""
    def answer(body):
        return {"choices": [], "error": {"message": "overloaded"}} if reverse(body) == "x" else reverse(body)

    with OpenAiServer(answer, key="sk-the-right-one") as server:
        with pytest.raises(ServiceError, match=r"model 'tiny'\) answers 401 Unauthorized: Incorrect API key provided: \[key\]$"):
            ask(Service(server.url, "tiny", api_key="sk-the-wrong-one"), ["a"] * 20)
        with pytest.raises(ServiceError, match="answers 404 Not Found: The model `huge` does not exist"):
            ask(Service(server.url, "huge", api_key="sk-the-right-one"), ["a"] * 20)
        assert server.log == [] and server.refused == 2, "the first request goes alone"
        found = ask(Service(server.url, "tiny", api_key="sk-the-right-one", retries=1, backoff=0), ["a", "x"])
        assert found[0].text == "a" and str(found[1]).endswith("its reply has no choices: overloaded")


def test_a_filter_that_refuses_a_request_is_an_empty_answer():
    """Azure's answers 400; the model of that address has no answer to give, however often it is asked."""
    with OpenAiServer(reverse, refuses=("messages",)) as server:
        server.refusal = {"message": "The response was filtered due to the prompt", "code": "content_filter", "param": "prompt"}
        assert ask(Service(server.url, "tiny"), ["a"]) == {0: replies.Reply("", "content_filter")}
        server.refusal = {"message": "The prompt is too long.", "code": "context_length_exceeded", "param": "messages"}
        assert str(ask(Service(server.url, "tiny"), ["a"])[0]).endswith("(model 'tiny') answers 400 Bad Request: The prompt is too long")


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    with OpenAiServer(reverse, key="sk-of-the-environment") as server:
        assert ask(Service(server.url, "tiny"), ["ab"])[0].text == "ba"
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", "sk-of-azure")
        server.key = "sk-of-azure"
        assert ask(Service(server.origin, "tiny", azure_version="2024-10-21"), ["ab"])[0].text == "ba"
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(UsageError, match="the API key in OPENAI_API_KEY is invalid; letters") as caught:
        Service("http://x/v1", "m")
    assert "two words" not in str(caught.value)


def test_a_server_that_is_not_there():
    for url, reason in (("http://127.0.0.1:1", "Connection refused"), ("http://nowhere.invalid/v1", "")):
        begun = time.monotonic()
        with pytest.raises(ServiceError, match=rf"^{url}.*cannot be reached: {reason}"):
            ask(Service(url, "m"), ["a"] * 50)
        assert time.monotonic() - begun < 30, "it is not tried again and again"


def test_a_server_that_goes_away_is_waited_for_and_then_given_up():
    texts = [str(i) for i in range(100)]
    with OpenAiServer(reverse) as server:
        service = Service(server.url, "tiny", retries=2, backoff=0.01)
        found = service.each(enumerate(map(chat, texts)), **SETTINGS)
        assert next(found)[1].text is not None
        server.fault_rate, server.faults = 1.0, ("dropped",)
        with pytest.raises(ServiceError, match="16 requests in a row have failed; the last: .* was asked 3 times without success; last: the connection"):
            list(found)
        server.fault_rate = 0.0
        assert len(ask(service, texts)) == 100, "a reply begins the count anew"


@pytest.mark.parametrize(("url", "found"), [
    ("http://h:8000", {"base_url": "http://h:8000/v1"}), ("http://h:8000/", {"base_url": "http://h:8000/v1"}),
    ("https://h/api/v1/", {"base_url": "https://h/api/v1"}), ("https://h/v1/chat/completions", {"base_url": "https://h/v1"}),
    ("https://n.openai.azure.com/openai/v1/", {"base_url": "https://n.openai.azure.com/openai/v1"}),
    ("https://n.openai.azure.com/?api-version=2024-10-21", {"azure_endpoint": "https://n.openai.azure.com", "api_version": "2024-10-21"}),
    ("https://n.openai.azure.com/openai/deployments/d/chat/completions?api-version=v",
     {"azure_endpoint": "https://n.openai.azure.com", "api_version": "v", "azure_deployment": "d"})])
def test_addresses(url, found):
    assert read_address(url).options == found


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h/v1", "http://", "http://h:port/v1", "http://user:secret@h/v1"])
def test_what_is_no_address(url):
    with pytest.raises(UsageError, match="http://HOST:PORT/v1"):
        Service(url, "m")


def test_azure_names_the_deployment_in_the_path():
    with OpenAiServer(reverse, key="sk-right-one") as server:
        for url in (server.origin + "?api-version=2024-10-21",
                    server.origin + "/openai/deployments/tiny/chat/completions?api-version=2024-10-21"):
            assert ask(Service(url, "tiny", api_key="sk-right-one"), ["ab"])[0].text == "ba"
            assert server.log[-1].path == "/openai/deployments/tiny/chat/completions?api-version=2024-10-21"


def test_settings_reach_the_server_under_the_names_that_it_takes(capfd):
    with OpenAiServer(reverse) as server:
        ask(Service(server.url, "tiny"), ["a"], temperature=0.5, seed=3)
        sent = server.log[-1].body
        assert (sent["max_tokens"], sent["temperature"], sent["seed"], sent["model"]) == (16, 0.5, 3, "tiny")
        ask(Service(server.url, "tiny"), ["a", "b"], seed=lambda number: 10 + number)
        assert {each.body["messages"][0]["content"]: each.body["seed"] for each in server.log[-2:]} == {"a": 10, "b": 11}
        ask(Service(server.url, "tiny"), ["a"])
        assert set(server.log[-1].body) == {"model", "messages", "max_tokens", "temperature"}
    assert capfd.readouterr().err == ""
    with OpenAiServer(reverse, refuses=("max_tokens", "temperature", "seed")) as server:
        service = Service(server.url, "tiny")
        assert len(ask(service, ["a", "b", "c"], seed=3)) == 3
        assert all(set(each.body) == {"model", "messages", "max_completion_tokens"} for each in server.log) and len(server.log) == 3
        assert service.not_taken == ["temperature", "seed"]
    assert capfd.readouterr().err.count("does not accept") == 2


@pytest.mark.parametrize("param", ["max_completion_tokens", None])
def test_a_limit_that_is_too_high_under_its_newer_name_ends_the_request(param):
    """The sentence holds "supports", as that about a setting which is not taken does."""
    too_large = "max_completion_tokens is too large: 16. This model supports at most 8 completion tokens"

    def answer(body):
        error = {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}
        if "max_tokens" not in body:
            error = {"message": too_large, "param": param} if len(server.log) < 9 else {"message": "asked again and again"}
        return Raw.response(json.dumps({"error": error}).encode(), "400 Bad Request")

    with OpenAiServer(answer) as server:
        service = Service(server.url, "tiny")
        assert [str(error) for error in ask(service, ["a", "b"]).values()] == [f"{service.where} answers 400 Bad Request: {too_large}"] * 2
    assert len(server.log) == 3 and service.not_taken == []


@pytest.mark.parametrize(("status", "body", "name"), [
    (400, {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}, "max_tokens"),
    (400, {"message": "max_tokens is too large: 99999. This model supports at most 4096", "param": "max_tokens"}, None),
    (400, {"message": "'temperature' does not support 0, only the default (1) is supported", "param": "temperature"}, "temperature"),
    (400, {"message": "temperature: at most 1 was expected", "param": "temperature"}, None),
    (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, "seed"),
    (400, {"message": "this model does not support images"}, None), (500, {"message": "seed is not supported"}, None)])
def test_which_setting_is_refused(status, body, name):
    assert replies.refused_setting(refusing(status, body), ["max_tokens", "temperature", "seed"]) == name


@pytest.mark.parametrize(("status", "code", "is_start", "kind"), [
    (400, None, True, UserError), (401, None, False, ServiceError), (402, None, False, ServiceError), (404, None, False, ServiceError),
    (403, None, True, ServiceError), (403, None, False, UserError), (422, None, True, UserError), (413, None, True, UserError),
    (429, None, True, replies.PassingError), (429, "insufficient_quota", True, ServiceError), (408, None, True, replies.PassingError),
    (503, None, True, replies.PassingError), (529, None, True, replies.PassingError)])
def test_what_a_status_means(status, code, is_start, kind):
    assert type(replies.status_error(refusing(status, {"message": "why", "code": code}), "it", is_start)) is kind


@pytest.mark.parametrize(("body", "found"), [
    ({"message": "why.", "code": 1}, "why"), ({"error": "model\nnot  found"}, "model not found"), ("plain", "plain"),
    ("<html>502</html>", ""), (None, ""), ([1], ""), ({"detail": [{"msg": "x"}]}, '[{"msg": "x"}]'), ({}, "")])
def test_what_a_server_says_of_an_error(body, found):
    assert replies.server_message(body) == found


def reply(message, finish="stop", **more):
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], **more}).encode()


@pytest.mark.parametrize(("body", "text", "finish"), [
    (reply({"content": "a"}), "a", "stop"), (reply({"content": ""}), "", "stop"), (reply({"content": None}, "length"), "", "length"),
    (reply({}, "content_filter"), "", "content_filter"), (reply({"content": None, "refusal": "I cannot."}), "I cannot.", "stop"),
    (reply({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}), "ab", "stop"),
    (reply({"content": "a"}, None, usage=None), "a", "stop"),
    # vLLM's issues 30139 and 45736: its parser takes all of the text for reasoning. Asking again would change nothing.
    (reply({"content": None, "reasoning_content": "I think yes"}), "", "reasoning_only"),
    (reply({"content": "", "reasoning": "I think yes"}), "", "reasoning_only"),
    (reply({"content": None, "reasoning": "I thi"}, "length"), "", "length"),
    (reply({"content": "yes", "reasoning_content": "I think yes"}), "yes", "stop"),
    (reply({"content": "", "reasoning_content": None}), "", "stop")])
def test_replies_with_a_text(body, text, finish):
    assert replies.read_reply(body) == replies.Reply(text, finish)


@pytest.mark.parametrize("body", [
    b"", b"ok", b"[]", b"null", b"\xff", b'{"choices": null}', b'{"choices": [7]}', b'{"choices": [{}]}', b'{"choices": "text"}',
    reply({"content": None}), reply({"content": None, "reasoning_content": ""}),
    reply({"content": 7}), reply({"content": []}), reply("text")])
def test_replies_that_are_none(body):
    with pytest.raises(replies.PassingError, match="its reply"):
        replies.read_reply(body)


def test_closing_cancels_what_is_under_way():
    """A signal in the middle of it: eight requests wait for a reply, and end with it."""
    sent_at = []

    def answer(body):
        if len(server.log) == 1 + 8 and not sent_at:
            sent_at.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        server.stopping.wait(0 if len(server.log) == 1 else 120)
        return "x"

    earlier = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with OpenAiServer(answer) as server:
            requests = zip(itertools.count(), itertools.repeat(chat("a")))
            with pytest.raises(KeyboardInterrupt), contextlib.closing(Service(server.url, "tiny").each(requests, **SETTINGS)) as found:
                assert next(found)[1].text == "x"
                next(found)
            assert time.monotonic() - sent_at[0] < 10 and len(server.log) == 1 + 8
    finally:
        signal.signal(signal.SIGALRM, earlier)


def test_a_wait_ends_although_a_signal_was_handled_in_it(slow_signal):
    with OpenAiServer(lambda body: server.stopping.wait(120) or "x") as server, signals.listening(signals.Phase("", grace=None, raises=True)):
        threading.Timer(0.7, signals.ask, ["no more"]).start()
        begun = time.monotonic()
        with pytest.raises(signals.Stopped, match="no more"):
            ask(Service(server.url, "tiny"), ["a"])
        assert time.monotonic() - begun < 30


def test_an_error_of_the_requests_themselves_is_raised():
    def requests():
        yield 0, chat("a")
        raise ZeroDivisionError

    with OpenAiServer(reverse) as server, pytest.raises(ZeroDivisionError):
        list(Service(server.url, "tiny").each(requests(), **SETTINGS))


def test_numbers_that_cannot_be_used():
    for wrong in ({"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}, {"backoff": -1}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} is .* was expected"):
            Service("http://h", "m", **wrong)
    with pytest.raises(UsageError, match="name is empty"):
        Service("http://h", "")
