"""Reads a multiple-choice question out of its text: what is asked, the options, and which option an answer names.

The same question may be listed otherwise in two files: with other labels (`A. CT`, `A:CT`, `(A) CT`), in another order,
with another instruction. What is asked and the option's text stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llavamed_jax.datasets.sample import LETTERS
from llavamed_jax.text.conversation import IMAGE_MARKER

_OPTION = re.compile(r"[ \t]*\(?([A-Z])[.:)][ \t]*(.*)")
_IMAGE = re.compile(rf"^[ \t]*<image_\d+>[ \t]*:[ \t]*|{re.escape(IMAGE_MARKER)}", re.MULTILINE)
_QUESTION = re.compile(r"\s*question[ \t]*:", re.IGNORECASE)
_HEADING = re.compile(r"(?:^|\n)[ \t]*(?:answer[ \t]+)?(?:options|choices)[ \t]*:?\s*$", re.IGNORECASE)
_NAMED = re.compile(r"\s*\(?([A-Za-z])(?:[.:)]\s*(.*?)|\s*)\s*", re.DOTALL)


@dataclass(frozen=True)
class Listed:
    """A question without image markers, list of options and instruction, and the texts of its options, if it lists any.

    The options stand one a line with the letters A, B, …; what follows them is the instruction.
    """

    question: str
    options: tuple[str, ...] = ()

    def named(self, answer: str) -> str:
        """Returns the text of the option that an answer names: `B`, `(b)` or `B. CT`; any other answer unchanged."""
        match = _NAMED.fullmatch(answer)
        place = LETTERS.find(match[1].upper()) if match else -1
        if not 0 <= place < len(self.options):
            return answer
        option, said = self.options[place], match[2]
        return option if not said or said.strip(" .").casefold() == option.strip(" .").casefold() else answer


def read_listed(text: str) -> Listed:
    """Reads the text of a question; the last list of options counts if there are several."""
    lines = _IMAGE.sub("", text).splitlines()
    begin, options = len(lines), ()
    first, run = 0, []
    for number, line in enumerate(lines):
        match = _OPTION.fullmatch(line)
        if match is None and not line.strip():
            continue
        if match is None or match[1] != LETTERS[len(run):len(run) + 1]:
            first, run = number, []
        if match is not None and match[1] == LETTERS[len(run)]:
            run.append(match[2].strip())
            if len(run) > 1:
                begin, options = first, tuple(run)
        elif match is None:
            first = number + 1
    question = "\n".join(lines[:begin])
    if options:
        question = _HEADING.sub("", question)
        heading = _QUESTION.match(question)
        question = question[heading.end():] if heading else question
    return Listed(question.strip(), options)
