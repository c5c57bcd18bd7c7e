"""Answers of `/v1/chat/completions` as JSON values: one object, or chunks in OpenAI's order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from llavamed_jax.serving.scheduler import Piece, TokenLogprob
from llavamed_jax.serving.service import Answer, Usage


async def complete(answer: Answer, wants_logprobs: bool) -> dict:
    """Waits for an answer and returns the object `chat.completion`.

    Args:
      answer: the answer in progress.
      wants_logprobs: whether the log probabilities of its tokens are part of it.

    Returns:
      The JSON value.

    Raises:
      ApiError: the answer failed.
    """
    pieces = [piece async for piece in answer.pieces()]
    found = [each for piece in pieces for each in piece.logprobs]
    choice = {"index": 0, "message": {"role": "assistant", "content": answer.end.completion.text, "refusal": None},
              "logprobs": logprobs(found, answer.token) if wants_logprobs else None,
              "finish_reason": answer.finish_reason}
    return {**_head(answer, "chat.completion"), "choices": [choice], "usage": usage(answer.usage)}


async def chunks(answer: Answer, wants_logprobs: bool, include_usage: bool) -> AsyncIterator[dict]:
    """Yields the objects `chat.completion.chunk`: the role, the text in pieces, the reason of the end, the usage.

    Args:
      answer: the answer in progress.
      wants_logprobs: whether chunks carry log probabilities.
      include_usage: whether a last chunk without choices carries the counts.

    Yields:
      The JSON values.

    Raises:
      ApiError: the answer failed; earlier chunks were sent.
    """
    def chunk(delta: dict, piece: Piece | None = None, reason: str | None = None) -> dict:
        found = logprobs(piece.logprobs, answer.token) if wants_logprobs and piece is not None else None
        choice = {"index": 0, "delta": delta, "logprobs": found, "finish_reason": reason}
        return {**_head(answer, "chat.completion.chunk"), "choices": [choice],
                **({"usage": None} if include_usage else {})}

    yield chunk({"role": "assistant", "content": ""})
    async for piece in answer.pieces():
        yield chunk({"content": piece.text}, piece)
    yield chunk({}, reason=answer.finish_reason)
    if include_usage:
        yield {**_head(answer, "chat.completion.chunk"), "choices": [], "usage": usage(answer.usage)}


def usage(counts: Usage) -> dict:
    """Returns OpenAI's object of counts; image positions are part of the prompt's."""
    return {"prompt_tokens": counts.prompt, "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
            "prompt_tokens_details": {"cached_tokens": counts.cached, "image_tokens": counts.image,
                                      "audio_tokens": 0}}


def logprobs(found: Sequence[TokenLogprob], token: Callable[[int], bytes]) -> dict:
    """Returns OpenAI's object of log probabilities; `bytes` are exact where a token is part of a character."""
    def one(i: int, value: float) -> dict:
        data = token(i)
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}

    return {"content": [{**one(each.id, each.logprob), "top_logprobs": [one(*pair) for pair in each.top]}
                        for each in found], "refusal": None}


def _head(answer: Answer, kind: str) -> dict:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": answer.model,
            "system_fingerprint": None}
