"""Requests as other programs send them, replayed: each gets what its sender reads from the reply.

Recorded from lmms-eval and VLMEvalKit, and written after the senders' code: the bodies of both, and of EvalScope, Open WebUI and
LibreChat, with our model's name.
"""

import base64
import json
import urllib.request
from pathlib import Path

import pytest

from tests.support.server import picture

FOLDER = Path(__file__).parent / "recorded"
RECORDED = [(file.stem, number, request) for file in sorted(FOLDER.glob("*.json"))
            for number, request in enumerate(json.loads(file.read_text(encoding="utf-8"))["requests"])]


def with_images(text):
    for kind in ("PNG", "JPEG", "WEBP"):
        text = text.replace(f"${kind}", base64.b64encode(picture(1, kind)).decode())
    return text


def ask(server, request, **more):
    body = request.get("body") and json.loads(with_images(json.dumps(request["body"]))) | more
    headers = {"Content-Type": "application/json", **request.get("headers", {})}
    asked = urllib.request.Request(server.origin + request["path"], body and json.dumps(body).encode(), headers, method=request["method"])
    with urllib.request.urlopen(asked, timeout=600) as reply:
        return reply.status, reply.headers["Content-Type"], reply.read().decode()


def events(text):
    """What a stream carries, read as VLMEvalKit reads it: lines that begin with `data: `, up to `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]" and text.endswith("\n\n")
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("client, number, request_", RECORDED, ids=[f"{name} {number}" for name, number, _ in RECORDED])
def test_a_recorded_request_is_answered_as_its_sender_expects(server, client, number, request_):
    body = request_.get("body", {})
    key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    more = {key: 16} if "messages" in body and body.get(key, 99) > 16 else {}  # a random model's answer does not end
    status, kind, text = ask(server, request_, **more)
    assert status == 200
    if request_["method"] == "GET":
        assert [each["id"] for each in json.loads(text)["data"]] == ["served", "alias"]
    elif request_["path"].endswith("/responses"):
        kinds = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
        assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    elif body.get("stream"):
        assert kind.startswith("text/event-stream")
        found = events(text)
        wants_usage = body.get("stream_options", {}).get("include_usage", False)
        choices = [each["choices"][0] for each in found if each["choices"]]
        assert choices[0]["delta"]["role"] == "assistant" and choices[-1]["finish_reason"] in ("stop", "length")
        assert "".join(choice["delta"].get("content") or "" for choice in choices)
        assert (found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] > 0) is wants_usage
    else:
        reply = json.loads(text)
        assert isinstance(reply["choices"][0]["message"]["content"].strip(), str) and reply["usage"]["completion_tokens"] > 0
        assert reply["object"] == "chat.completion" and reply["model"] == "served" and reply["id"].startswith("chatcmpl-")
