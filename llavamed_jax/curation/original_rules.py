"""Cleans a reply by the rules of LLaVA-Med's own code (`llava/instruct/instruct_postprocess.py`), quirks included.

The rules drop a pair in whose answer one of 20 phrases occurs; cut the first of 63 beginnings off an answer and put the
rest through `str.capitalize`, which lower-cases abbreviations; else remove 61 phrases wherever they occur; and drop a
pair in whose answer "description" or "caption" is left. The image marker stands in the first pair before any pair is
dropped, so it may be lost with that pair (quirk Q26). The original draws the marker's side without a seed.

The original has 66 beginnings, of which one occurs twice and two contain a capital letter: they are compared with text
in lower case, so they never match.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from pathlib import Path

from llavamed_jax.curation.turns import Turns
from llavamed_jax.text.conversation import IMAGE_MARKER

UNREADABLE = "not one question with one answer"
DROPPED = "one of the original's phrases of refusal"
LEFT_OVER = "description or caption is named"

_FILE = Path(__file__).parent / "prompts" / "original_phrases.txt"
_GROUP = re.compile(r"\{([^{}]*)\}")


def read_original(text: str, rng: random.Random) -> Turns:
    """Reads the pairs of a reply as the original does. The marker stands in the first pair, if that is kept.

    Args:
      text: the reply.
      rng: draws whether the marker comes after (1) or before (0) the first question.
    """
    found, pairs = Turns(), []
    for piece in text.split("User:")[1:]:
        if piece.count("Assistant:") != 1:
            question, _, answer = piece.partition("Assistant:")
            found.lost.append((question.strip(), answer.strip(), UNREADABLE))
            continue
        question, answer = piece.split("Assistant:")
        pairs.append((question.strip(), answer.strip()))
    if pairs:
        first = pairs[0][0]
        pairs[0] = (f"{first}\n{IMAGE_MARKER}" if rng.getrandbits(1) else f"{IMAGE_MARKER}\n{first}", pairs[0][1])
    for question, answer in pairs:
        cleaned, reason = clean_answer(answer)
        if reason is None:
            found.pairs.append((question, cleaned))
        else:
            found.lost.append((question, answer, reason))
    return found


def clean_answer(answer: str) -> tuple[str, str | None]:
    """Returns an answer after the original's clean-up, and the reason why its pair is dropped or None."""
    dropped, beginnings, removed = phrases()
    folded = answer.lower()
    if any(phrase in folded for phrase in dropped):
        return answer, DROPPED
    beginning = next((phrase for phrase in beginnings if folded.startswith(phrase)), None)
    if beginning is not None:
        answer = answer[len(beginning):].capitalize()
    else:
        for phrase in removed:
            answer = answer.replace(phrase, "")
    return answer, LEFT_OVER if "description" in answer or "caption" in answer else None


@functools.cache
def phrases() -> tuple[list[str], list[str], list[str]]:
    """Returns the phrases that drop a pair, the beginnings that are cut, and the phrases that are removed, in order."""
    found: dict[str, list[str]] = {}
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("[["):
            into = found.setdefault(line.strip("[]"), [])
        elif line.startswith('"'):
            into += _expanded(line[1:-1])
    # Of two beginnings that fit, the original's order takes the longer one.
    return found["dropped"], sorted(found["cut"], key=len, reverse=True), found["removed"]


def _expanded(pattern: str) -> list[str]:
    parts = _GROUP.split(pattern)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]
