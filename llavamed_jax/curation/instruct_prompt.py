"""Writes the requests from which a language model makes conversations about figures.

The shape is that of LLaVA-Med's generator: a system message, few-shot pairs of a figure and its conversation, and the
figure. The wording is this project's own (`prompts/instruct.txt`) and can be replaced by a file of the same form: the
section `[[system]]`, then for each example `[[figure]]` (`LABEL: CAPTION`), optionally `[[context]]` (a mention on each
line), and `[[conversation]]` (turns that begin with `User:` or `Assistant:`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.curation.figure_file import Figure
from llavamed_jax.curation.turns import read_turns
from llavamed_jax.errors import UsageError, UserError, short
from llavamed_jax.utils.files import read_bytes
from llavamed_jax.utils.hashes import sha256

OWN = Path(__file__).parent / "prompts" / "instruct.txt"
_HEADING = re.compile(r"^\[\[(.*)\]\][ \t\r]*$", re.MULTILINE)
_LARGEST = 2**24  # bytes
_LONGEST_KEY, _DIGITS = 55, 16  # with a hash of the settings it is a `custom_id` of at most 64 characters


@dataclass(frozen=True)
class Example:
    """An example of a figure and its conversation.

    Attributes:
      figure: `LABEL: CAPTION`.
      mentions: sentences that mention the figure.
      conversation: the turns as text.
    """

    figure: str
    mentions: tuple[str, ...]
    conversation: str


@dataclass(frozen=True)
class InstructPrompt:
    """The texts around a figure.

    Attributes:
      file: the file that they come from.
      system: the system message.
      examples: the few-shot examples.
    """

    file: Path
    system: str
    examples: tuple[Example, ...]

    @property
    def wording(self) -> str:
        """SHA-256 of all texts."""
        return sha256(repr((self.system, self.examples)))

    def messages(self, figure: Figure, has_mentions: bool = True) -> list[dict]:
        """Returns OpenAI chat messages: with 8 examples they are 18.

        Args:
          figure: the figure.
          has_mentions: whether sentences that mention a figure are given, for the examples too.
        """
        found = [{"role": "system", "content": self.system}]
        for example in self.examples:
            mentions = example.mentions if has_mentions else ()
            found += [{"role": "user", "content": _content(example.figure, mentions)},
                      {"role": "assistant", "content": example.conversation}]
        return [*found, {"role": "user", "content": _asked(figure, has_mentions)}]

    @staticmethod
    def key(figure: Figure, has_mentions: bool = True) -> str:
        """Returns the key of what is asked about a figure: of its `pair_id` and the text of its request.

        A figure whose caption, label or mentions have changed has another key. The key is printable ASCII of at most 55
        characters, so that it may stand in the `custom_id` of a batch service.
        """
        asked = sha256(repr((figure.pair_id, _asked(figure, has_mentions))))
        name = figure.pair_id
        is_plain = len(name) + 1 + _DIGITS <= _LONGEST_KEY and name.isascii() and name.isprintable()
        return f"{name}-{asked[:_DIGITS]}" if is_plain else f"sha256-{asked[:32]}"


def _asked(figure: Figure, has_mentions: bool) -> str:
    caption = f"{figure.label}: {figure.caption}" if figure.label else figure.caption
    return _content(caption, figure.mentions if has_mentions else ())


def _content(caption: str, mentions: Sequence[str]) -> str:
    context = "\n\nFigure Context:\n\t- " + "\n\t- ".join(mentions) if mentions else ""
    return f"Figure Caption:\n{caption}{context}"


def read_instruct_prompt(path: Path | None = None) -> InstructPrompt:
    """Reads the prompt from a file.

    Args:
      path: the file; None reads this project's own.

    Raises:
      UsageError: the file cannot be read.
      UserError: the file is not UTF-8 text, a section is missing, unknown or in the wrong place, or the turns of an
        example are not questions with answers.
    """
    file = OWN if path is None else path
    name = f"the prompt {file}"
    try:
        text = read_bytes(file, name, _LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text") from None
    before, *parts = _HEADING.split(text)
    sections = [(title, body.strip("\r\n")) for title, body in zip(parts[::2], parts[1::2], strict=True)]
    if before.strip() or not sections or sections[0][0] != "system" or not sections[0][1].strip():
        raise UserError(f"{name} does not begin with the section [[system]] and its text; [[system]], then [[figure]], "
                        "[[context]] and [[conversation]] for each example were expected")
    examples, rest = [], sections[1:]
    while rest:
        taken = [rest.pop(0)]
        while rest and rest[0][0] != "figure":
            taken.append(rest.pop(0))
        examples.append(_example(taken, f"example {len(examples) + 1} of {name}"))
    return InstructPrompt(file, sections[0][1], tuple(examples))


def _example(sections: Sequence[tuple[str, str]], name: str) -> Example:
    titles = [title for title, _ in sections]
    if titles not in (["figure", "conversation"], ["figure", "context", "conversation"]):
        raise UserError(f"{name} has the sections {', '.join(f'[[{title}]]' for title in titles)}; [[figure]], "
                        "optionally [[context]], and [[conversation]] were expected")
    texts = dict(sections)
    empty = next((title for title, body in sections if not body.strip()), None)
    if empty is not None:
        raise UserError(f"{name} has no text under [[{empty}]]")
    turns = read_turns(texts["conversation"])
    if turns.dropped or not turns.pairs:
        reason = next(iter(turns.dropped), "no turns")
        raise UserError(f"{name} has a conversation that cannot be used ({reason}): "
                        f"{short(texts['conversation'])}; turns that begin with User: and Assistant: were expected")
    mentions = tuple(line.strip() for line in texts.get("context", "").splitlines() if line.strip())
    return Example(" ".join(texts["figure"].split()), mentions, texts["conversation"])
