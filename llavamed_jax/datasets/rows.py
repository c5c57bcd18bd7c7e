"""Reads the rows of a data file. Errors name the place of the row and the key."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.registry import OFFICIAL, SETS
from llavamed_jax.datasets.sample import CLOSED, OPEN, Labels, VqaSample, check_images
from llavamed_jax.errors import UserError, short
from llavamed_jax.utils import tables
from llavamed_jax.utils.files import parse_json, parse_jsonl, read_bytes

# Values of `answer_type`, in capitals -> the kind. The last three of the second stand in files of PathVQA.
_OPEN_OR_CLOSED = {OPEN: OPEN, CLOSED: CLOSED}
WIDER_TYPES = {**_OPEN_OR_CLOSED, "YES/NO": CLOSED, "OTHER": OPEN, "NUMBER": OPEN}
_LARGEST = 2**63  # a pickle can hold a number with a million digits, which Python refuses to print


def one_of(what: str, value, choices: Iterable) -> None:
    """Raises UserError if `value` is not in `choices`; the error calls the value `what`."""
    if value not in choices:
        raise UserError(f"{what} is {value!r}; one of {', '.join(map(str, choices))} was expected")


def read_rows(file: Path, layout: str) -> list[Row]:
    """Reads the rows of a JSON list or of a JSONL file.

    Args:
      file: the file.
      layout: the data set that the rows should belong to, a name in `registry.SETS`.

    Raises:
      UserError: the file is missing, or is not UTF-8 or not JSON.
    """
    text = _text(file, "a JSON list or JSON lines were")
    if text.lstrip().startswith("["):
        return named_rows(parse_json(text, str(file)), file, layout)
    return named_rows([row for _, row in parse_jsonl(text, lambda number: f"line {number} of {file}")], file, layout)


def read_table(file: Path, columns: Sequence[str], layout: str, may_be_longer: bool = False) -> list[Row]:
    """Reads the rows of a CSV file; the first line has the names of the columns.

    Args:
      file: the file.
      columns: the columns that every row must have.
      layout: the data set that the rows should belong to, a name in `registry.SETS`.
      may_be_longer: whether a row may have more cells than the first line; they are not read.

    Raises:
      UserError: the file is missing, is not UTF-8 or not CSV, or the cells of a row do not fit the columns.
    """
    text = _text(file, "a CSV file was")
    tables.allow_long_cells()
    table, lines, begin = csv.DictReader(io.StringIO(text, newline=""), strict=True), [], 1
    try:
        if table.fieldnames:  # reads the header
            begin = table.line_num + 1
        for line in table:
            lines.append(line)
            begin = table.line_num + 1
    except csv.Error as error:
        raise UserError(f"line {begin} of {file} is not CSV: {error}") from None
    for number, line in enumerate(lines):
        missing = [column for column in columns if line.get(column) is None]
        if missing or not may_be_longer and None in line:
            what = f"has no {missing[0]!r}" if missing else "has more cells than the header"
            raise UserError(f"row {number} of {file} {what}; the columns {', '.join(columns)} were expected")
    return named_rows(lines, file, layout)


def _text(file: Path, expected: str) -> str:
    try:
        return read_bytes(file, f"the data file {file}").decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the data file {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text; {expected} expected") from error


def read_split(root: str | Path, split: str, layout: str, images: str | Path | None,
               sample: Callable[[Row, Path, int], VqaSample]) -> list[VqaSample]:
    """Reads the samples of a user's file, or of the file of a split in a folder.

    Args:
      root: the file or the folder.
      split: the split.
      layout: the name of the form, in `registry.SETS`.
      images: the folder of the images; None means the folder of the file.
      sample: makes a sample from a row, the folder of the images and the index of the row.

    Raises:
      UserError: a file or an image is missing, a row is malformed, or the split is unknown.
    """
    one_of("the split", split, detect.SPLITS)
    file = detect.split_file(Path(root), split, layout)
    folder = Path(images) if images else file.parent
    samples = [sample(row, folder, index) for index, row in enumerate(read_rows(file, layout))]
    check_images([sample.image for sample in samples])
    return samples


def named_rows(values: Iterable[Any], file: Path, layout: str) -> list[Row]:
    """Wraps values as rows that know their place in the file."""
    return [Row(value, f"row {index} of {file}", layout) for index, value in enumerate(values)]


class Row:
    """A row of a data file. Its methods return checked values, or raise UserError, which names the row and the key.

    Args:
      value: the parsed row.
      name: what an error calls the row.
      layout: the data set that the row should belong to, a name in `registry.SETS`.
    """

    def __init__(self, value: Any, name: str, layout: str):
        self.value, self.name, self._layout = value, name, layout

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, Mapping) and self.value.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.value, Mapping) or key not in self.value:
            other = detect.layout_of_row(self.value)
            also = f"; the row looks like one of {SETS[other].title}" if other not in (None, self._layout) else ""
            expected = SETS[self._layout].row if self._layout in SETS else OFFICIAL
            raise self.error(f"has no {key!r}; {expected} was expected{also}")
        return self.value[key]

    def error(self, what: str) -> UserError:
        """Returns an error about this row; `what` follows the name of the row."""
        return UserError(f"{self.name} {what}")

    def text(self, key: str) -> str:
        """Returns a text without surrounding blanks, or a number as text: some published answers are numbers."""
        value = self[key]
        is_number = type(value) is int and abs(value) < _LARGEST or isinstance(value, float) and math.isfinite(value)
        if not isinstance(value, str) and not is_number:
            raise self.error(f"has the {key} {_shown(value)}; text was expected")
        try:
            value = str(value).strip()
            value.encode()
        except UnicodeEncodeError:  # JSON and pickles can express it; files and tokenizers cannot
            raise self.error(f"has half a surrogate pair in its {key}") from None
        return value

    def texts(self, *keys: str) -> list[str]:
        """Returns the texts under several keys."""
        return [self.text(key) for key in keys]

    def words(self, key: str) -> str:
        """Returns a text; raises UserError if it is empty."""
        if not (value := self.text(key)):
            raise self.error(f"has an empty {key}; text was expected")
        return value

    def labels(self, key: str) -> Labels:
        """Returns a text, a tuple of texts for a list (also as text: `"['CT', 'MRI']"`), or None for nothing."""
        value = self.value.get(key) if key in self else None
        if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = ast.literal_eval(value.strip())
        if isinstance(value, (list, tuple)):
            found = (Row({key: each}, self.name, self._layout).text(key) for each in value)
            return tuple(dict.fromkeys(filter(None, found))) or None
        return (self.text(key) or None) if key in self else None

    def rows(self, key: str) -> list[Row]:
        """Returns the rows of a list inside this row; raises UserError if the value is not a list."""
        value = self[key]
        if not isinstance(value, list):
            raise self.error(f"has the {key} {_shown(value)}; a list was expected")
        return [Row(each, f"{key}[{index}] of {self.name}", self._layout) for index, each in enumerate(value)]

    def fields(self) -> dict[str, Labels]:
        """Returns the optional fields of a user's row, by which reports are broken down."""
        return {key: self.labels(key) for key in ("question_type", "organ", "modality")}

    def identity(self, *keys: str) -> int | str:
        """Returns the id under the first of `keys` that the row has."""
        key = next((key for key in keys if key in self), keys[0])
        value = self[key]
        return value if type(value) is int and abs(value) < _LARGEST else self.words(key)

    def image(self, key: str, folder: Path) -> Path:
        """Returns the path of the image; raises UserError if the row has several images."""
        value = self[key]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, list):
            raise self.error(f"has {len(value)} images; one was expected")
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.error(f"has the {key} {_shown(value)}; text was expected")
        return folder / value

    def answer_type(self, names: Mapping[str, str] = _OPEN_OR_CLOSED) -> str:
        """Returns OPEN or CLOSED. Blanks are removed, because two rows of VQA-RAD have a trailing blank.

        Args:
          names: the values that a file may have, in capitals -> OPEN or CLOSED.
        """
        value = self["answer_type"]
        kind = names.get(value.strip().upper()) if isinstance(value, str) else None
        if kind is None:
            raise self.error(f"has the answer_type {_shown(value)}; {' or '.join(names)} was expected")
        return kind


def _shown(value: Any) -> str:
    """Formats a value for an error. A container is not printed, because a pickle's may be nested too deeply."""
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a number with too many digits"
    return f"a {type(value).__name__}" if isinstance(value, (list, dict, tuple)) else short(value)
