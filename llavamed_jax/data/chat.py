"""OpenAI chat messages to turns and images, and prompts by a checkpoint's own Jinja chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.checkpoints.files import read_json
from llavamed_jax.data.conversation import IMAGE_MARKER
from llavamed_jax.errors import UserError, short


@dataclass(frozen=True)
class Chat:
    """Messages taken apart: the system's text or None, turns in alternation from the user's, images in order."""

    system: str | None
    turns: list[str]
    images: list


def read_messages(messages: Sequence[dict], marker: str = IMAGE_MARKER, is_image_last: bool = False) -> Chat:
    """Takes OpenAI chat messages apart.

    A message's images go before its text, each as `marker` and a new line, as LLaVA was trained, or behind it, as LLaVA-Med
    v1.0 was; a text that places as many `<image>` itself is left alone. Messages that carry no images at all may hold markers
    for images given elsewhere.

    Raises:
      UserError: roles out of order, an unknown role or part, or a count of images that does not fit the markers.
    """
    system, turns, images = None, [], []
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(isinstance(m, dict) for m in messages):
        raise UserError("messages must be a list of objects with role and content")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        text, found = _read_content(content, i)
        if role in ("system", "developer"):
            if i > 0 or found:
                raise UserError(f"message {i} is the system's; one of text alone was expected, and first")
            system = text
            continue
        if role not in ("user", "assistant"):
            raise UserError(f"message {i} has the role {short(role)}; system, user or assistant was expected")
        if role != ("user", "assistant")[len(turns) % 2]:
            raise UserError(f"message {i} is the {role}'s; user and assistant in alternation, the user first, were expected")
        markers = text.count(IMAGE_MARKER)
        if found and not markers:
            text = (text.strip() + ("\n" + marker) * len(found)).lstrip() if is_image_last else (marker + "\n") * len(found) + text.strip()
        elif found and markers != len(found):
            raise UserError(f"message {i} has {len(found)} images for {markers} {IMAGE_MARKER} markers")
        turns.append(text)
        images += found
    if len(turns) % 2 == 0:
        raise UserError("the last message must be the user's, so that there is something to answer")
    markers = sum(text.count(IMAGE_MARKER) for text in (system or "", *turns))
    if images and markers != len(images):
        raise UserError(f"the messages have {len(images)} images for {markers} {IMAGE_MARKER} markers")
    return Chat(system, turns, images)


def _read_content(content, index: int) -> tuple[str, list]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise UserError(f"message {index} has the content {short(content)}; a text or a list of parts was expected")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and part.get("image") is not None:
            images.append(part["image"])
        elif kind == "image_url" and isinstance(url := _url(part.get("image_url")), str):
            images.append(url)
        else:
            raise UserError(f"message {index} has a part of type {short(kind)}; text, image or image_url with its content was expected")
    return "\n".join(texts), images


def _url(image_url):
    """OpenAI's `{"url": …}`; older clients send the URL itself."""
    return image_url.get("url") if isinstance(image_url, dict) else image_url


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template as transformers stores it beside a checkpoint. It writes prompts; it knows no label masks."""

    source: str
    bos: str
    eos: str

    def render(self, chat: Chat) -> str:
        """The prompt with the assistant's place open. The leading beginning-of-sequence token is left to encoding."""
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError("this checkpoint's chat template needs Jinja: pip install jinja2, or name a template") from error

        def refuse(reason):
            raise UserError(f"the checkpoint's chat template refuses the messages: {reason}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        messages = [{"role": "system", "content": [{"type": "text", "text": chat.system}]}] if chat.system is not None else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": _parts(turn)} for i, turn in enumerate(chat.turns)]
        try:
            text = environment.from_string(self.source).render(
                messages=messages, add_generation_prompt=True, bos_token=self.bos, eos_token=self.eos)
        except TemplateError as error:
            raise UserError(f"the checkpoint's chat template cannot be rendered: {error}") from error
        return text.removeprefix(self.bos) if self.bos else text


def _parts(turn: str) -> list[dict]:
    """A turn as the parts that multimodal chat templates loop over."""
    count = turn.count(IMAGE_MARKER)
    text = turn.replace(IMAGE_MARKER + "\n", "").replace(IMAGE_MARKER, "")
    return [{"type": "image"}] * count + [{"type": "text", "text": text}]


def find_chat_template(directory: Path) -> str | None:
    """The Jinja source in `directory`, from whichever of transformers' three places has it."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            template = read_json(directory / name).get("chat_template")
            if isinstance(template, list):  # named templates: the default one
                named = [t for t in template if isinstance(t, dict)]
                template = next((t.get("template") for t in named if t.get("name") == "default"), None)
            if template and not isinstance(template, str):
                raise UserError(f"{directory / name} has the chat_template {template!r}; a text was expected")
            if template:
                return template
    return None
