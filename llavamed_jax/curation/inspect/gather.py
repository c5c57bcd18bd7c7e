"""Counts what a training file holds, in one pass over its records."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llavamed_jax.curation.figure_file import FigureFile, domain_of
from llavamed_jax.curation.inspect.verbs import verb_and_noun
from llavamed_jax.datasets import training
from llavamed_jax.datasets.records import FileRecords, MemoryRecords
from llavamed_jax.errors import UserError
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils.files import open_file
from llavamed_jax.utils.hashes import sha256

NOT_STATED = "not stated"
LENGTHS = ("record", "question", "answer")
_HEAD = 2**20  # bytes by which a file is recognised
_STEP = 1000  # records after which the progress is shown
_MOST_SENTENCES = 20  # sentences about damaged records that are kept


@dataclass
class Row:
    """A record: of a training file, of a data set, or of a figure.

    Attributes:
      identity: its id.
      images: the paths of its images.
      pairs: its questions and answers without image markers. A figure has one pair without a question.
      domain: the name of its domain, or `NOT_STATED`.
      licence: its licence, or `NOT_STATED`.
    """

    identity: str
    images: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    domain: str = NOT_STATED
    licence: str = NOT_STATED


class Source:
    """The records of a file or of a data set, by number.

    Args:
      path: a LLaVA file, a file of figures, or a data set in its own layout.
      images: the folder of the images; None means the folder of the layout.

    Raises:
      UserError: the file does not exist, or holds no records.
    """

    def __init__(self, path: Path, images: Path | None):
        self.path, self._images = path, images if images is not None else path.parent
        self._figures = self._data = None
        if path.is_file() and _is_of_figures(path):
            self._figures = FigureFile(path)
        else:
            self._data = training.read_training(path, images)
            (records,) = self._data.sources
            if not isinstance(records, (FileRecords, MemoryRecords)):
                raise UserError(f"{path} holds shards; the file from which the shards were made was expected")
            self._file = open_file(records.path) if isinstance(records, FileRecords) else None

    def __len__(self) -> int:
        return len(self._figures) if self._figures is not None else self._data.num_records

    @property
    def kind(self) -> str:
        """What the records are."""
        return "figures" if self._figures is not None else "records"

    def __getitem__(self, number: int) -> Row:
        """Reads a record. Raises UserError, which names it, if it is damaged."""
        if self._figures is not None:
            try:
                figure = self._figures[number]
            except ValueError as error:
                raise UserError(f"record {number} of {self.path} is {error}") from None
            return Row(figure.pair_id, [str(self._images / figure.image)], [("", figure.caption)],
                       figure.domain, figure.licence or NOT_STATED)
        record = self._data.record(number)
        turns = [turn["value"].replace(IMAGE_MARKER, "").strip() for turn in record["conversations"]]
        turns = turns[record["conversations"][0]["from"] == "gpt":]
        raw = self._raw(number)
        domain = domain_of(raw.get("domain")) if raw.get("domain") else NOT_STATED
        licence = raw.get("licence", raw.get("license"))
        return Row(str(record["id"]), [str(image) for image in record["image"]],
                   list(zip(turns[::2], turns[1::2], strict=False)),
                   domain, licence if isinstance(licence, str) and licence else NOT_STATED)

    def _raw(self, number: int) -> Mapping:
        """Returns the object in the file, whose further keys training does not read."""
        if self._file is None:
            return {}
        begin, end = self._data.sources[0].place(number)
        self._file.seek(begin)
        found = json.loads(self._file.read(end - begin))
        return found if isinstance(found, dict) else {}


def _is_of_figures(path: Path) -> bool:
    with open_file(path) as file:
        head = file.read(_HEAD)
    return b'"fig_caption"' in head and b'"conversations"' not in head and b'"conversatons"' not in head


@dataclass
class Findings:
    """What a pass has counted.

    Attributes:
      records: number of readable records.
      damaged: number of damaged records.
      sentences: some of the errors of damaged records.
      pairs: number of questions with an answer.
      without_image: number of records without an image.
      repeated: number of pairs that occurred before about the same images.
      domains: domain -> number of records.
      licences: licence -> number of records.
      lengths: name of a length -> a number for each record (`record`) or pair (`question`, `answer`).
      verbs: (verb, noun) -> number of questions.
      questions: number of questions.
      images: the path of each distinct image -> the numbers of its records.
    """

    records: int = 0
    damaged: int = 0
    sentences: list[str] = field(default_factory=list)
    pairs: int = 0
    without_image: int = 0
    repeated: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array] = field(default_factory=lambda: {name: array("I") for name in LENGTHS})
    verbs: Counter[tuple[str, str]] = field(default_factory=Counter)
    questions: int = 0
    images: dict[str, list[int]] = field(default_factory=dict)


def gather(source: Source, length: Callable[[str], int], see: Callable[[int, Row], None],
           advance: Callable[[int], None]) -> Findings:
    """Counts the records of a source.

    Args:
      source: the records.
      length: returns the length of a text.
      see: is called with the number of each readable record and the record.
      advance: is called with a number of records that are done.
    """
    found, seen = Findings(), set()
    for number in range(len(source)):
        if number % _STEP == 0 and number:
            advance(_STEP)
        try:
            row = source[number]
        except UserError as error:
            found.damaged += 1
            if len(found.sentences) < _MOST_SENTENCES:
                found.sentences.append(str(error))
            continue
        _count(found, seen, number, row, length)
        see(number, row)
    advance(len(source) - (max(len(source) - 1, 0) // _STEP) * _STEP)
    return found


def _count(found: Findings, seen: set[int], number: int, row: Row, length: Callable[[str], int]) -> None:
    found.records += 1
    found.pairs += len(row.pairs)
    found.domains[row.domain] += 1
    found.licences[row.licence] += 1
    found.without_image += not row.images
    for image in dict.fromkeys(row.images):
        found.images.setdefault(image, []).append(number)
    total = 0
    for question, answer in row.pairs:
        key = int(sha256(repr((row.images, folded(question), folded(answer))))[:16], 16)
        found.repeated += key in seen
        seen.add(key)
        sizes = length(question), length(answer)
        total += sum(sizes)
        found.lengths["answer"].append(sizes[1])
        if question:
            found.lengths["question"].append(sizes[0])
            found.questions += 1
            verb = verb_and_noun(question)
            if verb is not None:
                found.verbs[verb] += 1
    found.lengths["record"].append(total)


def folded(text: str) -> str:
    """Returns a text in lower case with letters and digits only, one blank between words; texts are compared so."""
    return " ".join("".join(char if char.isalnum() else " " for char in text.casefold()).split())


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Returns mean, minimum, percentiles and maximum of numbers; empty without numbers."""
    if not len(values):
        return {}
    array = np.asarray(values)
    points = dict(zip(("5 %", "median", "95 %", "99 %"), np.percentile(array, [5, 50, 95, 99]), strict=True))
    return {"mean": float(array.mean()), "min": float(array.min()), **{k: float(v) for k, v in points.items()},
            "max": float(array.max())}

