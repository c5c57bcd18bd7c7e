"""Reads questions about images from the hub's parquet files: columns `image`, `question`, `answer` and optional ones.

VQA-RAD, SLAKE and PathVQA all have these three columns on the hub; `detect.named_by_parquet` tells them apart.
"""

from __future__ import annotations

import logging
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.parquet import image_folder, read_parquet
from llavamed_jax.datasets.registry import SETS, DataSet
from llavamed_jax.datasets.rows import WIDER_TYPES, Row, one_of
from llavamed_jax.datasets.sample import CLOSED, OPEN, VqaSample
from llavamed_jax.errors import UserError

log = logging.getLogger(__name__)

# Fields by which a report is broken down, and the columns that they may come from.
_NAMED = {"question_type": ("question_type", "content_type"), "organ": ("organ", "location", "image_organ"),
          "modality": ("modality",)}
_LANGUAGE = ("q_lang", "language")
_OPTIONAL = ("answer_type", *(column for columns in _NAMED.values() for column in columns), *_LANGUAGE)


def read_hub(root: str | Path, split: str = "test", images: str | Path | None = None, language: str = "all",
             name: str = "parquet") -> list[VqaSample]:
    """Reads the questions of a split's parquet files, in `data/` or in the folder itself.

    An id is the split and the number of the row. If there is no column `answer_type`, a question is closed if its
    answer is yes or no; a warning is logged if the set is known to have other closed answers.

    Args:
      root: the folder.
      split: `train`, `validation` or `test`.
      images: the folder that the images are written to; None means `root/images`, or the
        user's cache if that cannot be written.
      language: keeps only rows of this language (column `q_lang` or `language`), or `all`. Files without such a column
        are taken to be English.
      name: the set that the rows have to belong to; `parquet` accepts any.

    Raises:
      UserError: files are missing or are not parquet, rows lack a field, or nothing shows that the files belong to
        `name`.
    """
    one_of("the split", split, detect.SPLITS)
    root = Path(root)
    found = detect.named_by_parquet(root)
    if name not in ("parquet", found):
        other = f" looks like {SETS[found].title}: data.name={found}" if found else (
            f" holds {SETS['parquet'].title}, which cannot be recognized as {SETS[name].title}; data.name=parquet "
            "reads them")
        raise UserError(f"{root}{other}")
    files = detect.parquet_files(root, split)
    if not files:
        raise UserError(f"{root} holds no parquet file of the split {split}; {root / 'data' / f'{split}-*.parquet'} "
                        "was expected")
    rows = read_parquet(files, ("question", "answer"), image_folder(root, images), _OPTIONAL)
    samples = [_sample(Row(value, f"row {index} of the split {split} of {root}", "parquet"), f"{split}-{index}")
               for index, value in enumerate(rows)]
    samples = [sample for sample in samples if language in ("all", sample.language)]
    _say_what_is_guessed(root, split, samples, found, any("answer_type" in detect.footer(file)[0] for file in files))
    return samples


def _sample(row: Row, identity: str) -> VqaSample:
    answer = row.text("answer")
    fields = {key: next((row.labels(column) for column in columns if column in row), None)
              for key, columns in _NAMED.items()}
    kind = row.answer_type(WIDER_TYPES) if "answer_type" in row else by_answer(answer)
    language = next((row.words(column) for column in _LANGUAGE if column in row), "en")
    return VqaSample(identity, row["image"], row.text("question"), answer, kind, **fields, language=language)


def by_answer(answer: str) -> str:
    """Returns the kind of a question without a stated kind: CLOSED if the answer is yes or no, else OPEN."""
    return CLOSED if answer.lower() in ("yes", "no") else OPEN


def _say_what_is_guessed(root: Path, split: str, samples: list[VqaSample], name: str | None, is_stated: bool) -> None:
    if is_stated or name is None:
        return
    # Only of English questions is a published number known, and only an English answer is yes or no.
    others = sum(sample.language != "en" for sample in samples)
    if others:
        log.warning("%s, split %s: the column answer_type is missing, and %d questions are not in English; they count "
                    "as open unless the answer is yes or no", root, split, others)
    closed = sum(sample.answer_type == CLOSED for sample in samples if sample.language == "en")
    if not closed and others:
        return
    known = {counts[3] for (of, _), counts in SETS[name].published.items() if of == split and counts[3] is not None}
    if known and closed not in known:
        log.warning("%s, split %s: the column answer_type is missing, so only the %d questions with the answer yes or "
                    "no count as closed; the published set has %s closed questions", root, split, closed,
                    " or ".join(map(str, sorted(known))))


DATA_SET = DataSet(
    name="parquet",
    label="questions about images in parquet files",
    sign="image, question, answer",
    read=lambda selected: read_hub(selected.root, selected.split, selected.images, selected.language or "all"),
    row="{image, question, answer}",
    follows=("images", "language"),
)
