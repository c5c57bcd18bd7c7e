"""Readers: LLaVA JSON for training, and medical VQA sets in their official layouts.

A training record is a dict `{"id", "image": list of paths, "conversations": [{"from": "human"|"gpt", "value": str}, …]}`
whatever it was read from. A question of a VQA set is a `VqaSample`; `to_llava` makes the former of the latter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavamed_jax.checkpoints.files import parse_json
from llavamed_jax.data.conversation import IMAGE_MARKER
from llavamed_jax.errors import UsageError, UserError

log = logging.getLogger(__name__)

VQA_RAD_FILE = "VQA_RAD Dataset Public.json"
_VQA_RAD_IMAGES = ("images", "VQA_RAD Image Folder")  # the second as on osf.io
_VQA_RAD_TYPES = {"PRSE": "PRES", "ATRIB": "ATTRIB"}  # typos in the published file
_WORDS = (str, int, float)  # what the published files have as text: some answers are numbers
_SLAKE_FILES = {"train": "train.json", "validation": "validate.json", "test": "test.json"}
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
    return {"id": sample.question_id, "image": [str(sample.image)], "conversations": [
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
    """Records of one or several sources; an epoch takes `round(weight * len(source))` of each (see `data.loader`)."""

    sources: list[list[dict]]
    weights: list[float] = field(default_factory=lambda: [1.0])

    @property
    def sizes(self) -> list[int]:
        """Samples that each source gives an epoch."""
        return [round(weight * len(source)) for source, weight in zip(self.sources, self.weights, strict=True)]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def max_images(self) -> int:
        return max((len(record["image"]) for source in self.sources for record in source), default=0)


def read_training(data, images: str | Path | None = None, protocol: str = "clean", split: str = "train") -> TrainingData:
    """Training records from whatever `data.train` of a recipe names.

    Args:
      data: a LLaVA JSON or JSONL file; a folder in VQA-RAD's or SLAKE's official layout (or VQA-RAD's file); or a list of
        `{"path", "images", "weight"}`, where weight 2 shows a source twice an epoch and 0.5 half of it.
      images: the folder of the images of a LLaVA file.
      protocol, split: which rows of a VQA set.
    Raises:
      UserError: a file that is missing or no JSON, a record that is malformed (file, index, what was expected), no records.
    """
    if isinstance(data, (list, tuple)):
        return _read_mixture(data, images, protocol, split)
    path = Path(data)
    if path.name == VQA_RAD_FILE or (path / VQA_RAD_FILE).is_file():
        records = [to_llava(s) for s in read_vqa_rad(path, split, protocol)]
    elif (path / "imgs").is_dir():
        records = [to_llava(s) for s in read_slake(path, split)]
    elif path.is_dir():
        raise UserError(f"the folder {path} holds neither VQA-RAD ({VQA_RAD_FILE}) nor SLAKE (train.json, imgs/)")
    else:
        records = read_llava_json(path, images)
    if not records:
        raise UserError(f"{path} holds no training records")
    return TrainingData([records])


def _read_mixture(entries, images, protocol, split) -> TrainingData:
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
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UsageError(f"the weight of {entry['path']} is {weight!r}; a positive number was expected")
        part = read_training(entry["path"], entry.get("images", images), protocol, split)
        if not round(weight * len(part)):
            raise UserError(f"the weight {weight} of {entry['path']} leaves none of its {len(part)} records in an epoch")
        sources += part.sources
        weights.append(float(weight))
    if not sources:
        raise UserError("the list of training data is empty; at least one {path, images, weight} was expected")
    return TrainingData(sources, weights)


def read_llava_json(path: str | Path, images: str | Path | None = None) -> list[dict]:
    """Records of a LLaVA file: JSON (a list) or JSONL, told apart by content.

    `conversations` may be spelled `conversatons` (quirk Q13), values may be numbers, `image` a name, a list or absent.
    Records that name an image and mark none are trained as text, as in the original; how many is logged. Whether image
    files exist is found out in training, where the broken ones are skipped and listed.

    Raises:
      UserError: see `read_training`.
    """
    file = Path(path)
    folder = Path(images) if images is not None else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"the folder of images {folder} does not exist")
    records, unmarked = [], 0
    for index, row in enumerate(_read_rows(file)):
        record, is_unmarked = _llava_record(row, folder, file, index)
        records.append(record)
        unmarked += is_unmarked
    if unmarked:
        log.warning("%s: %d of %d records name an image and have no %s: they are trained as text",
                    file, unmarked, len(records), IMAGE_MARKER)
    return records


def _llava_record(row: Any, folder: Path | None, file: Path, index: int) -> tuple[dict, bool]:
    def fail(what):
        return UserError(f"record {index} of {file} {what}")

    if not isinstance(row, dict):
        raise fail("is no object; {id, image, conversations} was expected")
    turns = row.get("conversations", row.get("conversatons"))
    if not isinstance(turns, list) or not turns:
        raise fail("has no conversations; a list of {from, value} was expected")
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, (str, int, float)) or turn.get("from") not in ("human", "gpt"):
            raise fail(f"has {turn!r} as turn {i}; {{from: human or gpt, value: text}} was expected")
    speakers = [turn["from"] for turn in turns]
    first = 1 if speakers[0] == "gpt" else 0
    if any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers[first:])):
        raise fail("does not alternate between human and gpt")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fail(f"has the image {names!r}; a name or a list of names was expected")
    conversations = [{"from": turn["from"], "value": str(turn["value"])} for turn in turns]
    counts = [turn["value"].count(IMAGE_MARKER) for turn in conversations[first:]]
    if names and not sum(counts):
        names, is_unmarked = [], True
    else:
        is_unmarked = False
        # Upstream reads several markers in one turn as one image; a record that lists them all means each.
        if len(names) not in (sum(counts), sum(map(bool, counts))):
            raise fail(f"has {len(names)} images for {sum(counts)} {IMAGE_MARKER} markers")
    paths = [str(folder / name if folder else file.parent / name) for name in names]
    return {"id": row.get("id", index), "image": paths, "conversations": conversations}, is_unmarked


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
