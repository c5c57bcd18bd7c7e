"""Counts questions whose images or answers occur in training data.

`leakage` compares the questions with the training rows of the same data set, by the names of the image files.
`trained_on` compares them with the data that a model was really trained on (`data.trained_on` of an eval config). The
same picture may have another name there, so files are compared by their bytes and pictures by their pixels; a copy that
was saved again without loss is found.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from llavamed_jax.datasets.listed import read_listed
from llavamed_jax.datasets.sample import OPEN, VqaSample, all_images, kinds, of_kind
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.metrics import normalized
from llavamed_jax.images.load import load_image
from llavamed_jax.utils.files import open_file
from llavamed_jax.utils.hashes import sha256, short_hash
from llavamed_jax.utils.progress import progress

_THREADS = 8  # reading and decoding release Python's lock


def leakage(samples: Sequence[VqaSample], training: Sequence[VqaSample]) -> dict:
    """Counts the images, questions and open answers that also occur in the training rows; returns totals too."""
    images = set(map(str, all_images(training)))
    open_samples = of_kind(samples, OPEN)
    asked, answered = {*_questions(training)}, {*_answers(training)}
    tested_images = set(map(str, all_images(samples)))
    return {
        "training_rows": len(training),
        "images": len(tested_images),
        "images_in_training": len(tested_images & images),
        "questions": len(samples),
        "questions_in_training": sum(question in asked for question in _questions(samples)),
        "open_questions": len(open_samples),
        "open_answers_on_same_image_in_training": sum(answer in answered for answer in _answers(open_samples)),
    }


def _questions(samples: Sequence[VqaSample]) -> list[tuple[str, str]]:
    """Returns the image and the normalised question of each sample."""
    return list(zip([str(s.image) for s in samples], normalized([s.question for s in samples]), strict=True))


def _answers(samples: Sequence[VqaSample]) -> list[tuple[str, str]]:
    """Returns the image and the normalised answer of each sample."""
    return list(zip([str(s.image) for s in samples], normalized([s.answer for s in samples]), strict=True))


def trained_on(samples: Sequence[VqaSample], data: TrainingData) -> dict:
    """Counts the questions whose image, or image and answer, occur in the records that a model was trained on.

    An answer counts if a record about the same picture has a turn that equals it after normalisation; a letter stands
    for the option that the record's own question lists under it. A conversation that only mentions the answer does not
    count, so the count is a lower bound.

    Args:
      samples: the questions.
      data: the training data.

    Returns:
      `records`, `records_not_readable`, `training_images`, `training_images_not_readable` (files that are missing or
      not images); `images`, of which `images_same_file` occur with equal bytes and `images_same_pixels` only with equal
      pixels; `by_kind`: kind of question -> `questions`, `image_in_training`, `image_and_answer_in_training`.
    """
    answers, num_records, num_damaged = _answers_by_image(data)
    tested = dict.fromkeys(map(str, all_images(samples)))
    matches = _Matches(list(tested), list(answers))
    found = {image: set().union(*(answers[other] for other in matches.of(image))) for image in tested
             if matches.of(image)}
    table = defaultdict(Counter)
    for sample, kind, (_, answer) in zip(samples, kinds(samples), _answers(samples), strict=True):
        seen = [found[str(image)] for image in sample.images if str(image) in found]
        row = table[kind]
        row["questions"] += 1
        row["image_in_training"] += bool(seen)
        row["image_and_answer_in_training"] += any(answer in answers for answers in seen)
    return {
        "records": num_records,
        "records_not_readable": num_damaged,
        "training_images": len(answers),
        "training_images_not_readable": matches.num_unreadable,
        "images": len(tested),
        "images_same_file": len(matches.same_file),
        "images_same_pixels": len(found) - len(matches.same_file),
        "by_kind": {name: dict(row) for name, row in table.items()},
    }


def identity(data: TrainingData) -> str:
    """Returns a hash of what `trained_on` reads: the text of the records, and size and time of each image's file."""
    images = dict.fromkeys(str(image) for record in data.readable() for image in record["image"])
    return short_hash(data.fingerprint(), _map(_state, images))


def _answers_by_image(data: TrainingData) -> tuple[dict[str, set[str]], int, int]:
    """Returns the normalised answers about each image, the number of records, and the number of unreadable ones."""
    answers, readable = defaultdict(set), 0
    for record in data.readable():
        readable += 1
        answered = normalized(list(_said(record["conversations"])))
        for image in record["image"]:
            answers[str(image)].update(answered)
    return dict(answers), data.num_records, data.num_records - readable


def _said(turns: Sequence[Mapping]) -> Iterator[str]:
    """Yields the answers of a conversation, the text of an option for its letter."""
    asked = ""
    for turn in turns:
        if turn["from"] == "gpt":
            yield read_listed(asked).named(turn["value"])
        else:
            asked = turn["value"]


class _Matches:
    """Finds the training images that equal a tested image.

    Files are hashed only if their sizes match, and decoded only if width and height match and the bytes differ; each
    file at most once.

    Attributes:
      same_file: tested image -> the training images with equal bytes.
      same_pixels: tested image -> the training images with equal pixels and other bytes.
      num_unreadable: number of training images that are missing or not images.
    """

    def __init__(self, tested: Sequence[str], training: Sequence[str]):
        paths = list(dict.fromkeys([*tested, *training]))
        sizes = dict(zip(paths, _map(_size, paths), strict=True))
        shapes = dict(zip(paths, _map(_shape, paths), strict=True))
        self.num_unreadable = sum(shapes[image] is None for image in training)
        same_size = _alike(tested, training, sizes)
        digests = dict(zip(same_size, _map(_digest, same_size, "image files compared"), strict=True))
        self.same_file = _equal(tested, training, digests)
        # A training image is not decoded if all tested images of its shape have the same bytes.
        files = {shapes[image]: {digests.get(other) for other in tested if shapes[other] == shapes[image]}
                 for image in tested}
        unsettled = [image for image in training if files.get(shapes[image], set()) - {digests.get(image, image)}]
        same_shape = _alike(tested, unsettled, shapes)
        self.same_pixels = _equal(tested, unsettled,
                                  dict(zip(same_shape, _map(_pixels, same_shape, "pictures compared"), strict=True)))

    def of(self, image: str) -> list[str]:
        """Returns the training images that equal `image`."""
        return self.same_file.get(image, []) + self.same_pixels.get(image, [])


def _alike(tested: Sequence[str], training: Sequence[str], of: Mapping[str, object]) -> list[str]:
    """Returns the images of both sides that have the same property `of` as an image of the other side."""
    common = {of[image] for image in tested} & {of[image] for image in training} - {None}
    return [image for image in dict.fromkeys([*tested, *training]) if of[image] in common]


def _equal(tested: Sequence[str], training: Sequence[str], digests: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Returns, for each tested image that has any, the training images with the same digest."""
    by_digest = defaultdict(list)
    for image in training:
        if digests.get(image) is not None:
            by_digest[digests[image]].append(image)
    return {image: by_digest[digests[image]] for image in tested if digests.get(image) in by_digest}


def _map(read: Callable, paths: Iterable[str], title: str = "") -> list:
    paths = list(paths)
    advance, close = progress(len(paths), 0, title) if title and paths else ((lambda count: None), (lambda: None))
    result = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for value in pool.map(read, paths):
            result.append(value)
            advance(1)
    close()
    return result


def _file(image: str) -> str:
    return image.partition("#frame=")[0] if not Path(image).exists() else image


def _state(image: str) -> list:
    """Returns the path, the size in bytes and the time of change of a file; None for both if it is missing."""
    try:
        state = Path(_file(image)).stat()
    except (OSError, ValueError):
        return [image, None, None]
    return [image, state.st_size, state.st_mtime_ns]


def _size(image: str) -> tuple[int, str] | None:
    """Returns the size of a file in bytes, and the frame if the path names one; None if the file is missing."""
    try:
        return Path(_file(image)).stat().st_size, image[len(_file(image)):]
    except (OSError, ValueError):
        return None


def _digest(image: str) -> str | None:
    try:
        with open_file(_file(image)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() + image[len(_file(image)):]
    except (OSError, ValueError):  # UserError is a ValueError
        return None


def _shape(image: str) -> tuple[int, int] | None:
    """Returns width and height; None if the file is not an image.

    Pillow reads them from the first bytes of a file. Formats that Pillow does not know, such as DICOM, are decoded.
    """
    try:
        with open_file(_file(image)) as file, Image.open(file) as picture:
            return picture.size
    except (FileNotFoundError, UserError):  # the file is missing, or is a pipe or a device
        return None
    except (OSError, ValueError, Image.DecompressionBombError):
        with contextlib.suppress(UserError):
            return load_image(image).size
    return None


def _pixels(image: str) -> str | None:
    try:
        picture = load_image(image)
    except UserError:
        return None
    return sha256(repr(picture.size).encode() + picture.tobytes())
