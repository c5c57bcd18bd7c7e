"""Classifies the replies of a server of OpenAI's protocol: complete replies, temporary and permanent failures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import openai

from llavamed_jax.errors import UserError
from llavamed_jax.openai_client.secrets import Secrets
from llavamed_jax.utils.retry_after import retry_after

_LONGEST_MESSAGE = 300  # characters of a server's message
_LONGEST_FINISH = 60  # characters of a finish_reason
_MOST_TOKENS = 10**7  # the most tokens that a server may count for one reply
_NOTHING_SECRET = Secrets(())
_MAY_PASS = (408, 409, 425, 429)  # and all from 500 on
_NEVER_PASS = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 that does not pass
_WITHHELD = ("content_filter", "content_policy_violation")  # codes of a 400 that stands for an empty answer
_TOO_LONG = re.compile(
    r"context[ _]length|context[ _]window|context[ _]size|max_model_len|maximum model length|"
    r"(?:prompt|input|messages?|request)\b.{0,40}\btoo (?:long|many tokens)|too many (?:input |prompt )?tokens|"
    r"longer than the maximum", re.I)  # of OpenAI, vLLM, llama.cpp, SGLang, TGI
_REASONING = ("reasoning_content", "reasoning")  # vLLM's keys, before and since its version 0.11
_ENDS_ALL = (401, 402, 404)  # for any request: an invalid key, no credit, an unknown model
_ENDS_ALL_AT_START = (403, 405)  # after the first reply they may concern one request


@dataclass(frozen=True)
class Reply:
    """A server's reply.

    Attributes:
      text: the text as the server gave it, without secrets.
      finish_reason: why the answer ended.
      prompt_tokens: tokens of the prompt as the server counted them; 0 if it does not say.
      completion_tokens: tokens of the reply as the server counted them; 0 if it does not say.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServiceError(UserError):
    """A server cannot be asked at all: it is not there, refuses the key, or does not know the model."""


class TooLongError(UserError):
    """A server refuses a request because its prompt is longer than the model takes."""


class PassingError(Exception):
    """A failure that may have passed when the same request is sent again.

    Args:
      kind: a few words by which failures are counted.
      reason: the end of a sentence.
      retry_after: seconds that the server asks to wait; None if it does not ask.
      is_billed: whether the server may have made a reply, which costs money.
      counts: tokens of prompt and reply, if the server counted them.
    """

    def __init__(self, kind: str, reason: str = "", retry_after: float | None = None, is_billed: bool = False,
                 counts: tuple[int, int] | None = None):
        super().__init__(reason or kind)
        self.kind, self.retry_after, self.is_billed, self.counts = kind, retry_after, is_billed, counts


class UnpaidError(UserError):
    """A request failed, and another attempt was due that the caller does not pay for."""


class BilledError(UserError):
    """A request failed for good, and the server may have made a reply."""


def read_reply(body: bytes, secrets: Secrets = _NOTHING_SECRET) -> Reply:
    """Returns the first choice of a chat completion, without secrets.

    Its text is the message's content, as a text or as a list of parts, else its refusal. The text may be empty if the
    server says so: a model can end at once. Absent content is an empty answer only if the token limit, a filter or
    reasoning explains it; with reasoning the `finish_reason` is `reasoning_only`.

    Args:
      body: the body of the response.
      secrets: texts to remove.

    Raises:
      PassingError: the reply is not JSON, or has no choice or no text.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError for thousands of brackets
        told = _cut(body.decode("utf-8", "replace"), secrets) or "it is empty"
        raise PassingError("no JSON", f"its reply is not JSON: {told}", is_billed=True) from None
    counts = _counts(data)
    billed = {"is_billed": True, "counts": counts if any(counts) else None}
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        told = server_message(data, secrets)
        raise PassingError("no choices", f"its reply has no choices: {told}" if told else "its reply has no choices",
                           **billed)
    message, finish = choices[0].get("message"), choices[0].get("finish_reason") or "stop"
    finish = _cut(finish if isinstance(finish, str) else _dumped(finish), secrets, _LONGEST_FINISH) or "stop"
    text = _text(message) if isinstance(message, dict) else None
    if text is None and finish in ("length", "content_filter"):
        text = ""
    if not text and isinstance(message, dict) and any(message.get(key) for key in _REASONING):
        text, finish = "", "reasoning_only" if finish == "stop" else finish
    if text is None:
        raise PassingError("no text", f"its reply has no text (finish_reason {finish})", **billed)
    return Reply(secrets.clean(text), finish, *counts)


def _counts(data: object) -> tuple[int, int]:
    """Returns the tokens of prompt and reply as the server counted them; 0 if it does not say."""
    usage = data.get("usage") if isinstance(data, dict) and isinstance(data.get("usage"), dict) else {}
    prompt, completion = (count if type(count) is int and 0 <= count < _MOST_TOKENS else 0
                          for count in (usage.get(name) for name in ("prompt_tokens", "completion_tokens")))
    return prompt, completion


def _text(message: Mapping) -> str | None:
    content = message.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        content = "".join(parts) if parts else None
    if isinstance(content, str) and content:
        return content
    refusal = message.get("refusal")
    return refusal if isinstance(refusal, str) and refusal else content if isinstance(content, str) else None


def status_error(error: openai.APIStatusError, where: str, is_start: bool,
                 secrets: Secrets = _NOTHING_SECRET) -> Exception:
    """Returns the exception that an HTTP status means, for one request or for all of them.

    Args:
      error: the client's exception.
      where: the server and the model, the subject of the sentence.
      is_start: whether no request has been answered yet.
      secrets: texts to remove.

    Returns:
      PassingError, ServiceError (no request can be answered), or, for this request, TooLongError or UserError.
    """
    status, told = error.status_code, server_message(error.body, secrets)
    name = f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)
    sentence = f"{name}: {told}" if told else name
    if error.code in _NEVER_PASS:
        return ServiceError(f"{where} answers {sentence}")
    if status in (400, 413, 422) and _TOO_LONG.search(f"{error.code or ''} {told}"):
        return TooLongError(f"{where} answers {sentence}")
    if status in _MAY_PASS or status >= 500:
        return PassingError(name, f"it answers {sentence}", retry_after(error.response.headers))
    ends_all = status in _ENDS_ALL or (is_start and status in _ENDS_ALL_AT_START)
    return (ServiceError if ends_all else UserError)(f"{where} answers {sentence}")


def withheld(status: int, code: object) -> Reply | None:
    """Returns the empty answer of a filter that refuses the request before the model sees it; None for other errors."""
    return Reply("", "content_filter") if status == 400 and code in _WITHHELD else None


def connection_error(error: BaseException, secrets: Secrets = _NOTHING_SECRET) -> tuple[str, bool]:
    """Says why a connection failed, and whether it never existed: no listener, unknown host or invalid certificate."""
    chain, is_absent = [error], False
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in reversed(chain):
        is_absent |= type(each).__name__ in ("ConnectError", "ConnectTimeout")  # of httpx2
    number = next((each.errno for each in reversed(chain) if isinstance(each, ConnectionError) and each.errno), None)
    if number is not None:
        return os.strerror(number), is_absent
    said = (_cut(str(getattr(each, "strerror", None) or each), secrets) for each in reversed(chain))
    return next(filter(None, said), "no reason is given"), is_absent


def refused_setting(error: openai.APIStatusError, sent: Collection[str]) -> str | None:
    """Returns the setting that the server refuses (`max_tokens`, `temperature`, `seed`); None for another error."""
    if error.status_code not in (400, 422):
        return None
    told = _dumped(error.body).lower()
    if "max_tokens" in sent and "max_completion_tokens" in told:  # otherwise the value may only be too high
        return "max_tokens"
    others = [name for name in sent if name not in ("max_tokens", "max_completion_tokens")]  # a limit is always sent
    if error.param:
        return error.param if error.param in others and "support" in told else None
    is_about_names = re.search(r"support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra", told)
    return next((name for name in others if is_about_names and re.search(rf"(?<![\w.]){name}(?!\w)", told)), None)


def server_message(body: object, secrets: Secrets = _NOTHING_SECRET) -> str:
    """Returns the message of an error's body in one line; empty if it has no readable one (a proxy's web page)."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping):
            inner = next((inner[key] for key in ("message", "detail", "msg") if inner.get(key)), None)
        return _cut(inner if isinstance(inner, str) else _dumped(inner) if inner else "", secrets)
    return "" if not isinstance(body, str) or body.lstrip().startswith("<") else _cut(body, secrets)


def _dumped(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:  # writing needs more levels of calls than reading did
        return "a value that is nested too deeply"


def _cut(text: str, secrets: Secrets, most: int = _LONGEST_MESSAGE) -> str:
    """Returns a text in one line, with secrets removed before it is cut: a cut key would not be recognised."""
    line = " ".join(secrets.clean_message(text).split()).rstrip(".")
    return line if len(line) <= most else line[:most] + "…"
