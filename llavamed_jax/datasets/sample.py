"""A question about an image, from any data set, and checks that the readers of data sets share.

Each set has its own reader (`vqa_rad`, `slake`, `pathvqa`, `llava_med`, `choices`, `captions`), which returns a list of
`VqaSample`. `to_llava` makes a training record from a sample.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

from llavamed_jax.errors import UserError, exists, some
from llavamed_jax.images.load import split_frame
from llavamed_jax.text.conversation import IMAGE_MARKER

OPEN, CLOSED, CHOICE, CAPTION = "OPEN", "CLOSED", "CHOICE", "CAPTION"
LETTERS = ascii_uppercase  # letters of multiple-choice options

Labels = str | tuple[str, ...] | None
"""What a set says of a question's type, organ or modality: a text, several texts, or nothing."""


@dataclass(frozen=True)
class VqaSample:
    """One question about one image or several.

    Attributes:
      question_id: the id in the data set; `frame-ID` for the rephrasing of question ID.
      image: the path of the image, or of the first one.
      question: the complete question. A multiple-choice question includes its options and how to answer
        (`choices.prompt`).
      answer: the published text (integers as text). For multiple choice the text of the right option; for a caption
        the reference.
      answer_type: OPEN, CLOSED, CHOICE or CAPTION.
      question_type: as published, with typos corrected; several texts if the set has a list; None if it has none.
      organ: as published, likewise.
      modality: as published, likewise.
      language: the language of the question.
      phrase_type: VQA-RAD's field; None in other sets.
      options: for multiple choice, the texts of the options A, B, C, …
      more_images: the paths of the further images, in order.
      right: for multiple choice, the index of the right option, if the set states it; None if `answer` tells it.
      lines: for multiple choice, the options as the prompt lists them; () means "A. …".
      is_placed: whether the images stand at the `<image>` markers of `question`. If not, they stand before the text.
      source: what further questions may come from, such as a video; None if only common images connect questions.
    """

    question_id: int | str
    image: Path
    question: str
    answer: str
    answer_type: str
    question_type: Labels = None
    organ: Labels = None
    modality: Labels = None
    language: str = "en"
    phrase_type: str | None = None
    options: tuple[str, ...] = ()
    more_images: tuple[Path, ...] = ()
    right: int | None = None
    lines: tuple[str, ...] = ()
    is_placed: bool = False
    source: str | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """The paths of all images."""
        return (self.image, *self.more_images)

    @property
    def right_place(self) -> int | None:
        """For multiple choice, the index of the right option."""
        return self.options.index(self.answer) if self.right is None and self.options else self.right


def all_images(samples: Iterable[VqaSample]) -> list[Path]:
    """Returns the paths of all images of some questions, in order, with repetitions."""
    return [image for sample in samples for image in sample.images]


def clusters(samples: Sequence[VqaSample]) -> list[str]:
    """Returns, for each question, the name of its cluster: the first image of all questions that are connected to it.

    Questions are connected if they share an image or a source, also through other questions. If each question has one
    image, the name is the image's path.
    """
    first: dict[object, int] = {}  # an image or a source -> the first question that has it
    root = list(range(len(samples)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, sample in enumerate(samples):
        for key in (*map(str, sample.images), *([(sample.source,)] if sample.source else [])):
            low, high = sorted((find(first.setdefault(key, i)), find(i)))
            root[high] = low
    return [str(samples[find(i)].image) for i in range(len(samples))]


Shown = tuple[str, ...]
"""What a question is asked about: the paths of its images."""


def own_images(samples: Iterable[VqaSample]) -> list[Shown]:
    """Returns the paths of each question's own images."""
    return [tuple(map(str, sample.images)) for sample in samples]


def to_llava(sample: VqaSample) -> dict:
    """Returns a question as a training record, with the images first unless the question says where they stand.

    The answer to a multiple-choice question is the letter, as the question asks.
    """
    answer = LETTERS[sample.right_place] if sample.answer_type == CHOICE else sample.answer
    images = [str(image) for image in sample.images]
    question = (sample.question if sample.is_placed
                else f"{IMAGE_MARKER}\n" * len(images) + sample.question.replace(IMAGE_MARKER, "").strip())
    return {"id": sample.question_id, "image": images, "answer_type": sample.answer_type,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_images(images: Sequence[Path]) -> None:
    """Checks that image files exist. A path may end with `#frame=N`, which is not part of the file's name.

    Raises:
      UserError: an image does not exist. The error names the first one and says how many are missing.
    """
    images = dict.fromkeys(map(Path, images))
    missing = [image for image in images if not image.is_file() and not Path(split_frame(str(image))[0]).is_file()]
    if missing:
        more = f"; {len(missing)} of {len(images)} images are missing" if len(missing) > 1 else ""
        raise UserError(f"the image {missing[0]} {'is not a file' if exists(missing[0]) else 'does not exist'}{more}")


def first_names(images: Iterable[str | Path]) -> dict[str, Path]:
    """Maps each path to the first of the paths that is the same file: `x/../0.png`, a link and `0.png` are one image.

    Each frame (`#frame=N`) is a separate image.
    """
    found, first = {}, {}
    for image in dict.fromkeys(map(str, images)):
        file = image if os.path.exists(image) else split_frame(image)[0]
        found[image] = first.setdefault((os.path.realpath(file), image[len(file):]), Path(image))
    return found


def one_name_each(*groups: Sequence[VqaSample]) -> list[list[VqaSample]]:
    """Returns the same samples with one path for each image, because all later code compares images by their paths."""
    names = first_names(image for samples in groups for image in all_images(samples))

    def named(sample: VqaSample) -> VqaSample:
        first, *others = [names[str(image)] for image in sample.images]
        return (sample if (first, *others) == sample.images
                else replace(sample, image=first, more_images=tuple(others)))

    return [[named(sample) for sample in samples] for samples in groups]


def check_ids(samples: Iterable[VqaSample], name: str) -> None:
    """Checks that ids are unique, because predictions are joined by them (10 and "10" are the same id).

    Args:
      samples: the questions.
      name: what an error calls the questions.

    Raises:
      UserError: several questions have the same id. The error lists such ids.
    """
    counts = Counter(str(sample.question_id) for sample in samples)
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled:
        raise UserError(f"{name} has {len(doubled)} ids that more than one question has ({some(doubled)}); a different "
                        "id for each question was expected")


KINDS = (CLOSED, OPEN, CHOICE, CAPTION)


def kinds(samples: Iterable[VqaSample]) -> list[str]:
    """Returns the kind of each question, one of `KINDS`. Raises UserError for any other answer type."""
    found = []
    for sample in samples:
        found.append(sample.answer_type.strip().upper())
        if found[-1] not in KINDS:
            raise UserError(f"question {sample.question_id} has the answer type {sample.answer_type!r}; CLOSED, OPEN, "
                            "CHOICE or CAPTION was expected")
    return found


def of_kind(samples: Sequence[VqaSample], kind: str) -> list[VqaSample]:
    """Returns the questions of one kind, one of `KINDS`. Raises UserError for an unknown answer type."""
    return [sample for sample, found in zip(samples, kinds(samples), strict=True) if found == kind]
