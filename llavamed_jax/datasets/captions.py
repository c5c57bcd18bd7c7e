"""Reads images with reference captions or reports.

The file is JSON or JSON lines of `{id, image, caption}`; the text may also be called `report` or `reference`. Or it is
a LLaVA file whose answers are the reference texts.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from llavamed_jax.datasets.llava_med import first_turn
from llavamed_jax.datasets.registry import DataSet, Selection
from llavamed_jax.datasets.rows import Row, read_split
from llavamed_jax.datasets.sample import CAPTION, VqaSample

REFERENCES = ("reference", "report", "caption")  # possible keys of the text
INSTRUCTION = "Describe what this image shows."


def read_captions(root: str | Path, split: str = "test", images: str | Path | None = None,
                  question: str = INSTRUCTION) -> list[VqaSample]:
    """Reads one sample for each image; `answer` is the reference text.

    Args:
      root: the file, or a folder with `train.json`, `validation.json`, `test.json` (or `.jsonl`).
      split: the split to read, if `root` is a folder.
      images: the folder of the images; None means the folder of the file.
      question: the question about every image; "" uses the questions of a LLaVA file.

    Raises:
      UserError: a file or an image is missing, a row lacks a field, there is no question, or the split is unknown.
    """
    return read_split(root, split, "captions", images,
                      lambda row, folder, index: _sample(row, folder, index, question.strip()))


def _sample(row: Row, images: Path, index: int, question: str) -> VqaSample:
    identity, image = row.identity("id"), row.image("image", images)
    if "conversations" in row or "conversatons" in row:
        asked, reference = first_turn(row, index)
    else:
        asked, reference = "", row.words(next((key for key in REFERENCES if key in row), "caption"))
    if not (question or asked):
        raise row.error("has no question; set data.question to ask every image the same question")
    if not reference:
        raise row.error("has an empty answer; the text of the caption was expected")
    return VqaSample(identity, image, question or asked, reference, CAPTION, **row.fields())


def _read(selected: Selection) -> list[VqaSample]:
    question = INSTRUCTION if selected.question is None else selected.question
    return read_captions(selected.root, selected.split, selected.images, question)


def _is_row(keys: Set[str]) -> bool:
    """Returns whether a row has a reference text. In a row with question and answer, such a text is only context."""
    return not keys.isdisjoint(REFERENCES) and keys.isdisjoint(("question", "answer"))


DATA_SET = DataSet(
    name="captions",
    label="captions",
    sign="rows with a caption, report or reference",
    read=_read,
    row="{id, image, caption} or {id, image, conversations}",
    follows=("images", "question"),
    is_row=_is_row,
)
