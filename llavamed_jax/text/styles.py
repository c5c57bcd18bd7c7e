"""The prompt format, written once: prompts, training text and exported chat templates are made from this table.

A style describes in pieces how turns become text. `text.conversation` fills the pieces in;
`checkpoints.export.chat_template` writes them as Jinja. A template (`text.templates`) is a style with roles, separators
and a system text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """Describes how turns become one string.

    A piece is a format string. `{text}` is the turn's text, `{system}` the system text, `{user}` and `{assistant}` the
    names of the roles; `{sep}` ends a question and `{end}` an answer.

    Attributes:
      labels: the original procedure that finds the supervised tokens (spec 3.7): v0, v1, llama_2 or plain.
      head: the text before the turns.
      question: a turn of the user.
      answer: a turn of the assistant.
      empty_question: a turn of the user without text.
      empty_answer: a turn of the assistant without text; it also opens the place of the answer to generate.
      first: the first question, if it differs from `question`.
      first_with_system: the first question, if there is a system text and the piece differs.
      before_answer: the text at which v1 and llama_2 split a round to find its answer.
      is_single: whether the prompt holds only one message.
      needs_first: whether the first message must have a text.
      writes_empty: whether a turn with an empty text is written as any other.
      is_for_training_only: whether the originals train with the style and never generate with it.
      stops_at_sep: whether `{sep}` ends an answer, so that generation stops there.
    """

    labels: str
    head: str
    question: str
    answer: str
    empty_question: str = ""
    empty_answer: str = ""
    first: str | None = None
    first_with_system: str | None = None
    before_answer: str = ""
    is_single: bool = False
    needs_first: bool = False
    writes_empty: bool = False
    is_for_training_only: bool = False
    stops_at_sep: bool = False

    def first_question(self, has_system: bool) -> str:
        """Returns the piece of the first question."""
        with_system = self.first_with_system if has_system else None
        return next(piece for piece in (with_system, self.first, self.question) if piece is not None)


_ROLES = dict(
    head="{system}{sep}", question="{user}: {text}{sep}", answer="{assistant}: {text}{end}",
    empty_question="{user}:", empty_answer="{assistant}:", before_answer="{sep}{assistant}: ",
)
STYLES = {
    "SINGLE": Style("v0", **_ROLES, stops_at_sep=True),
    "TWO": Style("v1", **_ROLES),
    "LLAMA_2": Style(
        "llama_2", head="", question="{sep}[INST] {text} [/INST]", answer=" {text} {end}",
        first="[INST] {text} [/INST]", first_with_system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
        before_answer="[/INST] ", needs_first=True,
    ),
    "PLAIN": Style("plain", head="{system}", question="{text}{sep}", answer="", is_single=True,
                   is_for_training_only=True),
    # v1.0's training text differs from the prompts of its own template (quirk Q14).
    "V0": Style(
        "v0", head="{system}\n\n", question="### {user}: {text}\n", answer="### {assistant}: {text}\n",
        empty_question="### {user}:", empty_answer="### {assistant}:", writes_empty=True, is_for_training_only=True,
        stops_at_sep=True,
    ),
}
