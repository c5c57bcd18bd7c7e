"""Reads PathVQA (He et al. 2020): the released folder of pickles and images, or the hub's parquet files.

The release (`pvqa/`) contains `images/{train,val,test}/train_0422.jpg`; `qas/train/train_qa.pkl`, rows of `image`,
`question` and `answer`; and `qas/train_vqa.pkl`, the same questions with `question_id`, `question_type` and
`answer_type`. LLaVA-Med's files were made from the latter.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.hub_rows import by_answer, read_hub
from llavamed_jax.datasets.pickles import read_plain_pickle
from llavamed_jax.datasets.registry import DataSet, ParquetSigns
from llavamed_jax.datasets.rows import Row, named_rows, one_of
from llavamed_jax.datasets.sample import CLOSED, OPEN, VqaSample, check_images
from llavamed_jax.errors import UserError

_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
_TYPES = {"YES/NO": CLOSED, "OTHER": OPEN, "NUMBER": OPEN}


def read_pathvqa(root: str | Path, split: str = "test", images: str | Path | None = None) -> list[VqaSample]:
    """Reads the questions of PathVQA.

    `SPLIT_vqa.pkl` is read if it exists, otherwise `SPLIT/SPLIT_qa.pkl`. The latter has no ids and no answer types:
    there, a question is closed if its answer is yes or no, and its id is the name of the image and the number of
    earlier questions about it. Parquet files are read by `hub_rows.read_hub`.

    Args:
      root: the folder with `qas/` and `images/`, or with parquet files in `data/` or in the folder itself.
      split: `train`, `validation` or `test`.
      images: the folder of the images; None means `root/images`. The images of parquet files are written there.

    Raises:
      UserError: a file or an image is missing, a pickle contains more than plain data, a file is not parquet, a row
        lacks a field, or the split is unknown.
    """
    one_of("PathVQA's split", split, detect.SPLITS)
    root = Path(root)
    folder = Path(images) if images else root / "images"
    if os.path.exists(root) and not root.is_dir():
        raise UserError(f"{root} is a file, a pipe or a device; PathVQA's folder, with qas/ and images/, was expected")
    if form(root) == "parquet":
        # Files without a sign of any set are read too, but `detect.set_at` does not call them PathVQA.
        return read_hub(root, split, folder, name="pathvqa" if detect.named_by_parquet(root) else "parquet")
    short = _FOLDERS[split]
    described, plain = root / "qas" / f"{short}_vqa.pkl", root / "qas" / short / f"{short}_qa.pkl"
    file = described if os.path.exists(described) else plain
    if not os.path.exists(file):
        raise UserError(f"the data file {file} does not exist{detect.hint(root, 'pathvqa')}")
    values = read_plain_pickle(file)
    if not isinstance(values, list):
        raise UserError(f"{file} holds a {type(values).__name__}; a list of rows was expected")
    rows = named_rows(values, file, "pathvqa")
    samples = [_described(row, folder / short) for row in rows] if file == described else _plain(rows, folder / short)
    check_images([sample.image for sample in samples])
    return samples


def form(root: Path) -> str:
    """Returns the form of the files: `parquet` or `official`."""
    return "parquet" if not (root / "qas").is_dir() and detect.parquet_files(root) else "official"


def files_of(root: Path, split: str) -> list[Path]:
    """Returns the files that contain a split's questions."""
    short = _FOLDERS[split]
    found = [root / "qas" / f"{short}_vqa.pkl", root / "qas" / short / f"{short}_qa.pkl"]
    return (detect.parquet_files(root, split) if form(root) == "parquet"
            else [file for file in found if file.is_file()][:1])


def _described(row: Row, images: Path) -> VqaSample:
    label = row["label"]
    if not isinstance(label, dict) or not label:
        raise row.error("has no answer in its label; {answer: score} was expected")
    answer = Row({"label": next(iter(label))}, row.name, "pathvqa").text("label")  # as in LLaVA-Med's files
    return VqaSample(row.identity("question_id"), _image(row, "img_id", images), row.text("sent"), answer,
                     row.answer_type(_TYPES), question_type=row.labels("question_type"))


def _plain(rows: list[Row], images: Path) -> list[VqaSample]:
    seen: Counter = Counter()
    samples = []
    for row in rows:
        name, answer = row.words("image"), row.text("answer")
        samples.append(VqaSample(f"{name}-{seen[name]}", _image(row, "image", images), row.text("question"), answer,
                                 by_answer(answer)))
        seen[name] += 1
    return samples


def _image(row: Row, key: str, images: Path) -> Path:
    path = row.image(key, images)
    return path if path.suffix else path.with_name(f"{path.name}.jpg")


def _name_at(root: Path) -> str:
    is_named = (root / "qas").is_dir() or detect.named_by_parquet(root) == "pathvqa"
    return "pathvqa" if is_named or not detect.parquet_files(root) else "parquet"


DATA_SET = DataSet(
    name="pathvqa",
    label="PathVQA",
    sign="qas/, images/, or its parquet files",
    read=lambda selected: read_pathvqa(selected.root, selected.split, selected.images),
    follows=("images",),
    is_at=lambda path: path.is_dir() and (any(path.glob("qas/*_vqa.pkl")) or any(path.glob("qas/*/*_qa.pkl"))),
    name_at=_name_at,
    variant=lambda selected: form(Path(selected.root)),
    # The official form's numbers are from a notebook of LLaVA-Med v1.0; the parquet form's are from its card (it leaves
    # out repeated rows).
    published={
        ("train", "official"): (19755, 2599, 9949, 9806), ("validation", "official"): (6279, 832, 3144, 3135),
        ("test", "official"): (6761, 858, 3370, 3391),
        ("train", "parquet"): (19654, 2599, None, None), ("validation", "parquet"): (6259, 832, None, None),
        ("test", "parquet"): (6719, 858, None, None),
    },
    has_training_rows=True,
    files=files_of,
    parquet=ParquetSigns(
        rows={"train": (19654, 19755), "validation": (6259, 6279), "test": (6719, 6761)}, columns=frozenset(),
        title=r"path[\W_]*vqa"),
)
