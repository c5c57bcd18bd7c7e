"""Converts OpenAI chat messages, or one question, to turns and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llavamed_jax.errors import UserError, short
from llavamed_jax.text.conversation import IMAGE_MARKER


@dataclass(frozen=True)
class Chat:
    """Messages split into turns and images.

    Attributes:
      system: the system's text or None.
      turns: alternating texts, the user's first, with each image as its marker; for the built-in templates.
      images: in order.
      parts: for each turn, `{"type": "text", "text": …}` and `{"type": "image"}` in the message's order; for a
        checkpoint's own chat template.
    """

    system: str | None
    turns: list[str]
    images: list
    parts: list[list[dict]]


def read_messages(messages: Sequence[dict], marker: str = IMAGE_MARKER, is_image_last: bool = False) -> Chat:
    """Splits OpenAI chat messages into turns and images.

    In `turns` a message's images stand before its text, each as `marker` and a new line, as LLaVA was trained, or
    behind the text, as LLaVA-Med v1.0 was trained. A text that contains as many `<image>` as the message has images is
    unchanged. If no message carries an image, the texts may contain markers of images that are given elsewhere.

    Args:
      messages: objects with `role` and `content`.
      marker: the text of one image.
      is_image_last: whether images stand behind the text.

    Returns:
      The turns and images.

    Raises:
      UserError: roles are out of order, a role or part is unknown, or the number of images does not fit the markers.
    """
    system, turns, images, parts = None, [], [], []
    if (not isinstance(messages, Sequence) or isinstance(messages, str)
            or not all(isinstance(m, dict) for m in messages)):
        raise UserError("messages must be a list of objects with role and content")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        text, found, given = _read_content(content, i)
        if role in ("system", "developer"):
            if i > 0 or found:
                raise UserError(f"message {i} has the role {role}; it must be the first message and contain only text")
            system = text
            continue
        if role not in ("user", "assistant"):
            raise UserError(f"message {i} has the role {short(role)}; system, user or assistant was expected")
        if role != ("user", "assistant")[len(turns) % 2]:
            raise UserError(f"message {i} has the role {role}; user and assistant were expected to alternate, "
                            "beginning with user")
        parts.append(_split_at_markers(text) if IMAGE_MARKER in text else given)
        turns.append(_with_images(text, len(found), marker, is_image_last, f"message {i}"))
        images += found
    if len(turns) % 2 == 0:
        raise UserError("the last message has the role assistant; a user message to answer was expected last")
    markers = sum(text.count(IMAGE_MARKER) for text in (system or "", *turns))
    if images and markers != len(images):
        raise UserError(f"the messages have {len(images)} images for {markers} {IMAGE_MARKER} markers")
    return Chat(system, turns, images, parts)


def question(text: str, images: Sequence = (), marker: str = IMAGE_MARKER, is_image_last: bool = False) -> Chat:
    """Makes the turn of one question, equal to `read_messages` of one message with these images before this text.

    Args:
      text: the question.
      images: the images.
      marker: the text of one image.
      is_image_last: whether images stand behind the text.

    Returns:
      One turn with its images.

    Raises:
      UserError: the number of images does not fit the markers in the text.
    """
    turn = _with_images(text, len(images), marker, is_image_last, "the question")
    has_markers = IMAGE_MARKER in text
    parts = (_split_at_markers(text) if has_markers
             else [*({"type": "image"} for _ in images), {"type": "text", "text": text}])
    return Chat(None, [turn], list(images), [parts])


def _with_images(text: str, num_images: int, marker: str, is_image_last: bool, where: str) -> str:
    """Adds the images' markers before or behind a text, unless the text contains as many markers itself."""
    markers = text.count(IMAGE_MARKER)
    if num_images and markers not in (0, num_images):
        raise UserError(f"{where} has {num_images} images for {markers} {IMAGE_MARKER} markers")
    if markers or not num_images:
        return text
    text = text.strip()
    return (text + ("\n" + marker) * num_images).lstrip() if is_image_last else (marker + "\n") * num_images + text


def _read_content(content, index: int) -> tuple[str, list, list[dict]]:
    """Returns the text of a message, its images, and both as parts in order."""
    if isinstance(content, str):
        return content, [], [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise UserError(f"message {index} has the content {short(content)}; a text or a list of parts was expected")
    texts, images, parts = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            parts.append({"type": "text", "text": part["text"]})
            continue
        if kind == "image" and part.get("image") is not None:
            images.append(part["image"])
        elif kind == "image_url" and isinstance(url := _url(part.get("image_url")), str):
            images.append(url)
        else:
            raise UserError(f"message {index} has a part of type {short(kind)}; text, image or image_url with its "
                            "content was expected")
        parts.append({"type": "image"})
    return "\n".join(texts), images, parts


def _url(image_url):
    """Returns the URL of OpenAI's `{"url": …}`; older clients send the URL itself."""
    return image_url.get("url") if isinstance(image_url, dict) else image_url


def _split_at_markers(text: str) -> list[dict]:
    """Splits a text with markers into parts. A new line between a marker and the text belongs to the marker."""
    first, *rest = text.split(IMAGE_MARKER)
    parts = [{"type": "text", "text": first.removesuffix("\n")}] if first else []
    for i, piece in enumerate(rest):
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        piece = piece if i == len(rest) - 1 else piece.removesuffix("\n")
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
