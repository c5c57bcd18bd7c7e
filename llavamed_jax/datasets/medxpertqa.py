"""Reads the images part of MedXpertQA (Zuo et al. 2025): `MM/test.jsonl`, `MM/dev.jsonl` and `images/`.

A row has `id`, `question` (which lists the options too), `options`, `label` (a letter), `images` (one name or several),
`medical_task`, `body_system` and `question_type`.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.published_choices import Questions, as_published, folder_of, right_place
from llavamed_jax.datasets.registry import DataSet, Selection
from llavamed_jax.datasets.rows import Row, one_of, read_rows
from llavamed_jax.datasets.sample import LETTERS, VqaSample
from llavamed_jax.errors import UserError

NAME = "medxpertqa_mm"
FILES = {"validation": ("dev.jsonl", "dev.json"), "test": ("test.jsonl", "test.json")}


def read_medxpertqa_mm(selected: Selection) -> list[VqaSample]:
    """Reads the questions of a split; `validation` is the file `dev`.

    Args:
      selected: `root` is the folder with `MM/`, the folder with the files, or a file. The images are in `images/` in
        the folder or beside `MM/`.

    Raises:
      UserError: a file or an image is missing, a row lacks a field, or the split is unknown.
    """
    one_of("MedXpertQA's split", selected.split, tuple(FILES))
    file = file_of(Path(selected.root), selected.split)
    home = file.parent if (file.parent / "images").is_dir() else file.parent.parent
    folder = folder_of(home, selected.images, "images")
    found = Questions(str(file))
    for row in read_rows(file, NAME):
        options = _options(row)
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        found.add(row, row.identity("id"), _images(row, folder), as_published(row, "question"), options, lines,
                  right_place(row.text("label"), options, "letter"), is_numbered=True,
                  organ=row.labels("body_system"), question_type=row.labels("question_type"))
    return found.done()


def file_of(root: Path, split: str) -> Path:
    """Returns the file of a split; `root` itself if it is a file. Raises UserError if there is none."""
    if root.is_file():
        return root
    names = [folder / name for folder in (root / "MM", root) for name in FILES[split]]
    found = next(filter(Path.is_file, names), None)
    if found is None:
        raise UserError(f"the data file {names[0]} does not exist{detect.hint(root, NAME)}")
    return found


def _options(row: Row) -> list[str]:
    """Returns the options: an object of letters, or a list of `{letter, content}`."""
    options = row["options"]
    if isinstance(options, list):
        options = {each.text("letter"): each["content"] for each in row.rows("options")}
    if not isinstance(options, dict) or sorted(options) != list(LETTERS[:len(options)]):
        raise row.error("has no options with letters from A on; {A: text, B: text, …} was expected")
    return [as_published(Row(options, row.name, NAME), letter) for letter in sorted(options)]


def _images(row: Row, folder: Path) -> list[Path]:
    names = row["images"]
    if not isinstance(names, list) or not names:
        raise row.error("has no list of images; names of files were expected")
    return [Row({"images": name}, row.name, NAME).image("images", folder) for name in names]


DATA_SET = DataSet(
    name=NAME,
    label="MedXpertQA MM",
    sign="MM/test.jsonl, images/",
    read=read_medxpertqa_mm,
    row="{id, question, options, label, images}",
    follows=("images",),
    splits=tuple(FILES),
    is_at=lambda path: (path / "MM" / "test.jsonl").is_file(),
    is_row=lambda keys: {"medical_task", "options", "images"} <= keys,
    published={("test", ""): (2000, None, None, None), ("validation", ""): (5, None, None, None)},  # the set's page
    files=lambda root, split: [file_of(root, split)],
)
