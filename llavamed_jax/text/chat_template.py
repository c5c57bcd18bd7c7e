"""A checkpoint's own Jinja chat template: finds it and writes prompts with it.

transformers renders the template in a separate process (`template_process`). A template written for a language model
takes a message's content as a text, one written for an image processor takes a list of parts; the renderer detects
which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llavamed_jax.errors import UserError, short, warn_once
from llavamed_jax.text import template_process
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.text.messages import Chat
from llavamed_jax.utils.files import read_json


@dataclass(frozen=True)
class ChatTemplate:
    """A template that writes prompts; it cannot make label masks.

    Attributes:
      source: the Jinja text.
      file: the file that it was read from.
      tokens: `bos_token`, `eos_token` and the others, which the template may write.
      marker: the text of the token that stands for an image.
    """

    source: str
    file: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    marker: str = IMAGE_MARKER

    def render(self, chat: Chat) -> str:
        """Writes the prompt up to where the answer begins.

        Args:
          chat: the messages.

        Returns:
          The prompt.

        Raises:
          UserError: the template is invalid, fails, refuses the messages, loops, needs too much memory, or writes
            another number of images than the messages have.
        """
        system = ([] if chat.system is None
                  else [_message("system", chat.system, [{"type": "text", "text": chat.system}])])
        messages = system + [
            _message(("user", "assistant")[i % 2], turn.replace(IMAGE_MARKER, self.marker), parts)
            for i, (turn, parts) in enumerate(zip(chat.turns, chat.parts, strict=True))]
        request = dict(source=self.source, messages=messages, tokens=dict(self.tokens), marker=self.marker)
        return template_process.render(request, f"the chat template {self.file}")


def _message(role: str, text: str, parts: list[dict]) -> dict:
    return {"role": role, "text": text, "parts": parts}


def find_chat_template(directory: Path) -> tuple[str, Path] | None:
    """Finds the Jinja template in a directory.

    The order is that of transformers 5.24's processors, with the tokenizer's own file last. Of several named templates
    `default` is taken, as in transformers. If an older transformers would take another of these files with other
    contents, a line on stderr names both files.

    Args:
      directory: the checkpoint's directory.

    Returns:
      The Jinja source and its file; None if there is no template.

    Raises:
      UserError: a file cannot be read, a template is not a text or is empty, or the names do not include `default`.
    """
    found = [pair for pair in (_in_json(directory / "processor_config.json"),
                               _in_json(directory / "chat_template.json"),
                               _in_jinja_files(directory), _in_json(directory / "tokenizer_config.json"))
             if pair is not None]
    if not found:
        return None
    source, file = found[0]
    if not source.strip():
        raise UserError(f"{file} has an empty chat template; a Jinja text was expected")
    # A tokenizer's template beside a processor's is the language model's; every version ignores it.
    other = next((other for text, other in found[1:] if text != source and other.name != "tokenizer_config.json"), None)
    if other is not None:
        warn_once(f"{file} and {other} hold different chat templates; {file.name} is used, as in transformers 5.24")
    return source, file


def _in_json(file: Path) -> tuple[str, Path] | None:
    value = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):  # [{"name": …, "template": …}]
        value = {str(each.get("name")): each.get("template") for each in value}
    if isinstance(value, dict):
        value = _default(value, file)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{file} has the chat_template {short(value)}; a text was expected")
    return value, file


def _in_jinja_files(directory: Path) -> tuple[str, Path] | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return read_template(file), file
    named = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if not named:
        return None
    file = _default(named, directory / "additional_chat_templates")
    return read_template(file), file


def _default(named: Mapping, where: Path):
    if "default" not in named:
        raise UserError(f"{where} has the chat templates {short(sorted(named))}; one called default was expected")
    return named["default"]


def read_template(file: Path) -> str:
    """Reads the text of a `.jinja` file. Raises UserError if the file cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {file} is not UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"the chat template {file} cannot be read: {error.strerror}") from None

