"""Readers: LLaVA JSON for training, and medical VQA sets in their official layouts.

A training record is a dict `{"id", "image": list of paths, "conversations": [{"from": "human"|"gpt", "value": str}, …]}`
whatever it was read from. A question of a VQA set is a `VqaSample`; `to_llava` makes the former of the latter.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamed_jax.checkpoints.files import parse_json
from llavamed_jax.data.conversation import IMAGE_MARKER
from llavamed_jax.data.records import FileRecords, MemoryRecords, open_records
from llavamed_jax.errors import UsageError, UserError

log = logging.getLogger(__name__)

VQA_RAD_FILE = "VQA_RAD Dataset Public.json"
_VQA_RAD_IMAGES = ("images", "VQA_RAD Image Folder")  # the second as on osf.io
_VQA_RAD_TYPES = {"PRSE": "PRES", "ATRIB": "ATTRIB"}  # typos in the published file
_WORDS = (str, int, float)  # what the published files have as text: some answers are numbers
_SLAKE_FILES = {"train": "train.json", "validation": "validate.json", "test": "test.json"}
LARGEST_WEIGHT = 1000  # of a source of training data: an epoch is laid out whole, and what is larger was mistyped
# Questions, open, closed of the whole sets (spec 3.1).
PUBLISHED = {
    ("vqa_rad", "train", "clean"): (1797, 770, 1027), ("vqa_rad", "train", "paper"): (3064, 1241, 1823),
    ("vqa_rad", "test", "clean"): (451, 179, 272), ("vqa_rad", "test", "paper"): (451, 179, 272),
    ("slake", "train", "en"): (4919, 2976, 1943), ("slake", "validation", "en"): (1053, 631, 422),
    ("slake", "test", "en"): (1061, 645, 416),
}


@dataclass(frozen=True)
class VqaSample:
    """One question about one image.

    Attributes:
      question_id: the set's own; `frame-ID` for the rephrasing of question ID.
      answer: text as published (integers as text); `answer_type` is OPEN or CLOSED.
      question_type, organ, modality, language, phrase_type: as published with typos mended, None where a set has none.
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


def to_llava(sample: VqaSample) -> dict:
    """The training record of a question, image first."""
    return {"id": sample.question_id, "image": [str(sample.image)], "answer_type": sample.answer_type, "conversations": [
        {"from": "human", "value": f"{IMAGE_MARKER}\n{sample.question}"}, {"from": "gpt", "value": sample.answer}]}


# ---- VQA sets --------------------------------------------------------------------------------------------------------


def read_vqa_rad(root: str | Path, split: str = "test", protocol: str = "clean") -> list[VqaSample]:
    """VQA-RAD from its public file (Lau et al. 2018), or a cut of it in the same layout.

    Test rows are those whose `phrase_type` begins with `test_`. The `paper` protocol adds the rephrasing (`question_frame`)
    of every row to the training rows, test rows included, as the repackaging did that the paper trained on: answers of
    test questions are then trained on. That leak is logged.

    Args:
      split: `train`, `test` or `all`.
      protocol: `clean` or `paper`; without effect on test rows.
    Raises:
      UserError: a file or an image that is missing, a row that lacks a field, an unknown split or protocol.
    """
    _one_of("VQA-RAD's split", split, ("train", "test", "all"))
    _one_of("VQA-RAD's protocol", protocol, ("clean", "paper"))
    root = Path(root)
    file = root / VQA_RAD_FILE if root.is_dir() else root
    rows = _read_rows(file)
    images = next((file.parent / name for name in _VQA_RAD_IMAGES if (file.parent / name).is_dir()), None)
    if images is None:
        raise UserError(f"{file.parent} has no folder {_VQA_RAD_IMAGES[0]}/ with VQA-RAD's images")
    pairs = [(row, _vqa_rad_sample(row, images, file, i)) for i, row in enumerate(rows)]
    samples = [s for _, s in pairs if split == "all" or (split == "test") == s.phrase_type.startswith("test_")]
    if protocol == "paper" and split != "test":
        frames = [_frame(row, s) for row, s in pairs if row.get("question_frame") not in (None, "NULL")]
        leaked = sum(s.phrase_type.startswith("test_") for s in frames)
        log.warning("VQA-RAD, protocol paper: %d rephrasings added to the training rows, %d of them of test questions: "
                    "test answers leak into training, as in the paper", len(frames), leaked)
        samples += frames
    check_images(s.image for s in samples)
    return samples


def _vqa_rad_sample(row: dict, images: Path, file: Path, index: int) -> VqaSample:
    get = _getter(row, file, index)
    answer_type = _answer_type(get("answer_type"), file, index)
    kinds = [_VQA_RAD_TYPES.get(k.strip().upper(), k.strip().upper()) for k in str(get("question_type")).split(",")]
    qid = str(get("qid", _WORDS))
    return VqaSample(
        int(qid) if qid.isdigit() else qid, images / get("image_name", str), str(get("question", _WORDS)).strip(),
        str(get("answer", _WORDS)).strip(), answer_type, question_type=", ".join(sorted(kinds)), organ=str(get("image_organ")).strip(),
        phrase_type=get("phrase_type", str))


def _frame(row: dict, sample: VqaSample) -> VqaSample:
    return VqaSample(**{**vars(sample), "question_id": f"frame-{sample.question_id}", "question": str(row["question_frame"]).strip()})


def read_slake(root: str | Path, split: str = "test", lang: str | None = "en") -> list[VqaSample]:
    """SLAKE (Liu et al. 2021) from its official layout: `train.json`, `validate.json`, `test.json`, `imgs/`.

    Args:
      split: `train`, `validation` or `test`.
      lang: `en` (the paper's), `zh`, or None for both.
    Raises:
      UserError: a file or an image that is missing, a row that lacks a field, an unknown split or language.
    """
    _one_of("SLAKE's split", split, _SLAKE_FILES)
    _one_of("SLAKE's language", lang, ("en", "zh", None))
    root = Path(root)
    file = root / _SLAKE_FILES[split]
    samples = [_slake_sample(row, root / "imgs", file, i) for i, row in enumerate(_read_rows(file))]
    samples = [s for s in samples if lang is None or s.language == lang]
    check_images(s.image for s in samples)
    return samples


def _slake_sample(row: dict, images: Path, file: Path, index: int) -> VqaSample:
    get = _getter(row, file, index)
    return VqaSample(
        get("qid", _WORDS), images / get("img_name", str), str(get("question", _WORDS)).strip(), str(get("answer", _WORDS)).strip(),
        _answer_type(get("answer_type"), file, index), question_type=get("content_type"), organ=get("location"),
        modality=get("modality"), language=get("q_lang"))


def describe(samples: Sequence[VqaSample], name: str, split: str, variant: str) -> str:
    """One line with the counts of `samples`, and whether they are the published ones (a cut of a set has fewer).

    `name`, `split` and `variant` (VQA-RAD's protocol, SLAKE's language) are the keys of `PUBLISHED`.
    """
    n_open = sum(s.answer_type == "OPEN" for s in samples)
    counts = (len(samples), n_open, len(samples) - n_open)
    line = "{} {} ({}): {} questions on {} images, {} open, {} closed".format(
        name, split, variant, counts[0], len({s.image for s in samples}), *counts[1:])
    published = PUBLISHED.get((name, split, variant))
    if published is None or published == counts:
        return line + (", as published" if published else "")
    return line + "; published: {} questions, {} open, {} closed".format(*published)


def check_images(images: Iterable[Path]) -> None:
    """Raises UserError that names the first image that does not exist and says how many there are."""
    images = dict.fromkeys(map(Path, images))
    missing = [image for image in images if not image.is_file()]
    if missing:
        more = f", nor do {len(missing) - 1} of the other {len(images) - 1}" if len(missing) > 1 else ""
        raise UserError(f"the image {missing[0]} does not exist{more}")


# ---- training records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Records of one or several sources; an epoch takes `round(weight * len(source))` of each (see `data.packing`)."""

    sources: Sequence[MemoryRecords | FileRecords]
    weights: Sequence[float] = (1.0,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples that each source gives an epoch."""
        return tuple(round(weight * len(source)) for source, weight in zip(self.sources, self.weights, strict=True))

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def num_records(self) -> int:
        return sum(map(len, self.sources))

    def record(self, number: int) -> dict:
        """A record by its number through all sources. Raises UserError, which names it, where it is damaged."""
        for source in self.sources:
            if number < len(source):
                return source[number]
            number -= len(source)
        raise IndexError(number)

    def readable(self) -> Iterator[dict]:
        """The records in order, without the damaged ones."""
        for number in range(self.num_records):
            with contextlib.suppress(UserError):
                yield self.record(number)


def read_training(data, images: str | Path | None = None, protocol: str = "clean", split: str = "train",
                  cache: Path | None = None) -> TrainingData:
    """Training records from whatever `data.train` of a recipe names.

    Args:
      data: a LLaVA JSON or JSONL file; a folder in VQA-RAD's or SLAKE's official layout (or VQA-RAD's file); or a list of
        `{"path", "images", "weight"}`, where weight 2 shows a source twice an epoch and 0.5 half of it.
      images: the folder of the images of a LLaVA file.
      protocol, split: which rows of a VQA set.
      cache: see `records.open_records`.
    Raises:
      UserError: a file that is missing or no JSON, a row of a VQA set that is malformed, no records. Records of a LLaVA file
        are read when they are asked for, and the malformed ones are found by `lengths.measure`.
    """
    if isinstance(data, (list, tuple)):
        return _read_mixture(data, images, protocol, split, cache)
    path = Path(data)
    if path.name == VQA_RAD_FILE or (path / VQA_RAD_FILE).is_file():
        records = MemoryRecords(map(to_llava, read_vqa_rad(path, split, protocol)))
    elif (path / "imgs").is_dir():
        records = MemoryRecords(map(to_llava, read_slake(path, split)))
    elif path.is_dir():
        raise UserError(f"the folder {path} holds neither VQA-RAD ({VQA_RAD_FILE}) nor SLAKE (train.json, imgs/)")
    else:
        records = open_records(path, images, cache)
    if not len(records):
        raise UserError(f"{path} holds no training records")
    return TrainingData([records])


def _read_mixture(entries, images, protocol, split, cache) -> TrainingData:
    sources, weights = [], []
    for entry in entries:
        if not hasattr(entry, "keys"):  # a ConfigDict is no Mapping
            raise UsageError(f"an entry of the training data is {entry!r}; {{path, images, weight}} was expected")
        entry = dict(entry)
        unknown = set(entry) - {"path", "images", "weight"}
        if "path" not in entry or unknown:
            raise UsageError(f"an entry of the training data is {entry}; the keys path, images and weight were expected")
        for key in ("path", "images"):
            if not (isinstance(entry.get(key, ""), (str, Path)) or key == "images" and entry[key] is None):
                raise UsageError(f"an entry of the training data has the {key} {entry[key]!r}; text was expected")
        weight = entry.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight <= LARGEST_WEIGHT:
            raise UsageError(f"the weight of {entry['path']} is {weight!r}; more than 0 and at most {LARGEST_WEIGHT} was expected")
        part = read_training(entry["path"], entry.get("images", images), protocol, split, cache)
        if not round(weight * len(part)):
            raise UserError(f"the weight {weight} of {entry['path']} leaves none of its {len(part)} records in an epoch")
        sources += part.sources
        weights.append(float(weight))
    if not sources:
        raise UserError("the list of training data is empty; at least one {path, images, weight} was expected")
    return TrainingData(sources, weights)


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_rows(file: Path) -> list:
    """The rows of a JSON list or of a JSONL file."""
    if not file.is_file():
        raise UserError(f"the data file {file} does not exist")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text; a JSON list or JSON lines were expected") from error
    if text.lstrip().startswith("["):
        return parse_json(text, str(file))
    lines = enumerate(text.splitlines(), 1)
    return [parse_json(line, f"line {number} of {file}") for number, line in lines if line.strip()]


def _getter(row: Any, file: Path, index: int):
    def get(key, kind=object):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"row {index} of {file} has no {key!r}; the official layout was expected")
        if not isinstance(row[key], kind):
            raise UserError(f"row {index} of {file} has the {key} {row[key]!r}; text was expected")
        return row[key]
    return get


def _answer_type(value: Any, file: Path, index: int) -> str:
    kind = str(value).strip().upper()  # two rows of VQA-RAD have a trailing blank
    if kind not in ("OPEN", "CLOSED"):
        raise UserError(f"row {index} of {file} has the answer_type {value!r}; OPEN or CLOSED was expected")
    return kind


def _one_of(what: str, value, choices: Iterable) -> None:
    if value not in choices:
        raise UserError(f"{what} is {value!r}; one of {', '.join(map(str, choices))} was expected")
