"""Reads the requests of `/v1/chat/completions`; terminal chat, page and API share the schema of their messages.

Keys that this file does not know are ignored, because clients send many (`store`, `metadata`, `reasoning_effort`, …).
Keys that would change the meaning of the answer and that cannot be obeyed are refused with a sentence.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llavamed_jax.errors import short
from llavamed_jax.generation.programs import ALTERNATIVES
from llavamed_jax.serving.content import Message, read_messages
from llavamed_jax.serving.errors import invalid

MOST_STOPS = 16
_UNLIMITED = 2**31 - 1  # more tokens than any context has; the engine stops where the context ends


@dataclass(frozen=True)
class Settings:
    """How an answer is generated.

    Attributes:
      max_new_tokens: the most new tokens.
      temperature: 0 is greedy.
      top_p: the probability mass to keep; 0 keeps the most likely token.
      top_k: the number of most likely tokens to keep; 0 keeps all.
      seed: the same seed gives the same answer to the same prompt.
      stop: texts that end the answer.
      alternatives: how many log probabilities each token gets beside its own; None for no log probabilities.
    """

    max_new_tokens: int = _UNLIMITED
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    alternatives: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Attributes:
      messages: the conversation.
      settings: how it is answered.
      model: the name that the client gave; None if it gave none.
      is_streamed: whether the answer is sent while it is generated.
      include_usage: whether a stream ends with a chunk of the counts.
      ignored: keys of the request that have no effect.
      echo: values that the response repeats.
    """

    messages: list[Message]
    settings: Settings = field(default_factory=Settings)
    model: str | None = None
    is_streamed: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    echo: dict[str, Any] = field(default_factory=dict)


# Keys that change the answer, each with the values that do not. `None`, an absent key, never does.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1, 0),
    "logit_bias": ({},), "min_p": (0,), "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "use_beam_search": (False,), "echo": (False,), "prompt_logprobs": (0, False), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "truncate_prompt_tokens": (), "chat_template": (), "audio": (), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "bad_words": ([],), "allowed_token_ids": (),
    "logits_processors": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"], []),
    # Of the bodies of vLLM, SGLang, TGI and llama.cpp.
    "regex": (), "json_schema": (), "ebnf": (), "grammar": (), "structural_tag": (), "guided_decoding": (),
    "stop_regex": ([],), "length_penalty": (1,), "early_stopping": (False,), "no_stop_trim": (False,),
    "add_special_tokens": (False,), "documents": ([],), "input_ids": (), "prompt_embeds": (), "lora_path": (),
    "adapter_id": (), "custom_logit_processor": (), "typical_p": (1,), "top_a": (0,), "tfs_z": (1,), "mirostat": (0,),
    "repeat_penalty": (1, 0), "no_repeat_ngram_size": (0,), "dry_multiplier": (0,), "xtc_probability": (0,),
    "num_beams": (1,), "mm_processor_kwargs": ({},),
}
_KNOWN = {"messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
          "top_p", "top_k", "seed", "stop", "logprobs", "top_logprobs", *_WITHOUT_EFFECT}


def read_chat(body: Mapping[str, Any], defaults: Mapping[str, Any], max_new_tokens: int | None = None) -> ChatRequest:
    """Reads the body of a request.

    Args:
      body: the JSON object.
      defaults: `temperature`, `top_p`, `top_k` and `max_new_tokens` of the checkpoint, for keys that are absent.
      max_new_tokens: the server's own limit, or None.

    Returns:
      The request.

    Raises:
      ApiError: 400, with the key that is wrong.
    """
    if not isinstance(body, Mapping):
        raise invalid(f"the body is {short(body)}; a JSON object was expected")
    check_without_effect(body)
    if body.get("messages") is None:
        raise invalid("messages is missing; a list of messages was expected", "messages", "missing_required_parameter")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise invalid(f"stream_options is {short(options)}; an object was expected", "stream_options")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid(f"model is {short(model)}; a text was expected", "model")
    most = first(whole(body, "max_completion_tokens", 1), whole(body, "max_tokens", 1))
    return ChatRequest(
        read_messages(body["messages"]),
        settings(body, defaults, most, max_new_tokens, _stops(body.get("stop")), _alternatives(body)),
        model, flag(body, "stream"), flag(options, "include_usage"), tuple(sorted(set(map(str, body)) - _KNOWN)))


def settings(body: Mapping, defaults: Mapping, most: int | None, limit: int | None, stop: tuple[str, ...] = (),
             alternatives: int | None = None) -> Settings:
    """Reads the settings that both kinds of requests share; absent ones are the checkpoint's.

    Args:
      body: the JSON object.
      defaults: the checkpoint's settings.
      most: the most new tokens that the client asked for, or None.
      limit: the server's own limit of new tokens, or None.
      stop: texts that end the answer.
      alternatives: how many log probabilities each token gets.

    Raises:
      ApiError: 400, with the key that is wrong.
    """
    most = first(most, defaults.get("max_new_tokens"), _UNLIMITED)
    top_k = first(whole(body, "top_k", -1), defaults.get("top_k"), 0)
    seed = whole(body, "seed", -(2**63), 2**63 - 1)
    return Settings(
        min(most, limit or _UNLIMITED), first(number(body, "temperature", 0, 100), defaults.get("temperature"), 0.0),
        first(number(body, "top_p", 0, 1), defaults.get("top_p"), 1.0), max(0, top_k),  # vLLM: -1 is all
        secrets.randbits(63) if seed is None else seed % 2**64, stop, alternatives)


def check_without_effect(body: Mapping) -> None:
    """Raises ApiError for a key that would change the answer and that this server does not obey."""
    for key, allowed in _WITHOUT_EFFECT.items():
        value = body.get(key)
        if value is None or value in allowed:
            continue
        expected = f"{' or '.join(short(each) for each in allowed)} was expected" if allowed else "remove it"
        raise invalid(f"{key} is {short(value)}, which this server does not support; {expected}", key,
                      "unsupported_parameter")


def first(*values):
    """Returns the first value that is not None."""
    return next((value for value in values if value is not None), None)


def flag(body: Mapping, key: str) -> bool:
    """Reads true or false; absent is false."""
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{key} is {short(value)}; true or false was expected", key)
    return bool(value)


def whole(body: Mapping, key: str, least: int, most: int = 2**63) -> int | None:
    """Reads a whole number from `least` to `most`; None if it is absent."""
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # JavaScript writes 64.0 too
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise invalid(f"{key} is {short(value)}; a whole number of at least {least} was expected"
                      if most >= 2**63 else
                      f"{key} is {short(value)}; a whole number from {least} to {most} was expected", key)
    return value


def number(body: Mapping, key: str, least: float, most: float) -> float | None:
    """Reads a number from `least` to `most`; None if it is absent."""
    value = body.get(key)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise invalid(f"{key} is {short(value)}; a number from {least} to {most} was expected", key)
    return float(value)


def _stops(value) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    is_list = isinstance(stops, Sequence) and all(isinstance(text, str) for text in stops)
    if not is_list or len(stops) > MOST_STOPS:
        raise invalid(f"stop is {short(value)}; a text or a list of at most {MOST_STOPS} texts was expected", "stop")
    return tuple(text for text in stops if text)


def _alternatives(body: Mapping) -> int | None:
    number_of = whole(body, "top_logprobs", 0, ALTERNATIVES)
    if flag(body, "logprobs"):
        return number_of or 0
    if number_of:
        raise invalid("top_logprobs needs logprobs; \"logprobs\": true was expected", "top_logprobs")
    return None
