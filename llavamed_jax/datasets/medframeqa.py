"""Reads MedFrameQA (Yu et al. 2025): the hub's parquet files, with two to five frames of a video a question.

A row has `question_id`, `question`, `options`, `correct_answer` (a letter), `image_1` to `image_5`, `system`, `organ`
and `modality`, and may have `video_id`: the bootstrap draws questions about one video together. There is one split,
`test`.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.parquet import footer, image_folder, read_parquet
from llavamed_jax.datasets.published_choices import Questions, as_published, right_place, texts
from llavamed_jax.datasets.registry import DataSet, ParquetSigns, Selection
from llavamed_jax.datasets.rows import Row, one_of
from llavamed_jax.datasets.sample import LETTERS, VqaSample
from llavamed_jax.errors import UserError

NAME, SPLITS = "medframeqa", ("test",)
PICTURES = tuple(f"image_{number}" for number in range(1, 6))
_COLUMNS, _MORE = ("question", "options", "correct_answer"), ("question_id", "organ", "modality", "system", "video_id")


def read_medframeqa(selected: Selection) -> list[VqaSample]:
    """Reads the questions of the parquet files; the images are written to `images`, by default `root/images`.

    Raises:
      UserError: a file is missing, is not parquet or lacks a column, a row is malformed, or the split is unknown.
    """
    one_of("MedFrameQA's split", selected.split, SPLITS)
    root = Path(selected.root)
    files = detect.parquet_files(root, selected.split)
    if not files:
        raise UserError(f"{root} holds no parquet file {root / 'data' / 'test-*.parquet'}{detect.hint(root, NAME)}")
    found = Questions(str(root))
    rows = read_parquet(files, _COLUMNS, image_folder(root, selected.images), _MORE, PICTURES)
    for index, value in enumerate(rows):
        row = Row(value, f"row {index} of {root}", NAME)
        options = texts(row, "options")
        lines = [f"{letter}.{option}" for letter, option in zip(LETTERS, row["options"], strict=False)]
        identity = row.identity("question_id") if "question_id" in row else index
        images = [row[name] for name in PICTURES if name in row]
        found.add(row, identity, images, as_published(row, "question"), options, lines,
                  right_place(row.text("correct_answer"), options), is_numbered=True,
                  organ=row.labels("organ"), modality=row.labels("modality"),
                  source=(row.text("video_id") or None) if "video_id" in row else None)
    return found.done()


def _is_at(path: Path) -> bool:
    return any({"correct_answer", "image_1"} <= set(footer(file)[0]) for file in detect.parquet_files(path)[:1])


DATA_SET = DataSet(
    name=NAME,
    label="MedFrameQA",
    sign="its parquet files",
    read=read_medframeqa,
    row="{question, options, correct_answer, image_1, …}",
    follows=("images",),
    splits=SPLITS,
    is_at=_is_at,
    published={("test", ""): (2851, None, None, None)},  # from the set's paper
    files=detect.parquet_files,
    parquet=ParquetSigns(rows={"test": (2851,)}, columns=frozenset({"correct_answer", "reasoning_chain", "video_id"}),
                         title=r"med[\W_]*frame[\W_]*qa"),
)
