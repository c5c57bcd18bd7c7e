"""Finds the template whose prompts are those of a language model's own chat template.

A chat template of a language model has no place for images and defines no labels, so a model that is built from it
needs one of this project's templates.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.text.chat_template import ChatTemplate, find_chat_template
from llavamed_jax.text.conversation import render
from llavamed_jax.text.messages import Chat
from llavamed_jax.text.templates import TEMPLATES, Template
from llavamed_jax.text.tokenizer import Tokenizer, find_tokenizer

# Conversations that tell templates apart: system texts, and turns of both sides.
_PROBES: tuple[tuple[str | None, list[str]], ...] = (
    (None, ["Is it normal?"]), (None, ["Is it normal?", "No.", "Where?"]),
    ("Be brief.", ["Is it normal?", "No.", "Where?"]))
_SETTINGS: dict = {"enable_thinking": False}  # of Qwen3's template: an answer without a chain of thought


def own_template(directory: Path) -> tuple[str | None, str | None]:
    """Finds the template of a language model's directory.

    Args:
      directory: the directory.

    Returns:
      The name of the template that writes the same prompts, or None; and a sentence about it, or None for a directory
      without a chat template.
    """
    try:
        found = find_chat_template(directory)
        if found is None or find_tokenizer(directory) is None:
            return None, None
        tokenizer = Tokenizer.load(directory)
        theirs = ChatTemplate(found[0], str(found[1]), {**tokenizer.special_tokens, **_SETTINGS})
        start = tokenizer.bos_token if tokenizer.has_bos else ""  # which comes from the tokenizer here
        for name, template in TEMPLATES.items():
            # Templates of language models write special tokens; one with the same prompts has the text behind a turn.
            if template.form.tokens and template.sep in found[0] and _writes_the_same(template, theirs, start):
                return name, f"template: {name}, which writes the prompts of the decoder's chat template"
    except UserError as error:  # a chat template that cannot be read or rendered is not taken
        return None, f"template: by model type, since {error}"
    return None, "template: by model type; the decoder's chat template has no counterpart here and is left out"


def _writes_the_same(template: Template, theirs: ChatTemplate, start: str) -> bool:
    for system, turns in _PROBES:
        parts = [[{"type": "text", "text": turn}] for turn in turns]
        wanted = theirs.render(Chat(system, turns, [], parts)).removeprefix(start)
        if render(template, [*turns, None], system) != wanted:
            return False
    return True
