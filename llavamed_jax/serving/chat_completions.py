"""`/v1/chat/completions`: answers as JSON values, one object or chunks in OpenAI's order."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence

from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.scheduler import Piece, TokenLogprob
from llavamed_jax.serving.schema import ChatRequest, read_chat
from llavamed_jax.serving.service import Answer, Service, Usage

DONE = "data: [DONE]\n\n"


def read(body, service: Service) -> ChatRequest:
    """Reads a request. Raises ApiError."""
    return read_chat(body, service.defaults, service.limits.max_new_tokens)


async def complete(answer: Answer, chat: ChatRequest) -> dict:
    """Waits for an answer and returns the object `chat.completion`. Raises ApiError if the answer failed."""
    pieces = [piece async for piece in answer.pieces()]
    found = [each for piece in pieces for each in piece.logprobs]
    choice = {"index": 0, "message": {"role": "assistant", "content": answer.end.completion.text, "refusal": None},
              "logprobs": logprobs(found, answer.token) if chat.settings.alternatives is not None else None,
              "finish_reason": answer.finish_reason}
    return {**_head(answer, "chat.completion"), "choices": [choice], "usage": usage(answer.usage)}


async def chunks(answer: Answer, chat: ChatRequest) -> AsyncIterator[dict]:
    """Yields the objects `chat.completion.chunk`: the role, the text in pieces, the reason of the end, the usage.

    Args:
      answer: the answer in progress; leaving the iteration early cancels it.
      chat: the request.

    Yields:
      The JSON values.

    Raises:
      ApiError: the answer failed; earlier chunks were yielded.
    """
    def chunk(delta: dict, piece: Piece | None = None, reason: str | None = None) -> dict:
        wants = chat.settings.alternatives is not None and piece is not None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs(piece.logprobs, answer.token) if wants else None,
                  "finish_reason": reason}
        return {**_head(answer, "chat.completion.chunk"), "choices": [choice],
                **({"usage": None} if chat.include_usage else {})}

    with contextlib.closing(answer):
        yield chunk({"role": "assistant", "content": ""})
        async with contextlib.aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                yield chunk({"content": piece.text}, piece)
    yield chunk({}, reason=answer.finish_reason)
    if chat.include_usage:
        yield {**_head(answer, "chat.completion.chunk"), "choices": [], "usage": usage(answer.usage)}


async def events(answer: Answer, chat: ChatRequest) -> AsyncIterator[str]:
    """Yields the chunks as server-sent events; an error becomes an event, since the status has gone out."""
    values = chunks(answer, chat)
    try:
        async for value in values:
            yield f"data: {json.dumps(value)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        await values.aclose()
    yield DONE


def usage(counts: Usage) -> dict:
    """Returns OpenAI's object of counts; image positions are part of the prompt's."""
    return {"prompt_tokens": counts.prompt, "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
            "prompt_tokens_details": {"cached_tokens": counts.cached, "image_tokens": counts.image,
                                      "audio_tokens": 0}}


def logprobs(found: Sequence[TokenLogprob], token: Callable[[int], bytes]) -> dict:
    """Returns OpenAI's object of log probabilities."""
    return {"content": logprob_list(found, token), "refusal": None}


def logprob_list(found: Sequence[TokenLogprob], token: Callable[[int], bytes]) -> list[dict]:
    """Returns OpenAI's list of tokens; `bytes` are exact where a token is a part of a character."""
    def one(i: int, value: float) -> dict:
        data = token(i)
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}

    return [{**one(each.id, each.logprob), "top_logprobs": [one(*pair) for pair in each.top]} for each in found]


def _head(answer: Answer, kind: str) -> dict:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": answer.model,
            "system_fingerprint": None}
