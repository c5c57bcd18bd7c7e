"""Whether an answer is right, as the words promise: of a closed, an open or a multiple-choice question.

What an answer says is read by `reader.py`, the same for all three and for every model. A multiple-choice answer is the letter
("B", "b.", "(B)", "B: left lung", "B - left lung", "B (left lung)") or the text of an option, and nothing behind it. Whatever is
longer or may be read in two ways is unread: it counts as wrong, and is counted. Guessing what a longer answer may have meant is
what makes two evaluations of the same answers disagree.
"""

import re
from collections import Counter
from collections.abc import Sequence

from llavamed_jax.datasets.sample import CHOICE, CLOSED, LETTERS, OPEN, VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import reader
from llavamed_jax.evaluation.scoring.metric import Answered, Metric

_LETTER = re.compile(r"([a-z])\)?|\(([a-z])\)|\[([a-z])\]", re.I)
_LETTER_AND_TEXT = re.compile(r"(?:([a-z])(?:[.,:;)]|\s+-|(?=\s+\())|\(([a-z])\)|\[([a-z])\])\s*(.+)", re.I | re.S)


def normalized(text: object) -> str:
    """The original's evaluators lower and normalise both sides before the metric functions normalise them again."""
    return metrics.normalize_word(str(text).lower())


def comparable(text: object) -> str:
    """A text in the form that strict metrics compare."""
    return reader.comparable(reader.clean(text))


def is_strictly_right(prediction: str, answer: str) -> bool:
    """Whether a closed answer is the gold, or begins with the right one of yes and no and does not say the other.

    Neither an empty prediction nor any prediction for an empty gold is right.
    """
    gold = comparable(answer)
    return reader.yes_or_no(prediction) == gold if gold in ("yes", "no") else reader.says(prediction, answer)


def is_exactly_right(prediction: str, answer: str) -> bool:
    """Whether an open answer is the gold, whatever form it is written in."""
    return reader.says(prediction, answer)


def multiset_f1(prediction: str, answer: str) -> float:
    """F1 of the two multisets of normalised words; 1 where the prediction says the answer, 0 where either has no word."""
    if reader.says(prediction, answer):
        return 1.0
    predicted, gold = (Counter(reader.comparable(text).split()) for text in (reader.readings(prediction)[-1], reader.clean(answer)))
    return 2 * (predicted & gold).total() / max(1, predicted.total() + gold.total())


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names; None where it names none, or may be read as two."""
    found = set().union(*(_named_by(each, options) for each in reader.readings(text, has_letters=True)))
    return found.pop() if len(found) == 1 else None


def _named_by(text: str, options: Sequence[str]) -> set[int]:
    """Every option that the whole of a clean text may stand for."""
    found = {place for place, option in enumerate(options) if _is_same(text, option)}
    if letter := _LETTER.fullmatch(text):
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
    return comparable(text) == comparable(option) != ""


def right_choice(sample: VqaSample) -> int:
    """The place of the right option. Raises UserError where the options are fewer than two or hold the answer not exactly once."""
    options = sample.options
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"question {sample.question_id} has {len(options)} options; 2 to {len(LETTERS)} were expected")
    places = [place for place, option in enumerate(options) if option == sample.answer]
    places = places or [place for place, option in enumerate(options) if _is_same(sample.answer, option)]
    if len(places) != 1:
        raise UserError(f"question {sample.question_id} has the answer {sample.answer!r}, which {len(places)} of its {len(options)}"
                        " options are; one was expected")
    return places[0]


def open_values(answered: Answered) -> dict[str, float]:
    """The metrics of an open answer."""
    text, gold = answered.text, str(answered.sample.answer)
    return {"open_exact": is_exactly_right(text, gold), "open_f1": multiset_f1(text, gold)}


def closed_values(answered: Answered) -> dict[str, float]:
    """The metric of a closed answer."""
    return {"closed_accuracy": is_strictly_right(answered.text, str(answered.sample.answer))}


def choice_values(answered: Answered) -> dict[str, float]:
    """The metric of an answer to multiple choice."""
    return {"choice_accuracy": answered.choice == right_choice(answered.sample)}


CLOSED_METRICS = Metric("strict", CLOSED, ("closed_accuracy",), closed_values, is_always_listed=True)
OPEN_METRICS = Metric("strict", OPEN, ("open_exact", "open_f1"), open_values, is_always_listed=True)
CHOICE_METRICS = Metric("strict", CHOICE, ("choice_accuracy",), choice_values)
