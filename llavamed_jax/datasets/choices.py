"""Reads multiple-choice questions about images: JSON or JSON lines of `{id, image, question, options, answer}`.

Published sets (PMC-VQA, OmniMedVQA, MedXpertQA, MMMU, MedFrameQA) have readers of their own, and the prompt that papers
use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.datasets.registry import DataSet
from llavamed_jax.datasets.rows import Row, read_split
from llavamed_jax.datasets.sample import CHOICE, LETTERS, VqaSample

INSTRUCTION = "Answer with the letter of the right option."


def prompt(question: str, options: Sequence[str]) -> str:
    """Returns the prompt: the question, then one option a line as "A. …", then the instruction."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, INSTRUCTION])


def read_choices(root: str | Path, split: str = "test", images: str | Path | None = None) -> list[VqaSample]:
    """Reads multiple-choice questions. `VqaSample.question` is the prompt, `answer` the text of the right option.

    In the file, `options` is a list of texts, or an object that maps letters, from A on, to texts. `answer` is a letter
    or the text of an option; an answer that is the letter of one option and the text of another raises an error. A row
    may have `question_type`, `organ` and `modality`.

    Args:
      root: the file, or a folder with `train.json`, `validation.json`, `test.json` (or `.jsonl`).
      split: the split to read, if `root` is a folder.
      images: the folder of the images; None means the folder of the file.

    Raises:
      UserError: a file or an image is missing, a row lacks a field, an answer is not an option, or the split is
        unknown.
    """
    return read_split(root, split, "choices", images, _sample)


def _sample(row: Row, images: Path, index: int) -> VqaSample:
    identity, image, question, options = (
        row.identity("id", "question_id"), row.image("image", images), row.words("question"), _options(row))
    return VqaSample(identity, image, prompt(question, options), _answer(row, options), CHOICE, **row.fields(),
                     options=options)


def _options(row: Row) -> tuple[str, ...]:
    options = row["options"]
    wanted = f"a list of 2 to {len(LETTERS)} texts, or an object {{A: text, B: text, …}}, was expected"
    if isinstance(options, dict):
        letters = sorted(map(str, options))
        if letters != list(LETTERS[:len(letters)]):
            raise row.error(f"has the options {', '.join(letters)[:80]}; letters from A on without gaps were "
                            "expected")
        options = [options[letter] for letter in letters]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise row.error(f"has {len(options)} options; {wanted}" if isinstance(options, list)
                        else f"has no list of options; {wanted}")
    return tuple(Row({"option": option}, row.name, "choices").words("option") for option in options)


def _answer(row: Row, options: Sequence[str]) -> str:
    """Returns the text of the right option."""
    answer = row.words("answer")
    letter = LETTERS.find(answer.upper()) if len(answer) == 1 else -1
    by_letter = options[letter] if 0 <= letter < len(options) else None
    by_text = answer if answer in options else None
    if by_letter and by_text and by_letter != by_text:
        raise row.error(f"has the answer {answer!r}, which is ambiguous: it is the letter of one option and the text "
                        "of another")
    right = by_letter or by_text
    if right is None:
        raise row.error(f"has the answer {answer[:80]!r}; a letter up to {LETTERS[len(options) - 1]} or an option's "
                        "text was expected")
    if options.count(right) > 1:
        raise row.error(f"lists its right option {right[:80]!r} {options.count(right)} times; once was expected")
    return right


DATA_SET = DataSet(
    name="choices",
    label="multiple choice",
    sign="rows with options",
    read=lambda selected: read_choices(selected.root, selected.split, selected.images),
    row="{id, image, question, options, answer}",
    follows=("images",),
    is_row=lambda keys: "options" in keys,
)
