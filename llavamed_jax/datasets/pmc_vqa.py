"""Reads PMC-VQA (Zhang et al. 2023): `test_2.csv` or another of its CSV files, and the folder of its figures.

The second version (`train_2.csv`, `test_2.csv`) has the columns `index, Figure_path, Caption, Question, Choice A, …,
Choice D, Answer, split`, and its figures are in `figures/`. The first one and `test_clean.csv` have the answer's text
in `Answer` and its letter in `Answer_label`, and their figures are in `images/`. The cells of the choices begin with
their letter ("A:CT"), and the prompt lists them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.published_choices import Questions, folders_of, right_place
from llavamed_jax.datasets.registry import DataSet, Selection
from llavamed_jax.datasets.rows import Row, one_of, read_table
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError

NAME, SPLITS, LETTERS = "pmc_vqa", ("train", "test"), "ABCD"
FILES = {"train": ("train_2.csv", "train.csv"), "test": ("test_2.csv", "test_clean.csv", "test.csv")}
_LONGEST_HEADER = 2**16  # bytes
COLUMNS = ("Figure_path", "Question", *(f"Choice {letter}" for letter in LETTERS), "Answer")


def read_pmc_vqa(selected: Selection) -> list[VqaSample]:
    """Reads the questions of a CSV file.

    Args:
      selected: `root` is the folder or a file. In a folder, the second version is read if it is there. Each image is
        looked for in `figures/` and `images/` beside the file, first in the folder of the file's version. An id is the
        number of the row, from 0. Rows whose answer is empty or no option are left out, with a warning.

    Raises:
      UserError: the file or an image is missing, the file is not CSV or lacks a column, or the split is unknown.
    """
    one_of("PMC-VQA's split", selected.split, SPLITS)
    file = file_of(Path(selected.root), selected.split)
    names = ("figures", "images") if file.stem.endswith("_2") else ("images", "figures")
    folders = folders_of(file.parent, selected.images, *names)
    found = Questions(str(file))
    for index, row in enumerate(read_table(file, COLUMNS, NAME)):
        lines = [row.value[f"Choice {letter}"] for letter in LETTERS]
        options = [re.sub(rf"^\s*{letter}\s*:", "", line).strip() for letter, line in zip(LETTERS, lines, strict=True)]
        label = row.value.get("Answer_label")
        answer = (label or row.text("Answer")).strip()
        found.add(row, index, [_image(row, folders)], row.value["Question"], options, lines,
                  right_place(answer, options, "letter" if label else ""))
    return found.done()


def _image(row: Row, folders: Sequence[Path]) -> Path:
    """Returns the path of a row's image in the first folder that has it, or else in the first folder."""
    paths = [row.image("Figure_path", folder) for folder in folders]
    return next(filter(Path.is_file, paths), paths[0]) if len(paths) > 1 else paths[0]


def _is_table(file: Path) -> bool:
    """Returns whether the first line of a file names PMC-VQA's columns; files of many sets are named `test.csv`."""
    try:
        with file.open("rb") as opened:
            line = opened.readline(_LONGEST_HEADER).decode("utf-8-sig", "replace")
    except OSError:
        return False
    return {"Figure_path", "Choice A"} <= {cell.strip().strip('"') for cell in line.split(",")}


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
    is_at=lambda path: any(map(_is_table, [path] if path.name in _NAMES and path.is_file()
                                      else [path / name for name in _NAMES])),
    variant=_variant,
    # From the set's page on the hub; no source counts the images.
    published={("train", "train_2"): (152603, None, None, None), ("test", "test_2"): (33430, None, None, None),
               ("test", "test_clean"): (2000, None, None, None)},
    files=lambda root, split: [file_of(root, split)],
    use_training_rows=True,
)
