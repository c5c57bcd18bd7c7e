"""Finds what of an evaluation's questions occurs in training data.

Images are compared by what they show (`near`), so copies that were resized, compressed or turned grey are found. Texts
are compared in lower case without punctuation. A pair of question and answer that occurs about another picture ("Is
there a fracture?" "No.") proves nothing; it counts apart from one about the same picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from llavamed_jax.curation.inspect import near
from llavamed_jax.curation.inspect.gather import Row, folded
from llavamed_jax.curation.inspect.pictures import Pictures
from llavamed_jax.datasets.sample import VqaSample

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
        self.keys = [(folded(sample.question), folded(str(sample.answer))) for sample in self.samples]
        self._questions = {question for question, _ in self.keys}
        self._pairs = set(self.keys)

    def see(self, row: Row) -> None:
        """Notes the pairs of a training record that the evaluation has too."""
        for question, answer in row.pairs:
            key = folded(question), folded(answer)
            if key[0] in self._questions:
                self.asked[key[0]].update(row.images or ("",))
                if key in self._pairs:
                    self.answered[key].update(row.images or ("",))


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
    for sample, key in zip(texts.samples, texts.keys, strict=True):
        path = next((str(image) for image in sample.images if str(image) in matches), "")
        counts["same_question_and_answer_anywhere"] += bool(texts.answered.get(key))
        if path not in matches:
            continue
        is_asked = bool(texts.asked.get(key[0], set()) & shows[path])
        is_answered = bool(texts.answered.get(key, set()) & shows[path])
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
