"""Reads the messages of a request, in every form that clients send them, as plain parts.

An image is a `data:` URL or a web address here; `serving.images` turns it into pixels. A path on the server's disk is
never an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llavamed_jax.errors import short
from llavamed_jax.serving.errors import ApiError, invalid

MOST_MESSAGES = 1000
MOST_PARTS = 4000  # of all messages together
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its key
_IMAGES = {"image_url": "image_url", "input_image": "image_url", "image": "image"}


@dataclass(frozen=True)
class ImageUrl:
    """An image of a message: a `data:` URL or a web address."""

    url: str


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
      role: `system`, `user` or `assistant`.
      parts: texts and images in order.
    """

    role: str
    parts: list[str | ImageUrl]


def read_messages(messages, param: str = "messages") -> list[Message]:
    """Reads a list of messages; contents may be texts, lists of parts, or null for an empty answer.

    Args:
      messages: the JSON value.
      param: the key that errors name.

    Returns:
      The messages.

    Raises:
      ApiError: 400, with the place of the part that is wrong; too many messages or parts.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise invalid(f"{param} is {short(messages)}; a list of at least one message was expected", param)
    if len(messages) > MOST_MESSAGES:
        raise invalid(f"{param} has {len(messages)} messages; at most {MOST_MESSAGES} were expected", param)
    parts = sum(len(content) for message in messages if isinstance(message, Mapping)
                and isinstance(content := message.get("content"), Sequence) and not isinstance(content, str))
    if parts > MOST_PARTS:
        raise invalid(f"{param} has {parts} parts; at most {MOST_PARTS} were expected", param)
    return [_read(message, f"{param}[{i}]") for i, message in enumerate(messages)]


def images_of(messages: Sequence[Message]) -> list[ImageUrl]:
    """Returns the images of a conversation in order."""
    return [part for message in messages for part in message.parts if isinstance(part, ImageUrl)]


def _read(message, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise invalid(f"{where} is {short(message)}; an object with role and content was expected", where)
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise invalid(f"{where} has the role {short(message.get('role'))}; system, user or assistant was expected",
                      f"{where}.role", "unsupported_role" if role in ("tool", "function") else None)
    content = message.get("content")
    if content is None:
        if role == "assistant":  # clients send null beside a refusal or a call of a tool
            return Message(role, [])
        raise invalid(f"{where} has no content; a text or a list of parts was expected", f"{where}.content")
    if isinstance(content, str):
        return Message(role, [content])
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise invalid(f"{where}.content is {short(content)}; a text or a list of parts was expected",
                      f"{where}.content")
    parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    if role != "user" and any(isinstance(part, ImageUrl) for part in parts):
        raise invalid(f"{where} has the role {role} and an image; images were expected only in user messages",
                      f"{where}.content")
    return Message(role, parts)


def _part(part, where: str) -> str | ImageUrl:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise invalid(f"{where} is {short(part)}; an object with a type was expected", where)
    kind = part.get("type")
    if kind is None:  # vLLM's bare form, {"image_url": "…"}
        kind = next((key for key in ("text", "image_url") if key in part), None)
    if not isinstance(kind, str):  # a list or an object cannot be looked up
        raise _unknown(kind, where)
    if kind in _TEXTS:
        text = part.get(_TEXTS[kind])
        if not isinstance(text, str):
            raise invalid(f"{where}.{_TEXTS[kind]} is {short(text)}; a text was expected", where)
        return text
    if kind in _IMAGES:
        return ImageUrl(_url(part.get(_IMAGES[kind]), f"{where}.{_IMAGES[kind]}"))
    raise _unknown(kind, where)


def _unknown(kind, where: str) -> ApiError:
    return invalid(f"{where} is of type {short(kind)}, which this server does not read; text or image_url was expected",
                   where, "unsupported_content_type")


def _url(value, where: str) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise invalid(f"{where} is {short(value)}; an object with a url, or a url, was expected", where)
    scheme = url[:8].lower()
    if not scheme.startswith(("data:", "http://", "https://")):
        raise invalid(f"{where} is {short(url)}; a data: or https: URL was expected", where, "invalid_image_url")
    return url
