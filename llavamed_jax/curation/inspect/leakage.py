"""Finds what of an evaluation's questions occurs in training data.

Images are compared by what they show (`near`), so copies that were resized, compressed or turned grey are found. Texts
are compared in lower case without punctuation and image markers. Of multiple-choice questions, what is asked and the
text of the option are compared (`datasets.listed`), so that another order or form of the list changes nothing. A pair
of question and answer that occurs about another picture ("Is there a fracture?" "No.") proves nothing; it counts apart
from one about the same picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from llavamed_jax.curation.inspect import near
from llavamed_jax.curation.inspect.gather import Row, folded
from llavamed_jax.curation.inspect.pictures import Pictures
from llavamed_jax.datasets.listed import read_listed
from llavamed_jax.datasets.sample import CHOICE, LETTERS, VqaSample
from llavamed_jax.text.conversation import IMAGE_MARKER

ANSWERED = "same_question_and_answer_on_same_picture"


@dataclass
class Texts:
    """The questions and answers of training records that an evaluation has too.

    Args:
      samples: the questions of the evaluation.

    Attributes:
      asked: question -> the training images about which it is asked.
      answered: (question, answer) -> the training images about which it occurs; "" for a record without an image.
    """

    samples: Sequence[VqaSample]
    asked: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    answered: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self):
        self.keys = [_keys(sample) for sample in self.samples]
        self._questions = {question for pairs in self.keys for question, _ in pairs}
        self._pairs = {pair for pairs in self.keys for pair in pairs}

    def see(self, row: Row) -> None:
        """Notes the pairs of a training record that the evaluation has too."""
        images = row.images or ("",)
        for text, said in row.pairs:
            listed = read_listed(text)
            answers = {folded(said), folded(listed.named(said))}
            for question in self._questions & {folded(text), folded(listed.question)}:
                self.asked[question].update(images)
                for answer in answers:
                    if (question, answer) in self._pairs:
                        self.answered[question, answer].update(images)

    def asked_about(self, number: int) -> set[str]:
        """Returns the training images about which a question of the evaluation is asked."""
        return set().union(*(self.asked.get(question, ()) for question, _ in self.keys[number]))

    def answered_about(self, number: int) -> set[str]:
        """Returns the training images about which a question of the evaluation occurs with its answer."""
        return set().union(*(self.answered.get(pair, ()) for pair in self.keys[number]))


def _keys(sample: VqaSample) -> list[tuple[str, str]]:
    """Returns the folded pairs of question and answer that stand for a question.

    A multiple-choice question has two: what is asked with the text of its right option, and its whole text with the
    option's letter.
    """
    text, answer = sample.question.replace(IMAGE_MARKER, ""), str(sample.answer)
    if sample.answer_type != CHOICE:
        return list(dict.fromkeys((folded(each), folded(answer)) for each in (text, read_listed(text).question)))
    letter = LETTERS[sample.right_place]
    return [(folded(read_listed(text).question), folded(answer)), (folded(text), folded(letter))]


@dataclass
class Match:
    """A tested image and the closest training image that shows the same.

    Attributes:
      tested: the path of the tested image.
      training: the path of the closest training image.
      bits: number of bits in which their hashes differ, of 256.
      correlation: of their thumbnails.
      others: number of further training images that show the same.
      is_same_file: whether their bytes are equal.
      questions: number of questions about the tested image.
      asked: how many of them are asked about a training image that shows the same.
      answered: how many have the same answer there too.
    """

    tested: str
    training: str
    bits: int
    correlation: float
    others: int
    is_same_file: bool
    questions: int = 0
    asked: int = 0
    answered: int = 0


def compare(texts: Texts, tested: Pictures, training: Pictures) -> tuple[dict[str, int], list[Match]]:
    """Compares an evaluation with training data.

    Args:
      texts: the texts that both have.
      tested: the images of the evaluation.
      training: the images of the training data.

    Returns:
      Counts: `images`, `images_not_readable`, `images_same_file`, `images_same_picture` (in another file),
      `questions`, `questions_on_same_picture` (the picture occurs), `same_question_on_same_picture`,
      `same_question_and_answer_on_same_picture`, `same_question_and_answer_anywhere`; and the matches, in order.
    """
    found = near.matches(tested, training)
    shows = {tested.paths[i]: {training.paths[j] for j, _, _ in pairs} for i, pairs in found.items()}
    matches = {}
    for i, pairs in found.items():
        j, bits, correlation = pairs[0]
        is_same = bool(tested.files[i] == training.files[j])
        matches[tested.paths[i]] = Match(tested.paths[i], training.paths[j], bits, correlation, len(pairs) - 1, is_same)
    counts = dict.fromkeys(("questions_on_same_picture", "same_question_on_same_picture", ANSWERED,
                            "same_question_and_answer_anywhere"), 0)
    for number, sample in enumerate(texts.samples):
        asked, answered = texts.asked_about(number), texts.answered_about(number)
        path = next((str(image) for image in sample.images if str(image) in matches), "")
        counts["same_question_and_answer_anywhere"] += bool(answered)
        if path not in matches:
            continue
        is_asked = bool(asked & shows[path])
        is_answered = bool(answered & shows[path])
        matches[path].questions += 1
        matches[path].asked += is_asked
        matches[path].answered += is_answered
        counts["questions_on_same_picture"] += 1
        counts["same_question_on_same_picture"] += is_asked
        counts[ANSWERED] += is_answered
    same_file = sum(match.is_same_file for match in matches.values())
    counts = {"images": len(tested), "images_not_readable": sum(map(bool, tested.states)),
              "images_same_file": same_file, "images_same_picture": len(matches) - same_file,
              "questions": len(texts.samples), **counts}
    return counts, list(matches.values())
