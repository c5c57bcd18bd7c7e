"""A question about an image, whatever set it comes from; and what the readers of those sets share.

Each set has a reader of its own (`vqa_rad`, `slake`, `pathvqa`, `llava_med`, `choices`, `captions`), which gives a list of
`VqaSample`. `to_llava` makes a training record of one. What is wrong with a row is said with its place.
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
LETTERS = ascii_uppercase  # of the options of multiple choice
_OPEN_OR_CLOSED = {OPEN: OPEN, CLOSED: CLOSED}


@dataclass(frozen=True)
class VqaSample:
    """One question about one image.

    Attributes:
      question_id: the set's own; `frame-ID` for the rephrasing of question ID.
      question: what is asked, whole: of multiple choice with its options and how to answer (`choices.prompt`).
      answer: text as published (integers as text); of multiple choice the text of the right option, of a caption the reference.
      answer_type: OPEN, CLOSED, CHOICE or CAPTION.
      question_type, organ, modality, language, phrase_type: as published with typos mended, None where a set has none.
      options: of multiple choice, the texts of A, B, C, …
    """

    question_id: int | str
    image: Path
    question: str
    answer: str
    answer_type: str
    question_type: str | None = None
    organ: str | None = None
    modality: str | None = None
    language: str = "en"
    phrase_type: str | None = None
    options: tuple[str, ...] = ()


def to_llava(sample: VqaSample) -> dict:
    """The training record of a question, image first. The answer to multiple choice is the letter, as its question asks."""
    answer = LETTERS[sample.options.index(sample.answer)] if sample.answer_type == CHOICE else sample.answer
    question = sample.question.replace(IMAGE_MARKER, "").strip()
    return {"id": sample.question_id, "image": [str(sample.image)], "answer_type": sample.answer_type, "conversations": [
        {"from": "human", "value": f"{IMAGE_MARKER}\n{question}"}, {"from": "gpt", "value": answer}]}


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_images(images: Iterable[Path]) -> None:
    """Raises UserError that names the first image that does not exist and says how many there are. `#frame=N` is no part of
    a file's name."""
    images = dict.fromkeys(map(Path, images))
    missing = [image for image in images if not image.is_file() and not Path(split_frame(str(image))[0]).is_file()]
    if missing:
        more = f", nor do {len(missing) - 1} of the other {len(images) - 1}" if len(missing) > 1 else ""
        raise UserError(f"the image {missing[0]} {'is no file' if exists(missing[0]) else 'does not exist'}{more}")


def first_names(images: Iterable[str | Path]) -> dict[str, Path]:
    """Each path -> the first of the paths that is the same file: `x/../0.png`, a link and `0.png` are one image.

    A frame (`#frame=N`) is an image of its own.
    """
    found, first = {}, {}
    for image in dict.fromkeys(map(str, images)):
        file = image if os.path.exists(image) else split_frame(image)[0]
        found[image] = first.setdefault((os.path.realpath(file), image[len(file):]), Path(image))
    return found


def one_name_each(*groups: Sequence[VqaSample]) -> list[list[VqaSample]]:
    """The same samples, each image under one path in all of them: what follows knows an image by its path."""
    names = first_names(sample.image for samples in groups for sample in samples)
    return [[sample if names[str(sample.image)] == sample.image else replace(sample, image=names[str(sample.image)]) for sample in samples]
            for samples in groups]


def check_ids(samples: Iterable[VqaSample], name: str) -> None:
    """Raises UserError that lists ids which several questions have: predictions are joined by them (10 and "10" are one)."""
    counts = Counter(str(sample.question_id) for sample in samples)
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled:
        raise UserError(f"{name} has {len(doubled)} ids that several questions have ({some(doubled)}); each its own was expected")


KINDS = (CLOSED, OPEN, CHOICE, CAPTION)


def kind(sample: VqaSample) -> str:
    """One of `KINDS`. Raises UserError for an answer type that is none of them."""
    name = sample.answer_type.strip().upper()
    if name not in KINDS:
        raise UserError(f"question {sample.question_id} has the answer type {sample.answer_type!r}; CLOSED, OPEN, CHOICE or CAPTION"
                        " was expected")
    return name
