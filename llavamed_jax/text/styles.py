"""The prompt format, written once: prompts, training text and exported chat templates are made from this table.

A style describes in pieces how turns become text. `text.conversation` fills the pieces in;
`checkpoints.export.chat_template` writes them as Jinja. A template (`text.templates`) is a style with roles, separators
and a system text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Style:
    """Describes how turns become one string.

    A piece is a format string. `{text}` is the turn's text, `{system}` the system text, `{user}` and `{assistant}` the
    names of the roles; `{sep}` ends a question and `{end}` an answer. `{thought}` is an answer's reasoning.

    Attributes:
      labels: the procedure that finds the supervised tokens: v0, v1, llama_2 or plain, which are the originals'
        (`preprocess_v1` and others in `llava/train/train.py`), or exact, which supervises the text of each answer and
        the token `{end}`.
      begin: the text before everything else, where the tokenizer puts no beginning-of-sequence token.
      head: the text before the turns; not written where the system text is None.
      question: a turn of the user.
      answer: a turn of the assistant.
      empty_question: a turn of the user without text.
      empty_answer: a turn of the assistant without text; it also opens the place of the answer to generate.
      first: the first question, if it differs from `question`.
      first_with_system: the first question, if there is a system text and the piece differs.
      last_answer: an answer that ends the text, if it differs from `answer`.
      before_answer: the text at which v1 and llama_2 split a round to find its answer.
      is_single: whether the prompt holds only one message.
      needs_first: whether the first message must have a text.
      writes_empty: whether a turn with an empty text is written as any other.
      is_for_training_only: whether the originals train with the style and never generate with it.
      stops_at_sep: whether `{sep}` ends an answer, so that generation stops there.
      is_trimmed: whether white space around the system text and each turn is dropped.
      thought_end: the text that ends the reasoning in an answer. `{text}` has nothing that stands before it.
      tokens: the special tokens that the pieces are written with, which the tokenizer must have.
    """

    labels: str
    head: str
    question: str
    answer: str
    empty_question: str = ""
    empty_answer: str = ""
    first: str | None = None
    first_with_system: str | None = None
    last_answer: str | None = None
    before_answer: str = ""
    is_single: bool = False
    needs_first: bool = False
    writes_empty: bool = False
    is_for_training_only: bool = False
    stops_at_sep: bool = False
    is_trimmed: bool = False
    thought_end: str | None = None
    tokens: tuple[str, ...] = ()
    begin: str = ""

    def first_question(self, has_system: bool) -> str:
        """Returns the piece of the first question."""
        with_system = self.first_with_system if has_system else None
        return next(piece for piece in (with_system, self.first, self.question) if piece is not None)

    def answer_at(self, is_last: bool) -> str:
        """Returns the piece of an answer, which may differ where the answer ends the text."""
        return self.last_answer if is_last and self.last_answer is not None else self.answer


_ROLES = dict(
    head="{system}{sep}", question="{user}: {text}{sep}", answer="{assistant}: {text}{end}",
    empty_question="{user}:", empty_answer="{assistant}:", before_answer="{sep}{assistant}: ",
)
_CHATML = Style(
    "exact", head="<|im_start|>system\n{system}{sep}\n", question="<|im_start|>{user}\n{text}{sep}\n",
    answer="<|im_start|>{assistant}\n{text}{end}\n", empty_answer="<|im_start|>{assistant}\n", writes_empty=True,
    tokens=("<|im_start|>", "<|im_end|>"),
)
# Qwen3 asked with `enable_thinking=False`: an empty think block stands before the answer to generate, and before the
# answer that ends a text; earlier answers have none.
_THOUGHT = "<|im_start|>{assistant}\n<think>\n{thought}\n</think>\n\n"
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_SYSTEM, _QUESTION, _ANSWER = (_HEADER.format(role) for role in ("system", "{user}", "{assistant}"))
_LLAMA_3 = Style(
    "exact", head=_SYSTEM + "{system}{sep}", question=_QUESTION + "{text}{sep}", answer=_ANSWER + "{text}{end}",
    empty_answer=_ANSWER, writes_empty=True, is_trimmed=True,
    tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
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
    # The chat templates of language models (`hf:` in text.templates).
    "CHATML": _CHATML,
    "CHATML_NO_THINK": replace(
        _CHATML, empty_answer=_THOUGHT.replace("{thought}", ""), last_answer=_THOUGHT + "{text}{end}\n",
        thought_end="</think>", tokens=(*_CHATML.tokens, "<think>", "</think>"),
    ),
    "LLAMA_3": _LLAMA_3,
    # With the day that the template itself names where none is given.
    "LLAMA_3_1": replace(
        _LLAMA_3, head=_SYSTEM + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}{sep}"),
    # Its headers are no tokens of their own. The template writes the beginning of the sequence, which is the token that
    # ends an answer too, and the tokenizer none.
    "OLMO_2": Style(
        "exact", begin="<|endoftext|>", head="<|system|>\n{system}{sep}", question="{user}\n{text}{sep}",
        answer="{assistant}\n{text}{end}\n", last_answer="{assistant}\n{text}{end}", empty_answer="{assistant}\n",
        writes_empty=True, tokens=("<|endoftext|>",),
    ),
}
