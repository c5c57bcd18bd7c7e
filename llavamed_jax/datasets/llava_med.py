"""LLaVA-Med's own test files: a list of `{id, image, answer_type, question_type?, conversations}`, one question and its answer a record.

`train.json`, `test.json`, `test_w_options.json` (whose questions name the options in their text) and `test_zh.json` of its four data sets
are of this kind. `conversations` may be spelled `conversatons`, as in its released files.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.datasets.records import normalize
from llavamed_jax.datasets.registry import DataSet
from llavamed_jax.datasets.rows import Row, read_split
from llavamed_jax.datasets.sample import CLOSED, OPEN, VqaSample
from llavamed_jax.text.conversation import IMAGE_MARKER

_TYPES = {OPEN: OPEN, CLOSED: CLOSED, "YES/NO": CLOSED, "OTHER": OPEN, "NUMBER": OPEN}  # the last three in files of PathVQA


def read_llava_med(root: str | Path, split: str = "test", images: str | Path | None = None) -> list[VqaSample]:
    """The questions of a file in LLaVA-Med's format.

    Args:
      root: the file, or a folder with `train.json`, `validation.json`, `test.json` (or `.jsonl`).
      split: which of them, where `root` is a folder.
      images: the folder of the images; the file's own where it is not given.
    Raises:
      UserError: a file or an image that is missing, a record that lacks a field or has more than one question, an unknown split.
    """
    return read_split(root, split, "llava_med", images, _sample)


def _sample(row: Row, images: Path, index: int) -> VqaSample:
    identity, image, kind = row.identity("id"), row.image("image", images), row.answer_type(_TYPES)
    question, answer = first_turn(row, index)
    return VqaSample(identity, image, question, answer, kind, **row.fields())


def first_turn(row: Row, index: int) -> tuple[str, str]:
    """Question and answer of a LLaVA record of one turn each; the question without the image's marker."""
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
