"""PathVQA (He et al. 2020): the release's folder of pickles and images, or the hub's parquet files.

The release (`pvqa/`) keeps `images/{train,val,test}/train_0422.jpg`; `qas/train/train_qa.pkl`, rows of `image`, `question` and `answer`;
and `qas/train_vqa.pkl`, the same questions with `question_id`, `question_type` and `answer_type`, which LLaVA-Med made its files of.
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
    """The questions of PathVQA.

    `SPLIT_vqa.pkl` is read where it is there, else `SPLIT/SPLIT_qa.pkl`. That one knows no ids and no answer types: a question is
    closed there if its answer is yes or no, and is named by its image and how many of that image came before. Parquet files are read
    as `hub_rows.read_hub` reads any.

    Args:
      root: the folder with `qas/` and `images/`, or with parquet files, in `data/` or in itself.
      split: `train`, `validation` or `test`.
      images: the folder of the images; `root/images` where it is not given. Those of parquet files are written there.
    Raises:
      UserError: a file or an image that is missing, a pickle that holds more than plain data, a file that is no parquet, a row
        that lacks a field, an unknown split.
    """
    one_of("PathVQA's split", split, detect.SPLITS)
    root = Path(root)
    folder = Path(images) if images else root / "images"
    if os.path.exists(root) and not root.is_dir():
        raise UserError(f"{root} is a file, a pipe or a device; PathVQA's folder, with qas/ and images/, was expected")
    if form(root) == "parquet":
        # Nothing may say whose they are: then they are read, and `detect.set_at` does not call them PathVQA.
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
    check_images(sample.image for sample in samples)
    return samples


def form(root: Path) -> str:
    """`parquet` or `official`."""
    return "parquet" if not (root / "qas").is_dir() and detect.parquet_files(root) else "official"


def files_of(root: Path, split: str) -> list[Path]:
    """The files that a split's questions are in."""
    short = _FOLDERS[split]
    found = [root / "qas" / f"{short}_vqa.pkl", root / "qas" / short / f"{short}_qa.pkl"]
    return detect.parquet_files(root, split) if form(root) == "parquet" else [file for file in found if file.is_file()][:1]


def _described(row: Row, images: Path) -> VqaSample:
    label = row["label"]
    if not isinstance(label, dict) or not label:
        raise row.error("has no answer as label; {answer: score} was expected")
    answer = Row({"label": next(iter(label))}, row.name, "pathvqa").text("label")  # as in LLaVA-Med's files
    return VqaSample(row.identity("question_id"), _image(row, "img_id", images), row.text("sent"), answer, row.answer_type(_TYPES),
                     question_type=row.optional("question_type"))


def _plain(rows: list[Row], images: Path) -> list[VqaSample]:
    seen: Counter = Counter()
    samples = []
    for row in rows:
        name, answer = row.words("image"), row.text("answer")
        samples.append(VqaSample(f"{name}-{seen[name]}", _image(row, "image", images), row.text("question"), answer, by_answer(answer)))
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
    published={  # spec 3.1; of the parquet form what its card says: repeated rows are left out
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
