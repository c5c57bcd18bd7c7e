"""Strict metrics: whether the answer to a closed, an open or a multiple-choice question is right.

`reader.py` reads all answers, of all kinds and all models, in the same way. A multiple-choice answer is a letter ("B",
"b.", "(B)", "B: left lung", "B - left lung", "B (left lung)") or the text of an option, and nothing more. A longer or
ambiguous answer is unread: it counts as wrong, and the number of unread answers is reported. Longer answers are not
interpreted, because guesses would make two evaluations of the same answers disagree.
"""

import re
from collections import Counter
from collections.abc import Sequence

from llavamed_jax.datasets.sample import CHOICE, CLOSED, LETTERS, OPEN, VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.scoring import polarity, reader
from llavamed_jax.evaluation.scoring.metric import Answered, Metric

_LETTER = re.compile(r"([a-z])\)?|\(([a-z])\)|\[([a-z])\]", re.I)
_LETTER_AND_TEXT = re.compile(r"(?:([a-z])(?:[.,:;)]|\s+-|(?=\s+\())|\(([a-z])\)|\[([a-z])\])\s*(.+)", re.I | re.S)


def is_strictly_right(prediction: str, answer: str) -> bool:
    """Returns whether a closed answer is right: it is the gold, or begins with the right yes or no and not the other.

    A Chinese gold such as "包含" means yes, so any Chinese word for yes is right. An empty prediction is wrong, and so
    is any prediction for an empty gold.
    """
    gold = polarity.of_gold(answer)
    return polarity.said(prediction, answer) == gold if gold else reader.says(prediction, answer)


def is_unread(prediction: str, answer: str) -> bool:
    """Returns whether the gold of a closed answer is yes or no, and the answer says neither, or both."""
    return polarity.of_gold(answer) is not None and polarity.said(prediction, answer) is None


def open_scores(prediction: str, answer: str) -> tuple[bool, float]:
    """Scores an open answer.

    Returns:
      Whether the prediction says the gold, in any form; and the F1 of the multisets of normalised words (of Chinese,
      characters), which is 1 if the prediction says the gold, and 0 if one of them is empty.
    """
    if reader.says(prediction, answer):
        return True, 1.0
    predicted = Counter(reader.words(reader.comparable(reader.readings(prediction)[-1])))
    gold = Counter(reader.words(reader.plain(answer)))
    return False, 2 * (predicted & gold).total() / max(1, predicted.total() + gold.total())


def read_choice(text: str, options: Sequence[str], asks_letter: bool = False) -> int | None:
    """Returns the index of the option that an answer names; None if it names none or is ambiguous.

    Args:
      text: the answer.
      options: the texts of the options.
      asks_letter: whether the prompt asks for a letter. Then "B" is the second option, even if another option's text is
        "B".
    """
    letters = (_LETTER.fullmatch(reader.readings(text, has_letters=True)[-1]) if asks_letter else None)
    if letters and (named := _named(letters.groups(), options)):
        return named.pop()
    found = set().union(*(_named_by(each, options) for each in reader.readings(text, has_letters=True)))
    return found.pop() if len(found) == 1 else None


def asks_letter(question: str) -> bool:
    """Returns whether the last line of a prompt, which says how to answer, asks for a letter."""
    return "letter" in question.rstrip().rsplit("\n", 1)[-1].lower()


def _named_by(text: str, options: Sequence[str]) -> set[int]:
    """Returns the indices of all options that a complete clean text may stand for."""
    found = {place for place, option in enumerate(options) if _is_same(text, option)}
    if letter := _LETTER.fullmatch(text):
        found |= _named(letter.groups(), options)
    if both := _LETTER_AND_TEXT.fullmatch(text):
        of_text = {place for place, option in enumerate(options) if _is_same(both[4], option)}
        # A letter and the text of another option are two readings; a letter before any other text is no reading.
        found |= of_text | _named(both.groups()[:3], options) if of_text else set()
    return found


def _named(letters: Sequence[str | None], options: Sequence[str]) -> set[int]:
    place = LETTERS.index(next(filter(None, letters)).upper())
    return {place} if place < len(options) else set()


def _is_same(text: str, option: str) -> bool:
    return reader.is_same(reader.clean(text), reader.clean(option))


def right_choice(sample: VqaSample) -> int:
    """Returns the index of the right option.

    Raises:
      UserError: the question has fewer than two options or too many for letters, or not exactly one of them is the
        answer.
    """
    options = sample.options
    if not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"question {sample.question_id} has {len(options)} options; 2 to {len(LETTERS)} were expected")
    if sample.right is not None and 0 <= sample.right < len(options):
        return sample.right
    places = [place for place, option in enumerate(options) if option == sample.answer]
    places = places or [place for place, option in enumerate(options) if _is_same(sample.answer, option)]
    if len(places) != 1:
        raise UserError(f"question {sample.question_id} has the answer {sample.answer!r}, which equals {len(places)} "
                        f"of its {len(options)} options; exactly one was expected")
    return places[0]


def open_values(answered: Answered) -> dict[str, float]:
    """Returns the metrics of an open answer."""
    return dict(zip(("open_exact", "open_f1"), open_scores(answered.text, str(answered.sample.answer)), strict=True))


def closed_values(answered: Answered) -> dict[str, float]:
    """Returns the metric of a closed answer."""
    return {"closed_accuracy": is_strictly_right(answered.text, str(answered.sample.answer))}


def choice_values(answered: Answered) -> dict[str, float]:
    """Returns the metric of an answer to a multiple-choice question."""
    return {"choice_accuracy": answered.choice == right_choice(answered.sample)}


CLOSED_METRICS = Metric("strict", CLOSED, ("closed_accuracy",), closed_values, is_always_listed=True)
OPEN_METRICS = Metric("strict", OPEN, ("open_exact", "open_f1"), open_values, is_always_listed=True)
CHOICE_METRICS = Metric("strict", CHOICE, ("choice_accuracy",), choice_values)
