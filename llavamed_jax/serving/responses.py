"""`/v1/responses`, without a memory: every request carries its whole conversation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from llavamed_jax.errors import short
from llavamed_jax.generation.programs import ALTERNATIVES
from llavamed_jax.serving import schema
from llavamed_jax.serving.chat_completions import logprob_list
from llavamed_jax.serving.content import Message, read_messages
from llavamed_jax.serving.errors import ApiError, invalid
from llavamed_jax.serving.schema import ChatRequest
from llavamed_jax.serving.service import Answer, Service

_LOGPROBS = "message.output_text.logprobs"
_NO_MEMORY = "this server keeps nothing between requests; send the whole conversation as input"
# Keys that ask for something that is not done, each with its values without effect.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "store": (False,), "previous_response_id": (), "conversation": (), "background": (False,), "prompt": (),
    "tool_choice": ("none", "auto"), "truncation": ("disabled",), "max_tool_calls": (), "frequency_penalty": (0,),
    "presence_penalty": (0,), "stop": ([],), "max_tokens": (), "max_completion_tokens": (),
}
_MOST_METADATA, _METADATA_LENGTHS = 16, (64, 512)
_STATEFUL = ("store", "previous_response_id", "conversation", "background")
_KNOWN = {"input", "instructions", "model", "stream", "max_output_tokens", "temperature", "top_p", "top_k", "seed",
          "include", "top_logprobs", "text", *_WITHOUT_EFFECT}


def read(body, service: Service) -> ChatRequest:
    """Reads a request as one of chat: `instructions` are the system's text, `input` a text or a list of messages.

    Args:
      body: the JSON value.
      service: the service, for its settings.

    Returns:
      The request; what the response repeats is in `echo`.

    Raises:
      ApiError: 400, with the key that is wrong.
    """
    if not isinstance(body, Mapping):
        raise invalid(f"the body is {short(body)}; a JSON object was expected")
    for key, allowed in _WITHOUT_EFFECT.items():
        value = body.get(key)
        if value is not None and value not in allowed:
            raise invalid(f"{key} is {short(value)}, which this server does not support"
                          + (f": {_NO_MEMORY}" if key in _STATEFUL else ""), key, "unsupported_parameter")
    schema.check_without_effect(body)
    _check_text(body.get("text"))
    model, instructions = body.get("model"), body.get("instructions")
    for key, value in (("model", model), ("instructions", instructions)):
        if value is not None and not isinstance(value, str):
            raise invalid(f"{key} is {short(value)}; a text was expected", key)
    if instructions and not _is_unicode(instructions):
        raise invalid(f"instructions are {short(instructions)}, which is not Unicode; a text was expected",
                      "instructions")
    messages = _messages(body.get("input"))
    read = read_messages(messages, "input")
    if instructions:  # stand before a system message of the input, as in OpenAI's service
        rest = read[1:] if read[0].role == "system" else read
        first, *more = read[0].parts if read[0].role == "system" and read[0].parts else [""]
        read = [Message("system", [f"{instructions}\n\n{first}" if first else instructions, *more]), *rest]
    settings = schema.settings(body, service.defaults, schema.whole(body, "max_output_tokens", 1),
                               service.limits.max_new_tokens, alternatives=_alternatives(body))
    echo = {"instructions": instructions, "max_output_tokens": body.get("max_output_tokens"),
            "temperature": settings.temperature, "top_p": settings.top_p,
            "metadata": _metadata(body.get("metadata"))}
    return ChatRequest(read, settings, model, schema.flag(body, "stream"),
                       ignored=tuple(sorted(set(map(str, body)) - _KNOWN)), echo=echo)


def _metadata(given) -> dict[str, str]:
    """Returns what the response repeats, within the limits of OpenAI's service."""
    if given is None:
        return {}
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, None)]
    is_right = all(isinstance(text, str) and len(text) <= most and _is_unicode(text)
                   for pair in pairs for text, most in zip(pair, _METADATA_LENGTHS))
    if not is_right or len(pairs) > _MOST_METADATA:
        raise invalid(f"metadata is {short(given)}; an object of at most {_MOST_METADATA} texts of at most "
                      f"{_METADATA_LENGTHS[1]} characters, under keys of at most {_METADATA_LENGTHS[0]}, was expected",
                      "metadata")
    return dict(pairs)


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair, which JSON can escape and UTF-8 cannot write, stands in it."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


def _messages(given) -> list:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not given:
        raise invalid(f"input is {short(given)}; a text or a list of messages was expected", "input")
    for i, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind not in ("message", "reasoning"):
            raise invalid(f"input[{i}] is of type {short(kind)}; a message was expected", f"input[{i}]",
                          "unsupported_content_type")
    messages = [item for item in given if item.get("type") != "reasoning"]
    if not messages:
        raise invalid("input has no message; at least one was expected", "input")
    return messages


def _check_text(text) -> None:
    form = text.get("format") if isinstance(text, Mapping) else text
    kind = form.get("type", "text") if isinstance(form, Mapping) else form
    if kind not in (None, "text"):
        raise invalid(f"text.format is {short(kind)}, which this server does not support; text was expected",
                      "text.format", "unsupported_parameter")


def _alternatives(body: Mapping) -> int | None:
    include = body.get("include") or []
    if not isinstance(include, Sequence) or isinstance(include, str):
        raise invalid(f"include is {short(include)}; a list was expected", "include")
    number = schema.whole(body, "top_logprobs", 0, ALTERNATIVES)
    return number or 0 if _LOGPROBS in include or number else None


async def complete(answer: Answer, chat: ChatRequest) -> dict:
    """Waits for an answer and returns the object `response`. Raises ApiError if the answer failed."""
    async with contextlib.aclosing(_values(answer, chat)) as values:
        async for _ in values:
            pass
    return _response(answer, chat, *_ended(answer))


async def events(answer: Answer, chat: ChatRequest) -> AsyncIterator[str]:
    """Yields server-sent events in OpenAI's order, numbered; an error becomes the event `error`."""
    values, number = _values(answer, chat), 0
    try:
        async for value in values:
            yield _event({**value, "sequence_number": number})
            number += 1
    except ApiError as error:
        body = error.body["error"]
        yield _event({"type": "error", "code": body["code"], "message": body["message"], "param": body["param"],
                      "sequence_number": number})
    finally:
        await values.aclose()


def _event(value: dict) -> str:
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n"


async def _values(answer: Answer, chat: ChatRequest) -> AsyncIterator[dict]:
    at = {"item_id": f"msg_{answer.id}", "output_index": 0, "content_index": 0}
    with contextlib.closing(answer):
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": _response(answer, chat, "in_progress", [])}
        yield {"type": "response.output_item.added", "output_index": 0, "item": _item(answer, "in_progress", [])}
        yield {"type": "response.content_part.added", **at, "part": _part("", [])}
        async with contextlib.aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                found = logprob_list(piece.logprobs, answer.token)
                answer.found += found
                yield {"type": "response.output_text.delta", **at, "delta": piece.text, "logprobs": found}
    status, output = _ended(answer)
    part = output[0]["content"][0]
    yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": part["logprobs"]}
    yield {"type": "response.content_part.done", **at, "part": part}
    yield {"type": "response.output_item.done", "output_index": 0, "item": output[0]}
    yield {"type": f"response.{status}", "response": _response(answer, chat, status, output)}


def _ended(answer: Answer) -> tuple[str, list[dict]]:
    status = "completed" if answer.finish_reason == "stop" else "incomplete"
    return status, [_item(answer, status, [_part(answer.end.completion.text, answer.found)])]


def _part(text: str, found: list[dict]) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": found}


def _item(answer: Answer, status: str, content: list[dict]) -> dict:
    return {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _response(answer: Answer, chat: ChatRequest, status: str, output: list[dict]) -> dict:
    counts, is_over = answer.usage, status != "in_progress"
    usage = {"input_tokens": counts.prompt, "input_tokens_details": {
        "cached_tokens": counts.cached, "image_tokens": counts.image}, "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": counts.prompt + counts.completion}
    return {"id": f"resp_{answer.id}", "object": "response", "created_at": answer.created, "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": answer.model, "output": output, "parallel_tool_calls": False, "previous_response_id": None,
            "store": False, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
            "truncation": "disabled", "usage": usage if is_over else None, **chat.echo}
