"""Reads PMC-VQA (Zhang et al. 2023): `test_2.csv` or another of its CSV files, and the folder of its figures.

The second version (`train_2.csv`, `test_2.csv`) has the columns `index, Figure_path, Caption, Question, Choice A, …,
Choice D, Answer, split`; the first one and `test_clean.csv` have the answer's text in `Answer` and its letter in
`Answer_label`. The cells of the choices begin with their letter ("A:CT"), and the prompt lists them as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.published_choices import Questions, folder_of, right_place
from llavamed_jax.datasets.registry import DataSet, Selection
from llavamed_jax.datasets.rows import one_of, read_table
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError

NAME, SPLITS, LETTERS = "pmc_vqa", ("train", "test"), "ABCD"
FILES = {"train": ("train_2.csv", "train.csv"), "test": ("test_2.csv", "test_clean.csv", "test.csv")}
COLUMNS = ("Figure_path", "Question", *(f"Choice {letter}" for letter in LETTERS), "Answer")


def read_pmc_vqa(selected: Selection) -> list[VqaSample]:
    """Reads the questions of a CSV file.

    Args:
      selected: `root` is the folder or a file. In a folder, the second version is read if it is there. The images are
        in `figures/` or `images/` beside the file. An id is the number of the row, from 0.

    Raises:
      UserError: the file or an image is missing, the file is not CSV or lacks a column, or the split is unknown.
    """
    one_of("PMC-VQA's split", selected.split, SPLITS)
    file = file_of(Path(selected.root), selected.split)
    folder = folder_of(file.parent, selected.images, "figures", "images")
    found = Questions(str(file))
    for index, row in enumerate(read_table(file, COLUMNS, NAME)):
        lines = [row.value[f"Choice {letter}"] for letter in LETTERS]
        options = [re.sub(rf"^\s*{letter}\s*:", "", line).strip() for letter, line in zip(LETTERS, lines, strict=True)]
        label = row.value.get("Answer_label")
        answer = (label or row.words("Answer")).strip()
        found.add(row, index, [row.image("Figure_path", folder)], row.value["Question"], options, lines,
                  right_place(answer, options, "letter" if label else ""))
    return found.done()


def file_of(root: Path, split: str) -> Path:
    """Returns the file of a split; `root` itself if it is a file. Raises UserError if there is none."""
    if root.is_file():
        return root
    found = next((root / name for name in FILES[split] if (root / name).is_file()), None)
    if found is None:
        raise UserError(f"the data file {root / FILES[split][0]} does not exist{detect.hint(root, NAME)}")
    return found


def _variant(selected: Selection) -> str:
    root = Path(selected.root)
    return root.stem if root.is_file() else next(
        (Path(name).stem for name in FILES.get(selected.split, ()) if (root / name).is_file()), "")


_NAMES = [name for names in FILES.values() for name in names]

DATA_SET = DataSet(
    name=NAME,
    label="PMC-VQA",
    sign="test_2.csv, figures/",
    read=read_pmc_vqa,
    row=f"a row with the columns {', '.join(COLUMNS)}",
    follows=("images",),
    splits=SPLITS,
    is_at=lambda path: path.name in _NAMES and path.is_file() or any((path / name).is_file() for name in _NAMES),
    variant=_variant,
    # From the set's page on the hub; no source counts the images.
    published={("train", "train_2"): (152603, None, None, None), ("test", "test_2"): (33430, None, None, None),
               ("test", "test_clean"): (2000, None, None, None)},
    files=lambda root, split: [file_of(root, split)],
)
