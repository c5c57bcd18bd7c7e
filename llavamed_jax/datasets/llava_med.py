"""Reads LLaVA-Med's own test files, with one question and its answer in each record.

A file is a list of `{id, image, answer_type, question_type?, conversations}`. `train.json`, `test.json`,
`test_w_options.json` (whose questions name the options in their text) and `test_zh.json` of its four data sets have
this form. `conversations` may be spelled `conversatons`, as in the released files.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.datasets.records import normalize
from llavamed_jax.datasets.registry import DataSet
from llavamed_jax.datasets.rows import WIDER_TYPES, Row, read_split
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.text.conversation import IMAGE_MARKER


def read_llava_med(root: str | Path, split: str = "test", images: str | Path | None = None) -> list[VqaSample]:
    """Reads the questions of a file in LLaVA-Med's format.

    Args:
      root: the file, or a folder with `train.json`, `validation.json`, `test.json` (or `.jsonl`).
      split: the split to read, if `root` is a folder.
      images: the folder of the images; None means the folder of the file.

    Raises:
      UserError: a file or an image is missing, a record lacks a field or has several questions, or the split is
        unknown.
    """
    return read_split(root, split, "llava_med", images, _sample)


def _sample(row: Row, images: Path, index: int) -> VqaSample:
    identity, image, kind = row.identity("id"), row.image("image", images), row.answer_type(WIDER_TYPES)
    question, answer = first_turn(row, index)
    return VqaSample(identity, image, question, answer, kind, **row.fields())


def first_turn(row: Row, index: int) -> tuple[str, str]:
    """Returns question and answer of a LLaVA record with one question; removes the image marker.

    Args:
      row: the record.
      index: its place in the file.

    Raises:
      UserError: the record is malformed or has more than one question.
    """
    turns = normalize(row.value, Path(), row.name, index)["conversations"]
    if [turn["from"] for turn in turns] != ["human", "gpt"]:
        raise row.error(f"has {len(turns)} turns; one question and its answer were expected")
    return turns[0]["value"].replace(IMAGE_MARKER, "").strip(), turns[1]["value"].strip()


DATA_SET = DataSet(
    name="llava_med",
    label="LLaVA-Med's format",
    sign="rows with conversations",
    read=lambda selected: read_llava_med(selected.root, selected.split, selected.images),
    row="{id, image, answer_type, conversations}",
    follows=("images",),
    is_row=lambda keys: not keys.isdisjoint(("conversations", "conversatons")),
    is_conversations=True,
)
