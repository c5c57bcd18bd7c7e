"""Writes a judge's prompts and reads its replies.

The frame around question and answers is the original's (`eval_multimodal_chat_gpt_score.py`). The judge's system
message and instruction are in `judge_prompt.txt`, which was written for this project. Users can give the path of
another file. Such a file has the sections `[[system]]` and `[[instruction]]`, and optionally `[[reminder]]`, each under
a line with its name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.datasets.qa50 import ChatQuestion
from llavamed_jax.errors import UsageError, UserError, some
from llavamed_jax.utils.files import read_bytes
from llavamed_jax.utils.hashes import sha256

CHAT_PROMPT = Path(__file__).with_name("judge_prompt.txt")
OPEN_PROMPT = Path(__file__).with_name("judge_open_prompt.txt")
ORIGINAL_WORDING = "cf95eaf30319cdea5f00fe4f669b8686e42bf695f90e32594a9783054bfa473d"
"""`JudgePrompt.wording` of the original's system message and instruction, which are not part of this project."""

_SECTIONS = ("system", "instruction", "reminder")
_HEADING = re.compile(r"^\[\[(.*)\]\][ \t\r]*$", re.MULTILINE)


@dataclass(frozen=True)
class JudgePrompt:
    """The texts of a judge's prompt.

    Attributes:
      file: the file that they come from.
      system: the system message.
      instruction: the instruction, which ends the user message.
      reminder: the text that is added after a reply that could not be read.
    """

    file: Path
    system: str
    instruction: str
    reminder: str

    @property
    def wording(self) -> str:
        """SHA-256 of system message and instruction; each run of white space counts as one blank."""
        return sha256(" ".join(f"{self.system} {self.instruction}".split()).encode())

    def messages(self, user: str, is_reminded: bool = False) -> list[dict]:
        """Returns the messages of a request; the reminder, if asked for, comes last."""
        content = f"{user}{self.reminder}\n" if is_reminded else user
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]


def read_prompt(path: str, default: Path) -> JudgePrompt:
    """Reads a judge's prompt from a file.

    Args:
      path: the file; "" reads the default.
      default: the file of this project. Its reminder is used if `path` has none.

    Raises:
      UsageError: the file cannot be read.
      UserError: the file lacks a section, has an unknown one, or is not UTF-8 text.
    """
    own = _sections(default)
    found = _sections(Path(path)) if path else own
    missing = [name for name in ("system", "instruction") if not found.get(name)]
    if missing:
        raise UserError(f"the judge's prompt {path} has no text under [[{missing[0]}]]; the sections [[system]] and "
                        "[[instruction]] were expected, and optionally [[reminder]]")
    return JudgePrompt(Path(path) if path else default, found["system"], found["instruction"],
                       found.get("reminder") or own["reminder"])


def _sections(file: Path) -> dict[str, str]:
    try:
        text = read_bytes(file, f"the judge's prompt {file}", 2**24).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"judge.prompt is {file}, which cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"the judge's prompt {file} is not UTF-8 text") from None
    before, *parts = _HEADING.split(text)
    names = parts[::2]
    strange = [f"[[{name}]]" for name in names if name not in _SECTIONS or names.count(name) > 1]
    if before.strip() or strange:
        what = (f"the section {some(strange)}, which is unknown or occurs twice" if strange
                else "text before its first section")
        raise UserError(f"the judge's prompt {file} has {what}; {', '.join(f'[[{name}]]' for name in _SECTIONS)} were "
                        "expected, each once")
    return dict(zip(names, (part.strip("\r\n") for part in parts[1::2]), strict=True))


def chat_prompt(prompt: JudgePrompt, question: ChatQuestion, answer: str, has_marker: bool = False) -> str:
    """Returns the prompt for judging two answers; Assistant 1 gives the reference.

    The mentions are written as Python prints a list or None, as in the original (quirk Q29).

    Args:
      prompt: the judge's texts.
      question: the question, its figure and the reference answer.
      answer: the answer to judge.
      has_marker: keeps "<image>" at the end of the question, as v1.5's code does. v1.0's code, which the paper used,
        removes it.
    """
    text = question.text if has_marker else question.question
    return (
        f"[Context]\nFigure Caption:\n{question.label}: {question.caption}\n\nFigure Context:\n\t- "
        f"{question.mentions}\n\n"
        f"[Question]\n{text}\n\n"
        f"[Assistant 1]\n{question.reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{prompt.instruction}\n\n"
    )


def open_prompt(prompt: JudgePrompt, question: str, gold: str, answer: str) -> str:
    """Returns the prompt for judging one answer against a gold answer."""
    return (
        f"[Question]\n{question}\n\n[Gold Answer]\n{gold}\n\n[Answer]\n{answer}\n\n[End of Answer]\n\n"
        f"[System]\n{prompt.instruction}\n\n"
    )


_SCORES = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?: *, *| +)([0-9]+(?:\.[0-9]+)?)")


def read_scores(reply: str) -> tuple[float, float] | None:
    """Reads the two scores of a reply; None unless its first line is two numbers from 1 to 10.

    The numbers are separated by blanks or a comma.
    """
    found = _SCORES.fullmatch(_first_line(reply))
    scores = tuple(map(float, found.groups())) if found else (0.0, 0.0)
    return scores if all(1 <= score <= 10 for score in scores) else None


def read_original_scores(reply: str) -> tuple[float, float] | None:
    """Reads the two scores of a reply as the original does (`llava/eval/eval_multimodal_chat_gpt_score.py`).

    The first line, split at single blanks, has to be two numbers of any size. Returns None where the original fails:
    for any other form, for a reference score of 0, by which the original divides, and for a number that is not finite.
    """
    try:
        first, second = map(float, reply.partition("\n")[0].split(" "))
    except ValueError:
        return None
    return (first, second) if first and math.isfinite(first) and math.isfinite(second) else None


READINGS = {"strict": read_scores, "original": read_original_scores}
"""`judge.reading` -> what reads the scores of a reply."""


_VERDICTS = {"right": True, "correct": True, "wrong": False, "incorrect": False}
_THOUGHT = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*\Z", re.I | re.S)
_MARKS = re.compile(r"</?[a-z_]+\s*/?>|[*_`#\"“”‘’«»\[\]{}]|(?<!\w)'|'(?!\w)", re.I)  # tags, emphasis, quotation marks
_VERDICT = re.compile(
    r"\W*(?:(?:(?:the|my|final|your)\s+)*(?:(?:verdict|judge?ment|result|rating|grade|evaluation|conclusion|"
    r"assessment)\s*(?:is\b|[:=\-])?|(?:answer|response)\s*:)[\s:]*)?(right|correct|wrong|incorrect)(?=\s*(?:$|[:,.;!)\n–—-]))"
    r"\W*(.*)", re.I)
_TAKEN_BACK = re.compile(r"(?:but|however|though|although|or|and|partial(?:ly)?|partly|mostly|in\s+part|not\s+(?:quite|"
                         r"fully|entirely|completely)|to\s+some\s+extent)\b|(right|correct|wrong|incorrect)\W*$", re.I)


def read_right(reply: str) -> bool | None:
    """Reads a reply that begins with a verdict: True for "right" or "correct", False for "wrong" or "incorrect".

    The verdict stands alone or in front of a mark ("Wrong: the answer names the other side"). Thoughts before
    `</think>`, emphasis, quotation marks and a lead such as "Verdict:" are removed. Any other reply ("not right",
    "partially right", "right/wrong", "right, but incomplete") gives None.
    """
    text = _MARKS.sub("", _THOUGHT.sub("", reply)).strip()
    found = _VERDICT.match(text)
    return None if found is None or _TAKEN_BACK.match(found[2]) else _VERDICTS[found[1].lower()]


def _first_line(reply: str) -> str:
    return reply.strip().partition("\n")[0].strip()
