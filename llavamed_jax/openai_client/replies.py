"""What a server of OpenAI's protocol says: replies that are whole, failures that may pass, and failures that stay."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import openai

from llavamed_jax.errors import UserError
from llavamed_jax.openai_client.secrets import Secrets

_LONGEST_MESSAGE = 300  # characters of what a server says
_LONGEST_FINISH = 60  # of the word for why an answer ended
_MOST_TOKENS = 10**7  # that a server may count for one reply
_NOTHING_SECRET = Secrets(())
_MAY_PASS = (408, 409, 425, 429)  # and all from 500 on
_NEVER_PASS = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 that waiting does not mend
_WITHHELD = ("content_filter", "content_policy_violation")  # codes of a 400: the service answers, with nothing
_REASONING = ("reasoning_content", "reasoning")  # where vLLM puts it, before and since its version 0.11
_ENDS_ALL = (401, 402, 404)  # whatever is asked: a wrong key, nothing paid, no such model
_ENDS_ALL_AT_START = (403, 405)  # later they may be about one request


@dataclass(frozen=True)
class Reply:
    """`text` as the server gave it; its `finish_reason`; tokens as the server counted them, 0 where it says none."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServiceError(UserError):
    """Why nothing at all can be asked of a server: it is not there, refuses the key, or does not know the model."""


class PassingError(Exception):
    """A failure that may have passed when the same is asked again.

    Args:
      kind: a few words that failures are counted by.
      reason: the end of a sentence.
      retry_after: seconds that the server asks to wait.
    """

    def __init__(self, kind: str, reason: str = "", retry_after: float | None = None):
        super().__init__(reason or kind)
        self.kind, self.retry_after = kind, retry_after


def read_reply(body: bytes, secrets: Secrets = _NOTHING_SECRET) -> Reply:
    """The first choice of a chat completion, without what is secret.

    Its text is the message's content, as a text or as a list of parts; else its refusal. It may be empty where the server
    says so: a model can end at once. Content that is absent is an empty answer only where the limit of tokens, a filter
    or a text of reasoning explains it; the last is `reasoning_only` as its `finish_reason`.

    Raises:
      PassingError: a reply that is not JSON, without a choice, or without a text.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # the latter of thousands of brackets
        told = _cut(body.decode("utf-8", "replace"), secrets) or "it is empty"
        raise PassingError("no JSON", f"its reply is not JSON: {told}") from None
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        told = server_message(data, secrets)
        raise PassingError("no choices", f"its reply has no choices: {told}" if told else "its reply has no choices")
    message, finish = choices[0].get("message"), choices[0].get("finish_reason") or "stop"
    finish = _cut(finish if isinstance(finish, str) else _dumped(finish), secrets, _LONGEST_FINISH) or "stop"
    text = _text(message) if isinstance(message, dict) else None
    if text is None and finish in ("length", "content_filter"):
        text = ""
    if not text and isinstance(message, dict) and any(message.get(key) for key in _REASONING):
        text, finish = "", "reasoning_only" if finish == "stop" else finish
    if text is None:
        raise PassingError("no text", f"its reply has no text (finish_reason {finish})")
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    prompt, completion = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    counts = (count if type(count) is int and 0 <= count < _MOST_TOKENS else 0 for count in (prompt, completion))
    return Reply(secrets.clean(text), finish, *counts)


def _text(message: Mapping) -> str | None:
    content = message.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        content = "".join(parts) if parts else None
    if isinstance(content, str) and content:
        return content
    refusal = message.get("refusal")
    return refusal if isinstance(refusal, str) and refusal else content if isinstance(content, str) else None


def status_error(error: openai.APIStatusError, where: str, is_start: bool, secrets: Secrets = _NOTHING_SECRET) -> Exception:
    """An HTTP status as what it means for the request, or for all of them.

    Args:
      where: the server and the model, the subject of the sentence.
      is_start: nothing has been answered yet.

    Returns:
      PassingError, ServiceError (nothing more can be asked) or UserError (of this request).
    """
    status, told = error.status_code, server_message(error.body, secrets)
    name = f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)
    sentence = f"{name}: {told}" if told else name
    if error.code in _NEVER_PASS:
        return ServiceError(f"{where} answers {sentence}")
    if status in _MAY_PASS or status >= 500:
        return PassingError(name, f"it answers {sentence}", retry_after(error.response.headers))
    ends_all = status in _ENDS_ALL or (is_start and status in _ENDS_ALL_AT_START)
    return (ServiceError if ends_all else UserError)(f"{where} answers {sentence}")


def withheld(error: openai.APIStatusError) -> Reply | None:
    """The empty answer that a filter before the model gives by refusing the request; None where the status means something else."""
    return Reply("", "content_filter") if error.status_code == 400 and error.code in _WITHHELD else None


def connection_error(error: BaseException, secrets: Secrets = _NOTHING_SECRET) -> tuple[str, bool]:
    """Why a connection failed, and whether there never was one: nobody listens, no such name, a wrong certificate."""
    chain, is_absent = [error], False
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in reversed(chain):
        is_absent |= type(each).__name__ in ("ConnectError", "ConnectTimeout")  # httpx2's
    number = next((each.errno for each in reversed(chain) if isinstance(each, ConnectionError) and each.errno), None)
    if number is not None:
        return os.strerror(number), is_absent
    said = (_cut(str(getattr(each, "strerror", None) or each), secrets) for each in reversed(chain))
    return next(filter(None, said), "no reason is given"), is_absent


def refused_setting(error: openai.APIStatusError, sent: Collection[str]) -> str | None:
    """The setting of a request that the server does not take (`max_tokens`, `temperature`, `seed`); None where that is not why."""
    if error.status_code not in (400, 422):
        return None
    told = _dumped(error.body).lower()
    if "max_tokens" in sent and "max_completion_tokens" in told:  # else it may only be too high
        return "max_tokens"
    others = [name for name in sent if name != "max_tokens"]
    if error.param:
        return error.param if error.param in others and "support" in told else None
    is_about_names = re.search(r"support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra", told)
    return next((name for name in others if is_about_names and re.search(rf"(?<![\w.]){name}(?!\w)", told)), None)


def server_message(body: object, secrets: Secrets = _NOTHING_SECRET) -> str:
    """What the body of an error says, in one line; empty where it says nothing readable (a web page of a proxy)."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping):
            inner = next((inner[key] for key in ("message", "detail", "msg") if inner.get(key)), None)
        return _cut(inner if isinstance(inner, str) else _dumped(inner) if inner else "", secrets)
    return "" if not isinstance(body, str) or body.lstrip().startswith("<") else _cut(body, secrets)


def _dumped(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:  # it was read from fewer levels of calls
        return "a value that is nested too deeply"


def _cut(text: str, secrets: Secrets, most: int = _LONGEST_MESSAGE) -> str:
    """A text in one line, without what is secret, and then cut: a key that a cut goes through would not be found."""
    line = " ".join(secrets.clean_message(text).split()).rstrip(".")
    return line if len(line) <= most else line[:most] + "…"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` as seconds or as a date."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / scale
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
