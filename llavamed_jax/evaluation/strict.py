"""Whether an answer is right, as the words promise: of a closed, an open or a multiple-choice question.

A multiple-choice answer is read by a grammar and by nothing else, the same for every model: the letter ("B", "b.", "(B)",
"B: left lung"), the text of an option, or either after "Answer:", "The answer is", "Option". Whatever is longer or may be
read in two ways is unread: it counts as wrong, and is counted. Guessing what a longer answer may have meant is what makes
two evaluations of the same answers disagree.
"""

import re
from collections import Counter
from collections.abc import Sequence

from llavamed_jax.data.questions import LETTERS, VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import metrics

_LEAD = re.compile(r"(?:the )?(?:final |correct |best )?(?:answer|option|choice)(?: is)?(?:\s*:\s*|\s+)(?:option |choice )?", re.I)
_LETTER = re.compile(r"([a-z])\)?|\(([a-z])\)|\[([a-z])\]", re.I)
_LETTER_AND_TEXT = re.compile(r"(?:([a-z])[.:)]|\(([a-z])\)|\[([a-z])\])\s*(.+)", re.I | re.S)


def normalized(text: object) -> str:
    """The original's evaluators lower and normalise both sides before the metric functions normalise them again."""
    return metrics.normalize_word(str(text).lower())


def is_strictly_right(prediction: str, answer: str) -> bool:
    """Whether the normalised prediction is the normalised answer, or its first word is the right one of yes and no."""
    predicted, gold = normalized(prediction), normalized(answer)
    return predicted == gold or (gold in ("yes", "no") and predicted.split()[:1] == [gold])


def multiset_f1(prediction: str, answer: str) -> float:
    """F1 of the two multisets of normalised words; two empty ones are equal."""
    predicted, gold = Counter(normalized(prediction).split()), Counter(normalized(answer).split())
    if not predicted and not gold:
        return 1.0
    return 2 * (predicted & gold).total() / (predicted.total() + gold.total())


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names; None where it names none, or may be read as two."""
    text = text.replace("**", "").strip()  # bold in Markdown
    lead = _LEAD.match(text)
    found = _readings(text, options) | (_readings(text[lead.end():], options) if lead else set())
    return found.pop() if len(found) == 1 else None


def _readings(text: str, options: Sequence[str]) -> set[int]:
    """Every option that the whole of a text may stand for."""
    found = {place for place, option in enumerate(options) if _is_same(text, option)}
    if letter := _LETTER.fullmatch(text.rstrip(".:, ")):
        found |= _named(letter.groups(), options)
    if both := _LETTER_AND_TEXT.fullmatch(text):
        of_text = {place for place, option in enumerate(options) if _is_same(both[4], option)}
        # Letter and text of different options are two readings; a letter before any other text is none.
        found |= of_text | _named(both.groups()[:3], options) if of_text else set()
    return found


def _named(letters: Sequence[str | None], options: Sequence[str]) -> set[int]:
    place = LETTERS.index(next(filter(None, letters)).upper())
    return {place} if place < len(options) else set()


def _is_same(text: str, option: str) -> bool:
    if text.strip().lower() == option.strip().lower():
        return True
    return normalized(text) == normalized(option) != ""  # what normalises to nothing, such as "A", equals itself only


def right_choice(sample: VqaSample) -> int:
    """The place of the right option. Raises UserError where the options are fewer than two or hold the answer not exactly once."""
    options = sample.options
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"question {sample.question_id} has {len(options)} options; 2 to {len(LETTERS)} were expected")
    places = [place for place, option in enumerate(options) if option == sample.answer]
    places = places or [place for place, option in enumerate(options) if normalized(option) == normalized(sample.answer)]
    if len(places) != 1:
        raise UserError(f"question {sample.question_id} has the answer {sample.answer!r}, which {len(places)} of its {len(options)}"
                        " options are; one was expected")
    return places[0]
