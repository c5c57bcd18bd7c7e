"""Reads OmniMedVQA (Hu et al. 2024): `QA_information/Open-access/*.json` and `Images/`.

Only the part with open access has its images. A row has `question_id`, `question`, `gt_answer`, `image_path`,
`option_A` to at most `option_D`, `question_type`, `modality_type` and `dataset`. There is one split, `test`.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.published_choices import Questions, as_published
from llavamed_jax.datasets.registry import DataSet, Selection
from llavamed_jax.datasets.rows import one_of, read_rows
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError

NAME, SPLITS = "omnimedvqa", ("test",)
FOLDER = Path("QA_information") / "Open-access"


def read_omnimedvqa(selected: Selection) -> list[VqaSample]:
    """Reads the questions of all files of the open part, in the order of the files' names, or those of one file.

    Args:
      selected: `root` is the folder with `QA_information/`, or one of its files. `image_path` is relative to the
        former, or to `images`.

    Raises:
      UserError: a file or an image is missing, a row lacks a field, or the split is unknown.
    """
    one_of("OmniMedVQA's split", selected.split, SPLITS)
    root = Path(selected.root)
    files = files_of(root, selected.split)
    if not files:
        raise UserError(f"the folder {root / FOLDER} has no JSON file of questions{detect.hint(root, NAME)}")
    folder = Path(selected.images) if selected.images else root
    if root.is_file() and not selected.images:
        folder = next((place for place in root.parents if (place / "Images").is_dir()), root.parent)
    found = Questions(str(root))
    for file in files:
        for row in read_rows(file, NAME):
            letters = [letter for letter in "ABCD" if f"option_{letter}" in row]
            options = [row.text(f"option_{letter}") for letter in letters]
            lines = [f"{letter}. {as_published(row, f'option_{letter}')}" for letter in letters]
            found.add(row, row.identity("question_id"), [row.image("image_path", folder)],
                      as_published(row, "question"), options, lines, _place(row.text("gt_answer"), letters, options),
                      question_type=row.labels("question_type"), modality=row.labels("modality_type"))
    return found.done()


def _place(answer: str, letters: list[str], options: list[str]) -> int | None:
    """Returns the index of the right option: of the last one with the text of the answer, or of its letter."""
    same = [place for place, option in enumerate(options) if option == answer]
    return same[-1] if same else letters.index(answer.upper()) if answer.upper() in letters else None


def files_of(root: Path, split: str) -> list[Path]:
    """Returns the files with the questions."""
    return [root] if root.is_file() else sorted((root / FOLDER).glob("*.json"))


DATA_SET = DataSet(
    name=NAME,
    label="OmniMedVQA",
    sign="QA_information/Open-access/, Images/",
    read=read_omnimedvqa,
    row="{question_id, question, gt_answer, image_path, option_A, …}",
    follows=("images",),
    splits=SPLITS,
    is_at=lambda path: (path / FOLDER).is_dir(),
    is_row=lambda keys: {"gt_answer", "image_path"} <= keys,
    published={("test", ""): (88996, 82059, None, None)},  # the open part, from the set's paper
    files=files_of,
)
