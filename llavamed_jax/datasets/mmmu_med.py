"""Reads MMMU's part Health & Medicine (Yue et al. 2024): parquet files in one folder a subject, as on the hub.

A row has `id`, `question`, `options` (a list, written as text), `answer`, `question_type` (`multiple-choice` or
`open`), `subfield`, `img_type` (a list, written as text), and up to seven images, which question and options call
`<image 1>`. The test split's files have "?" in place of answers. MedEvalKit ships the answers as `answer.json` (an
object of `{question_type, ground_truth}` by id), which is read from the set's folder. Papers report `validation`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.parquet import image_folder, read_parquet
from llavamed_jax.datasets.published_choices import Questions, as_published, right_place, texts
from llavamed_jax.datasets.registry import DataSet, Selection
from llavamed_jax.datasets.rows import Row, one_of
from llavamed_jax.datasets.sample import LETTERS, OPEN, VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import read_json

NAME = "mmmu_med"
SUBJECTS = ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
            "Public_Health")
FILES = {"train": "dev", "validation": "validation", "test": "test"}
PICTURES = tuple(f"image_{number}" for number in range(1, 8))
ANSWERS = "answer.json"  # of MedEvalKit, utils/MMMU/answer.json
_COLUMNS, _MORE = ("id", "question", "options", "answer", "question_type"), ("subfield", "img_type")
_BEFORE_INSTRUCTION = "\n        "  # the published prompt has these blanks


def choice_prompt(question: str, lines: list[str]) -> str:
    """Returns the prompt of a multiple-choice question, as MMMU's evaluation writes it."""
    listed = "".join(f"{line}\n" for line in lines)
    return (f"\n{question}\n\n{listed}\n{_BEFORE_INSTRUCTION}Answer with the option's letter from the given choices "
            "directly.")


def open_prompt(question: str) -> str:
    """Returns the prompt of an open question, as MMMU's evaluation writes it."""
    return f"\n{question}\n{_BEFORE_INSTRUCTION}Answer the question using a single word or phrase."


def read_mmmu_med(selected: Selection) -> list[VqaSample]:
    """Reads the questions of the five subjects.

    Args:
      selected: `root` is the folder with the folders of the subjects. `split` is `validation`, `train` for the few-shot
        examples (`dev`), or `test`, which needs `root/answer.json`. The images are written to `images`, by default
        `root/images`.

    Raises:
      UserError: a subject's file is missing or is not parquet, a row lacks a field or states no answer, or the split is
        unknown.
    """
    one_of("MMMU's split", selected.split, tuple(FILES))
    root = Path(selected.root)
    folder = image_folder(root, selected.images)
    found, answers = Questions(str(root)), _answers(root) if selected.split == "test" else {}
    for subject in SUBJECTS:
        files = _files(root, subject, selected.split)
        if not files:
            raise UserError(f"{root / subject} has no parquet file {FILES[selected.split]}-*.parquet; the folders of "
                            f"MMMU's subjects {', '.join(SUBJECTS)} were expected{detect.hint(root, NAME)}")
        rows = read_parquet(files, _COLUMNS, folder, _MORE, PICTURES)
        for index, value in enumerate(rows):
            _add(found, Row(value, f"row {index} of {root / subject}", NAME), subject, answers)
    return found.done()


def _answers(root: Path) -> dict[str, Row]:
    """Returns id -> the row of MedEvalKit's file of answers; empty if the folder has none."""
    file = root / ANSWERS
    if not file.is_file():
        return {}
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file} is no object; {{id: {{question_type, ground_truth}}}} was expected")
    return {name: Row(value, f"{name} of {file}", NAME) for name, value in found.items()}


def _add(found: Questions, row: Row, subject: str, answers: Mapping[str, Row]) -> None:
    identity, question = row.identity("id"), as_published(row, "question")
    answer, given = row.text("answer"), row["answer"]
    if answer in ("", "?") and str(identity) in answers:
        given = answers[str(identity)]["ground_truth"]
        answer = ", ".join(map(str, given)) if isinstance(given, list) else answers[str(identity)].text("ground_truth")
    images = [row[name] for name in PICTURES if name in row]
    fields = {"question_type": subject.replace("_", " "), "modality": row.labels("img_type")}
    if answer in ("", "?"):
        raise row.error(f"has the answer {answer!r}: MMMU's files do not state the answers of the test split; "
                        f"MedEvalKit's utils/MMMU/{ANSWERS} in the set's folder, or data.split=validation, was "
                        "expected")
    if row.text("question_type") == "open":
        first = next(iter(_list(Row({"answer": given}, row.name, NAME), "answer", [answer])), answer)
        found.add_sample(row, identity, images, open_prompt(question), first, OPEN, **fields)
        return
    options = _list(row, "options")
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    found.add(row, identity, images, question, options, lines, right_place(answer, options, "letter"),
              choice_prompt(question, lines), **fields)


def _list(row: Row, key: str, otherwise: list[str] | None = None) -> list[str]:
    """Returns a list of texts that may be written as text (`"['a', 'b']"`)."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list):
        if otherwise is not None:
            return otherwise
        raise row.error(f"has {key} that are no list; a list of texts was expected")
    return texts(Row({key: value}, row.name, NAME), key)


def _files(root: Path, subject: str, split: str) -> list[Path]:
    return sorted((root / subject).glob(f"{FILES[split]}-*.parquet"))


DATA_SET = DataSet(
    name=NAME,
    label="MMMU Health & Medicine",
    sign="Clinical_Medicine/, Pharmacy/, …",
    read=read_mmmu_med,
    row="{id, question, options, answer, question_type, image_1, …}",
    follows=("images",),
    is_at=lambda path: any(any((path / subject).glob("*.parquet")) for subject in SUBJECTS),
    # 30 questions of a subject, and 5
    published={("validation", ""): (150, None, None, None), ("train", ""): (25, None, None, None),
               ("test", ""): (1752, None, None, None)},
    files=lambda root, split: [*(file for subject in SUBJECTS for file in _files(root, subject, split)),
                               *filter(Path.is_file, [root / ANSWERS] if split == "test" else [])],
)
