"""Finds the template whose prompts are those of a language model's own chat template.

A chat template of a language model has no place for images and defines no labels, so a model that is built from it
needs one of this project's templates. What counts is what a chat template renders: the same model may come as a
directory or as a GGUF file, and its template with special tokens or without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.text.chat_template import ChatTemplate, find_chat_template
from llavamed_jax.text.conversation import render
from llavamed_jax.text.messages import Chat
from llavamed_jax.text.templates import TEMPLATES, Template
from llavamed_jax.text.tokenizer import Tokenizer

# Conversations that tell templates apart: turns of both sides, and a system text, which some templates refuse.
_PROBES: tuple[tuple[str | None, list[str]], ...] = (
    (None, ["Is it normal?"]), (None, ["Is it normal?", "No.", "Where?"]),
    ("Be brief.", ["Is it normal?", "No.", "Where?"]))
# Of Qwen3's template: an answer without a chain of thought. Of Llama 3.2's: the day of Llama 3.1's, and not today.
_SETTINGS: dict = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_CHAT = "of the decoder's chat template"


def own_template(directory: Path, default: str) -> tuple[str | None, str | None]:
    """Finds the template of a language model's directory.

    Args:
      directory: the directory, with a tokenizer.
      default: the template of the model type, which is taken first where several write the same prompts.

    Returns:
      The name of the template that writes the same prompts, else the same but for white space, else the same but for
      the system text where none is given; None without such a template. And the reason in words; None for a directory
      without a chat template.
    """
    try:
        found = find_chat_template(directory)
        if found is None:
            return None, None
        tokenizer = Tokenizer.load(directory)
        theirs = ChatTemplate(found[0], str(found[1]), {**tokenizer.special_tokens, **_SETTINGS})
        # The beginning of a sequence comes from the tokenizer here.
        wanted = _prompts(theirs, tokenizer.bos_token if tokenizer.has_bos else "")
    except UserError as error:  # a chat template that cannot be read or rendered is not taken
        return None, f"by model type, because {error}"
    names = [name for name in dict.fromkeys((default, *TEMPLATES)) if _may_be_asked(TEMPLATES[name], tokenizer)]
    ours = {name: [render(TEMPLATES[name], [*turns, None], system) for system, turns in _PROBES] for name in names}
    plain_first = sorted(names, key=lambda name: bool(TEMPLATES[name].system))
    ways: list[tuple[Sequence[str], Callable[[list[str]], bool], str]] = [
        (names, lambda prompts: all(each in (prompt, None) for prompt, each in zip(prompts, wanted)),
         f"which writes the prompts {_CHAT}"),
        (names, lambda prompts: [*map(_bare, prompts[:2])] == [*map(_bare, wanted[:2])],
         f"which writes the prompts {_CHAT} but for white space"),
        (plain_first, lambda prompts: prompts[2] == wanted[2],
         f"which writes the turns {_CHAT}, with another system text or none where none is given")]
    for order, is_same, why in ways:
        name = next((name for name in order if is_same(ours[name])), None)
        if name is not None:
            return name, why
    return None, f"by model type, because no template here writes the prompts {_CHAT}, which is left out"


def _prompts(theirs: ChatTemplate, start: str) -> list[str | None]:
    """Returns the prompts of the probes; None for a system text that the template refuses."""
    out: list[str | None] = []
    for system, turns in _PROBES:
        parts = [[{"type": "text", "text": turn}] for turn in turns]
        try:
            out.append(theirs.render(Chat(system, turns, [], parts)).removeprefix(start))
        except UserError:
            if system is None:
                raise
            out.append(None)
    return out


def _may_be_asked(template: Template, tokenizer: Tokenizer) -> bool:
    """Returns whether a built model may use a template: v1.0's follow rules of their own."""
    has_tokens = all(tokenizer.id_of(token) is not None for token in template.form.tokens)
    return has_tokens and not template.is_v1 and not template.is_for_training_only


def _bare(text: str | None) -> str:
    return "".join((text or "").split())
